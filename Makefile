PYTHON ?= python3
WORLDS = runs/synthetic-natural runs/synthetic-xray
NETWORKS = $(WORLDS:%=%-R14x0.5)
LARGE = $(WORLDS:%=%-R26x1)
# A tenth of the images, as many epochs, as in the study.
TENTH = $(WORLDS:%=%-0.1-R14x0.5)
LARGE_TENTH = $(WORLDS:%=%-0.1-R26x1)
ALL = $(LARGE) $(LARGE_TENTH) $(NETWORKS) $(TENTH)
PRETRAIN = TQDM_DISABLE=1 .venv/bin/python pretrain.py --source $*
FEWSHOT = .venv/bin/torchrun --standalone --nproc_per_node 2 fewshot.py
LAW_TARGETS = $(foreach world,natural xray,$(foreach task,target target2 target3 target4,\
	$(foreach gap,0 0.25 0.5 0.75 1,synthetic-$(world)-$(task)~$(gap))))

# Both are made for two cores: two processes of one thread each.
demo study law: export CUDA_VISIBLE_DEVICES =
demo study law: export OMP_NUM_THREADS = 1
demo: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 $(NETWORKS)
	$(FEWSHOT) --seeds 5 --checkpoint $(NETWORKS) scratch
	.venv/bin/python plot.py

study: .venv/installed
	$(MAKE) --no-print-directory --jobs 2 $(ALL)
	$(FEWSHOT) --seeds 5 --checkpoint $(ALL) scratch
	.venv/bin/python plot.py

# A tenth of a source with as many epochs as the whole, as in the study, and apart from that with as
# many steps; frozen features, and a part fine-tuned. A folder a seed of pre-training; started again,
# it does what is missing.
law: .venv/installed
	for seed in 1 2 3; do for world in natural xray; do for model in R26x1 R14x0.25; do \
	    run="--source synthetic-$$world --model $$model --seed $$seed --out law/seed$$seed"; \
	    echo $$run/whole; \
	    echo $$run/steps --fraction 0.1 --epochs 60; \
	    echo $$run/epochs --fraction 0.1; \
	done; done; done | TQDM_DISABLE=1 xargs -L 1 -P 2 .venv/bin/python pretrain.py
	for seed in 1 2 3; do for part in whole epochs steps; do \
	    $(FEWSHOT) --seeds 5 --method linear --checkpoint law/seed$$seed/$$part/* \
	        --target $(LAW_TARGETS) --out law/results/seed$$seed/$$part || exit; \
	done; done
	$(FEWSHOT) --seeds 2 --shots 10 --checkpoint law/seed*/whole/* \
	    --target $(filter %~0 %~1,$(LAW_TARGETS)) --out law/finetuned
	.venv/bin/python plot.py law/finetuned --figure law --out figures/law-finetuned
	for part in epochs steps; do \
	    .venv/bin/python plot.py law/results/seed*/whole law/results/seed*/$$part --figure law \
	        --out figures/law-equal-$$part || exit; \
	done

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

.PHONY: demo study law test format $(ALL)
