# The project's commands. Each one installs what it needs into .venv and needs nothing but Python ≥ 3.11, git and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help demo test faults lint format bench clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

demo: .venv/.demo ## Three hospitals train one model together, on this machine, with real parts
	@$(BIN)/fedota demo

test: .venv/.dev ## Run all tests, on real servers
	@$(BIN)/pytest

faults: .venv/.dev ## Make many faults on real servers (COUNT=20 of each kind; SEED=text for the same ones again)
	@FEDOTA_FAULTS=$(or $(COUNT),20) FEDOTA_FAULTS_SEED=$(SEED) $(BIN)/pytest tests/faults --timeout 0

lint: .venv/.dev ## Check style, types and import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev ## Put the code into its form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.dev ## Measure, each figure beside its anchor (JSON=path writes them there too; LARGE=1: a log of five million events, a model of 4 GB)
	@$(BIN)/python -m benchmarks $(if $(LARGE),--large) $(if $(JSON),--json $(JSON))

clean: ## Remove what these commands made
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fedota needs Python 3.11 or newer; this is " \
		+ sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@echo "Setting up .venv (once) ..."
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv is missing; on Debian: apt install python3-venv"; exit 1; }

.venv/.demo: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Fedota and what the demo needs ..."
	@$(PIP) install --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing Fedota and what its tests need ..."
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@ .venv/.demo
