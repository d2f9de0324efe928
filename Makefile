# Two commands on a fresh clone: `make run` and `make test`. What they need is set up once, into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
TORCH := torch==2.13.0
SPEC ?= jobs/quickstart.yaml
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install run test tests lint format bench lock clean

help: ## Show the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

install: .venv/.runs ## Set up .venv with what a run needs

run: .venv/.runs ## Run the quickstart, or SPEC=jobs/...
	@$(BIN)/poise run $(SPEC)

test: .venv/.develops ## Lint, and run every test
	@$(MAKE) --no-print-directory -j 2 lint tests

tests: .venv/.develops
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=25 $(TESTS)

lint: .venv/.develops ## ruff, mypy and the walls between the rooms
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	PYTHONPATH=platform $(BIN)/lint-imports --no-cache

format: .venv/.develops ## Format the code
	$(BIN)/ruff format -q .
	$(BIN)/ruff check -q --fix .

bench: .venv/.develops ## Measure speed beside what a user would run instead
	@$(PIP) install -q --no-deps torchattacks==3.5.1  # a peer to measure beside; what it declares would not fit
	$(BIN)/python tests/benchmarks/run.py

lock: ## Write the lock files anew, from pyproject.toml
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q $(TORCH) && .venv-lock/bin/pip install -q -e '.[all]'
	.venv-lock/bin/python cluster/lock.py requirements.lock "a run"
	.venv-lock/bin/pip install -q -e '.[all,dev]'
	.venv-lock/bin/python cluster/lock.py requirements-dev.lock "\`make test\` and \`make lint\` beyond those of a run" requirements.lock
	rm -rf .venv-lock

clean: ## Remove .venv and caches; runs are kept
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build

.venv/.runs: requirements.lock pyproject.toml
	@echo "setting up .venv (once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install -q $(TORCH)
	@$(PIP) install -q --no-deps -r requirements.lock
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

.venv/.develops: .venv/.runs requirements-dev.lock
	@$(PIP) install -q --no-deps -r requirements-dev.lock
	@touch $@
