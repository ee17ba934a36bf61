# Everything a fresh clone needs, with Python >= 3.11 and make alone. `make` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := pyproject.toml constraints.txt

PROMPT ?= A golden retriever playing in a field.
N ?= 1
SEED ?= 0
NAME ?= $(shell uname -m)
# Through the environment, so that quotes, apostrophes and dollars in a prompt reach limner untouched by the shell.
override export PROMPT := $(value PROMPT)

.PHONY: help image test lint bench docs

help:
	@echo 'make image PROMPT="A dog on a beach." [N=4] [SEED=7]   draw with the built-in model'
	@echo 'make test                                             run the tests'
	@echo 'make lint                                             check style and types'
	@echo 'make bench [NAME=my-machine]                          run the benchmarks'
	@echo 'make docs                                             write docs/cli.md from the help pages'

image: $(VENV)/.image
	@$(BIN)/limner generate -n $(N) --seed $(SEED) -- "$$PROMPT"

# A worker for each core: the tests compute with one thread each.
test: $(VENV)/.dev
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n logical --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev
	@for script in benchmarks/*.py; do $(BIN)/python "$$script" --name "$(NAME)" || exit 1; done

docs: $(VENV)/.image
	$(BIN)/python docs/cli.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Limner needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that its packages are installed; it is older than its requirements when they have changed.
$(VENV)/.image: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

# clip-benchmark and torch-fidelity are the tests' oracles for recall and distances. These parts of them need torch and
# tqdm alone, so the large packages that they declare are left out, which an extra in pyproject.toml can't say.
$(VENV)/.dev: $(REQUIREMENTS) | $(BIN)/python
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps clip-benchmark torch-fidelity
	@touch $@ $(VENV)/.image
