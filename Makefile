PYTHON ?= python3
# Two processes: the demo is made for two cores. Each computes with one thread.
TORCHRUN = .venv/bin/torchrun --standalone --nproc_per_node=2
RUN = OMP_NUM_THREADS=1 $(TORCHRUN)

demo: .venv/installed
	$(RUN) pretrain.py --source synthetic-natural
	$(RUN) pretrain.py --source synthetic-xray
	$(RUN) fewshot.py --checkpoint runs/synthetic-natural-R14x0.5 runs/synthetic-xray-R14x0.5 scratch
	.venv/bin/python plot.py

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

.PHONY: demo test format
