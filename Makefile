# `make help` lists the targets. Each sets up .venv from pyproject.toml first, where needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Large tensors of every step go back to the system and are taken again without this (glibc).
export THP_MEM_ALLOC_ENABLE := 1

.DEFAULT_GOAL := help
.PHONY: help demo train-demo test test-ray test-beside test-fast test-gpu check format clean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## set up, then detect objects in real photographs: ./demo-output/
	$(BIN)/python jobs/infer.py

TRAINED := demo-output/training
train-demo: $(READY)  ## train on generated pictures for 3 minutes, then detect and measure on others
	rm -rf $(TRAINED)
	$(BIN)/python -m pipeline.training.demo $(TRAINED)/pictures
	for split in train val test; do $(BIN)/python jobs/make_shards.py --format coco \
	  --images $(TRAINED)/pictures/$$split --annotations $(TRAINED)/pictures/$$split.json \
	  --output $(TRAINED)/shards/$$split || exit; done
	$(BIN)/python jobs/train.py --train $(TRAINED)/shards/train --val $(TRAINED)/shards/val \
	  --output $(TRAINED)/run --max-minutes 3
	$(BIN)/python jobs/infer.py --weights $(TRAINED)/run/model.safetensors --input $(TRAINED)/shards/test \
	  --output $(TRAINED)/detections
	$(BIN)/python jobs/evaluate.py --detections $(TRAINED)/detections --annotations $(TRAINED)/shards/test

# Clusters that start and die leave a fifth of two cores idle: the other tests run there meanwhile.
test: $(READY)  ## every test that needs no GPU
	$(MAKE) --keep-going --jobs=2 test-ray test-beside

test-ray: $(READY)
	$(BIN)/python -m pytest -q -m ray

OTHERS := .pytest-without-ray.log
test-beside: $(READY)
	@nice $(BIN)/python -m pytest -q -m "not ray" -n 0 -p no:cacheprovider -o timeout=1200 >$(OTHERS) 2>&1; \
	code=$$?; cat $(OTHERS); exit $$code

test-fast: $(READY)  ## tests that start no Ray cluster
	$(BIN)/python -m pytest -q -m "not ray"

test-gpu: $(READY)  ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -n 0 -m gpu

check: $(READY)  ## lint, format, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY)  ## apply the formatter
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## delete the virtual environment and the demo's output
	rm -rf $(VENV) demo-output

# torch and torchvision must match, so one command resolves them together.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(READY)
