# Two commands matter: `make run` and `make test`.  Each sets up what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --quiet --disable-pip-version-check

.PHONY: run test docs storm fuzz hostile restart bench profile lint types unit install-test-parts clean

run: $(VENV)/.run
	$(BIN)/python run.py $(ARGS)

test: $(VENV)/.test install-test-parts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

# Most tests wait for something most of the time, so that four at once keep two cores busy; each of these processes has
# stores and a browser of its own.  One after another: make test SIDE_BY_SIDE=
SIDE_BY_SIDE ?= -n 4 --dist worksteal

# The tables that are made from the code, and the site in build/site; a link that leads nowhere ends it.
docs: $(VENV)/.test
	$(BIN)/python documents.py tables
	$(BIN)/python documents.py site build/docs
	$(BIN)/zensical build --strict --clean

# Break everything for as long as asked, and write down what came of it: make storm MINUTES=30 SEED=7
MINUTES ?= 30
storm: $(VENV)/.test
	$(BIN)/python tests/cluster/storm.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) --report docs/faults.md $(ARGS)

# Fuzz whatever a stranger's bytes meet first, for so many seconds in all: make fuzz SECONDS=60 TARGETS="frames rest"
TARGETS ?= frames commands tokens rest
fuzz: $(VENV)/.fuzz
	for target in $(TARGETS); do \
	  $(BIN)/python tests/fuzz/fuzz.py $$target --seconds $$(($(or $(SECONDS),60) / $(words $(TARGETS)))) || exit 1; \
	done

# What a well-behaved client notices of each kind of hostile one, and what memory those cost: make hostile SECONDS=5
hostile: $(VENV)/.test
	$(BIN)/python -m benchmarks.hostile $(call option,seconds) $(ARGS)

# What a restart of one process of three costs history and the clients of the others, with a pace and without; two or
# three minutes: make restart CLIENTS=1200
restart: $(VENV)/.test
	$(BIN)/python -m benchmarks.restart $(call option,clients) $(ARGS)

# This server beside others on this machine, a quarter of an hour or two: benchmarks/README.md.
# make bench WORKS=W1,W6 PEERS=bare,waterspout,aiohttp ROUNDS=3 SECONDS=3 SCALE=0.1
bench: $(if $(findstring cross,$(WORKS)),$(VENV)/.test,$(VENV)/.run)
	$(BIN)/python -m benchmarks.bench $(foreach one,works peers rounds seconds calm scale,$(call option,$(one))) $(ARGS)

# Where the time goes: make profile WORK=W6 SECONDS=5
WORK ?= W6
profile: $(VENV)/.run
	$(BIN)/python -m benchmarks.hotspots --work $(WORK) $(call option,seconds) $(ARGS)

# --name value of the variable NAME, if it is set
option = $(if $($(call upper,$1)),--$1 $($(call upper,$1)))
upper = $(shell echo $1 | tr a-z A-Z)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Everything but the browser and Node, for the inner loop of working on it.
unit: $(VENV)/.test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) tests/pure tests/contract tests/wire tests/examples $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Waterspout needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e .
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[test,docs]'
	touch $@ $(VENV)/.run

$(VENV)/.fuzz: setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[test,fuzz]'
	touch $@

# Node with the JavaScript SDK, a real browser (without a window if there is one, since it takes a third of the CPU), and
# Redis.
install-test-parts: tests/sdk/node_modules/.installed
	@command -v chromium-headless-shell >/dev/null || sh tests/sdk/install.sh chromium-headless-shell || command -v chromium
	@command -v redis-server >/dev/null || [ -n "$$WATERSPOUT_TEST_REDIS" ] || sh tests/sdk/install.sh redis-server

tests/sdk/node_modules/.installed: tests/sdk/package.json tests/sdk/package-lock.json
	@command -v node >/dev/null && command -v npm >/dev/null || sh tests/sdk/install.sh nodejs npm
	cd tests/sdk && npm ci --no-audit --no-fund --silent
	touch $@

clean:
	rm -rf $(VENV) build .cache tests/sdk/node_modules benchmarks/.envs benchmarks/results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
