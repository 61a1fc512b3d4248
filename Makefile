# Two commands matter: `make run` and `make test`.  Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.PHONY: run test lint types unit install-test-parts clean

run: $(VENV)/.run
	$(BIN)/python run.py $(ARGS)

test: $(VENV)/.test install-test-parts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Everything but the browser and Node, for the inner loop of working on it.
unit: $(VENV)/.test
	$(BIN)/python -m pytest tests/pure tests/contract tests/wire tests/examples $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Waterspout needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[test]'
	touch $@ $(VENV)/.run

# Node with the JavaScript SDK, and a real browser.
install-test-parts: tests/sdk/node_modules/.installed
	@command -v chromium >/dev/null || sh tests/sdk/install.sh chromium

tests/sdk/node_modules/.installed: tests/sdk/package.json tests/sdk/package-lock.json
	@command -v node >/dev/null && command -v npm >/dev/null || sh tests/sdk/install.sh nodejs npm
	cd tests/sdk && npm ci --no-audit --no-fund --silent
	touch $@

clean:
	rm -rf $(VENV) tests/sdk/node_modules *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
