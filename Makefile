# Two commands for newcomers: `make quickstart` and `make test`. Both create .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOKENIZERS_PARALLELISM ?= false
export TOKENIZERS_PARALLELISM

.PHONY: quickstart headline headline-data test test-all check format install wheel clean

quickstart: $(INSTALLED)  ## train the three systems of the quickstart recipe, compare them, print the leaderboard
	$(BIN)/llmslm-eval experiment --config quickstart

headline-data: $(INSTALLED)  ## prepare the data of the headline experiment: needs apt and the network, no GPU
	$(BIN)/llmslm-eval experiment --series headline --only data prompts

headline: $(INSTALLED)  ## the headline experiment on one GPU; what is complete is not run again
	$(BIN)/llmslm-eval experiment --series headline

test: $(INSTALLED)  ## run the tests, but for those that take minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(INSTALLED)  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

install: $(INSTALLED)  ## create the environment

wheel: $(INSTALLED)  ## build the wheel
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and what tools left behind; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llmslm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -c constraints.txt -e ".[dev]"
	@touch $@
