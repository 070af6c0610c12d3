PYTHON ?= python3
NETWORKS = runs/synthetic-natural-R14x0.5 runs/synthetic-xray-R14x0.5

# The demo is made for two cores: two processes of one thread each.
demo: export CUDA_VISIBLE_DEVICES =
demo: export OMP_NUM_THREADS = 1
demo: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 $(NETWORKS)
	.venv/bin/torchrun --standalone --nproc_per_node 2 fewshot.py --seeds 5 --checkpoint $(NETWORKS) scratch
	.venv/bin/python plot.py

$(NETWORKS): runs/%-R14x0.5:
	TQDM_DISABLE=1 .venv/bin/python pretrain.py --source $*

test: .venv/tests-installed
	.venv/bin/python -m pytest

format: .venv/tests-installed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

.venv/installed: requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/tests-installed: .venv/installed tests/requirements.txt
	.venv/bin/python -m pip install -q -r tests/requirements.txt
	touch $@

.PHONY: demo test format $(NETWORKS)
