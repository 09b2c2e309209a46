# `make help` lists the targets. Each sets up .venv from pyproject.toml first, where needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Large tensors of every step go back to the system and are taken again without this (glibc).
export THP_MEM_ALLOC_ENABLE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check format clean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)  ## set up, then detect objects in real photographs: ./demo-output/
	$(BIN)/python jobs/infer.py

test: $(READY)  ## every test that needs no GPU
	$(BIN)/python -m pytest -q

test-fast: $(READY)  ## tests that start no Ray cluster (two to three minutes)
	$(BIN)/python -m pytest -q -m "not ray"

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
