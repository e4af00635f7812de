# What is done with this repository. Needs Python 3.11 or newer, Java 21 or newer and Maven; see CONTRIBUTING.md.

PYTHON ?= python3
BIN    := .venv/bin
DIR    ?= .stack
# Most of the time the tests wait: of two cores with as many workers, each was idle for more than half of it.
WORKERS ?= 3
# What is installed is compiled, as pip does it; a fresh clone is not, and where nobody may write bytecode never would be.
COMPILED = $(BIN)/python -m compileall -q headrace services ops .venv/lib

.PHONY: demo test compose-test soak bench-capture bench-big bench-views fuzz check format stack-up stack-down

demo: .venv/synced           ## the whole system from nothing; ONCE=1 stops everything at the end
	$(BIN)/headrace demo $(if $(ONCE),--once)

test: .venv/synced           ## all tests, by WORKERS=3 processes with real servers of their own; TESTS=tests/unit for some of them, in one
	$(if $(TESTS),,$(COMPILED))
	$(BIN)/python -m pytest -q --durations=25 $(or $(TESTS),-n $(WORKERS) --dist worksteal)

soak: .venv/synced           ## MINUTES=60 of seeded kills, outages, rebuilds and parked records under load; SEED=1 is the first seed
	$(BIN)/python tests/soak.py $(or $(MINUTES),60) $(or $(SEED),1)

fuzz: .venv/synced           ## histories drawn from SEEDS=1-10: others by 7,100-120, longer ones by STEPS=60; TESTS=tests/unit for some of them
	SEEDS=$(or $(SEEDS),1-10) $(BIN)/python -m pytest -q $$(grep -rl "fixtures.seeds import.* seeds" --include="test_*.py" $(or $(TESTS),tests))

bench-capture: .venv/synced  ## capture and Debezium in turn, on the same rows; ARGS="--quick --ours --only single"; see bench/README.md
	$(COMPILED) && $(BIN)/python -m bench $(ARGS)

bench-big: .venv/synced      ## memory and time of capture over ten million rows and transactions of a million changes; ARGS="--quick"
	$(COMPILED) && $(BIN)/python -m bench.big $(ARGS)

bench-views: .venv/synced    ## views from zero and live, against loaders that do only that and pgsync; ARGS="--quick --only search"
	$(COMPILED) && $(BIN)/python -m bench.views $(ARGS)

check: .venv/synced          ## style, types, walls, budgets, and that every test can be imported
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python ops/budgets.py
	$(BIN)/python -m pytest --collect-only -qqq > .venv/collected || (cat .venv/collected; exit 1)

compose-test: .venv/synced   ## docker-compose.yml for real: a kill, a rebuild, verify; says SKIPPED where there is no engine
	$(BIN)/python ops/compose_test.py

format: .venv/synced         ## wrap and sort as `make check` wants it
	$(BIN)/ruff format
	$(BIN)/ruff check --fix-only

stack-up: .venv/synced       ## Postgres, Kafka, Elasticsearch and Redis in $(DIR)
	$(BIN)/headrace stack up --dir $(DIR)

stack-down: .venv/synced
	$(BIN)/headrace stack down --dir $(DIR)

# uv comes by pip, so that nothing but Python is needed; it then brings .venv to what uv.lock says, and leaves consumers of one's own in it.
.venv/synced: uv.lock pyproject.toml $(wildcard */pyproject.toml */*/pyproject.toml)
	(test -x $(BIN)/uv && test -x $(BIN)/python) || $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv sync --quiet --frozen --inexact
	touch $@
