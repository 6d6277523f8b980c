# Only Python 3.11 or newer and make are assumed. `make PYTHON=/path/to/python install` chooses one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files of tests go to two processes; a file stays whole, as its tests share what ranks have run.
TWO_AT_ONCE := --numprocesses 2 --dist loadfile --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format check-all bench clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: $(STAMP)  ## Make .venv with the project and all that the targets below need

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { \
		echo "meshwise needs Python 3.11 or newer: make PYTHON=/path/to/python install" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): the first time takes a minute or two." >&2
	@$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"  # the first with --group
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable ".[torch,notebooks]" --group dev
	@touch $@

demo: install  ## Plan a training step, run the top plans on two CPU ranks, compare, report
	@$(BIN)/python -m meshwise demo

test: install  ## Run the tests and the notebooks
	@$(BIN)/python -m pytest $(TWO_AT_ONCE) --nbmake tests notebooks

lint: install  ## Check style, types and the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: install  ## Put code into the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check-all: lint  ## lint, then every test, the slow ones too, then the notebooks
	@$(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not benchmark"
	@$(BIN)/python -m pytest --nbmake notebooks

bench: install  ## Measure the project's own speed
	@$(BIN)/python -m pytest -m benchmark --benchmark-only benchmarks

clean:  ## Remove .venv, caches and build outputs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
