PYTHON ?= python3
WORLDS = runs/synthetic-natural runs/synthetic-xray
NETWORKS = $(WORLDS:%=%-R14x0.5)
LARGE = $(WORLDS:%=%-R26x1)
# A tenth of the images, as many epochs, as in the study.
TENTH = $(WORLDS:%=%-0.1-R14x0.5)
LARGE_TENTH = $(WORLDS:%=%-0.1-R26x1)
ALL = $(LARGE) $(LARGE_TENTH) $(NETWORKS) $(TENTH)
PRETRAIN = TQDM_DISABLE=1 .venv/bin/python pretrain.py --source $*
FEWSHOT = .venv/bin/torchrun --standalone --nproc_per_node 2 fewshot.py --seeds 5

# Both are made for two cores: two processes of one thread each.
demo study: export CUDA_VISIBLE_DEVICES =
demo study: export OMP_NUM_THREADS = 1
demo: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 $(NETWORKS)
	$(FEWSHOT) --checkpoint $(NETWORKS) scratch
	.venv/bin/python plot.py

study: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 $(ALL)
	$(FEWSHOT) --checkpoint $(ALL) scratch
	.venv/bin/python plot.py

$(NETWORKS): runs/%-R14x0.5:
	$(PRETRAIN)

$(LARGE): runs/%-R26x1:
	$(PRETRAIN) --model R26x1

$(TENTH): runs/%-0.1-R14x0.5:
	$(PRETRAIN) --fraction 0.1

$(LARGE_TENTH): runs/%-0.1-R26x1:
	$(PRETRAIN) --fraction 0.1 --model R26x1

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

.PHONY: demo study test format $(ALL)
