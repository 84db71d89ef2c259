# Every target sets up what it needs: a fresh clone can start with any of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all check bench docs clean

help:
	@echo "make quickstart   train a small model on real text, sample from it, export it (5 minutes)"
	@echo "make test         every kind of test"
	@echo "make test-all     every test grid whole"
	@echo "make check        ruff, basedpyright, import-linter"
	@echo "make bench        benchmarks beside peers"
	@echo "make docs         write the generated reference pages"
	@echo "make install      only set up .venv"

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmtrain needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m launch.quickstart

test: $(STAMP)
	$(BIN)/pytest -m 'not whole_grid'

test-all: $(STAMP)
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks

docs: $(STAMP)
	$(BIN)/python -m docs.generate

clean:
	rm -rf $(VENV) build dist *.egg-info
