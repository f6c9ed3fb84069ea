# make demo    a real model, its heads profiled, the dashboard on it (HOST, PORT and NO_SERVE=1 are honoured)
# make test    ruff, mypy and every test that a CPU can run, in .venv
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8050
BROWSER_TESTS ?= yes

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# Threads that spin while they wait make two busy processes on two cores some twenty times slower.
export OMP_WAIT_POLICY := PASSIVE
unexport NO_SERVE

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: demo
demo: venv ## profile SmolLM2-135M on this machine and open the dashboard on it
	$(BIN)/headscope demo --host $(HOST) --port $(PORT) $(if $(NO_SERVE),--no-serve)

.PHONY: venv
venv: $(VENV)/.installed ## make .venv from pyproject.toml and constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "headscope needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch==$(TORCH)
	$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

.PHONY: test
test: $(VENV)/.installed-test types chromium ## lint, types, and every test that a CPU can run
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONSAFEPATH=1 $(BIN)/python -m pytest $(if $(filter-out yes,$(BROWSER_TESTS)),-m "not browser")

.PHONY: lint
lint: $(VENV)/.installed-test types ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/mypy

# The browser tests drive the system's Chromium; playwright brings the driver only.
.PHONY: chromium
chromium:
	@if [ "$(BROWSER_TESTS)" != yes ] || command -v chromium chromium-browser google-chrome >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "no Chromium: install it, or run make test BROWSER_TESTS=no" >&2; exit 1; fi; \
	root=""; [ "$$(id -u)" = 0 ] || root=sudo; \
	$$root apt-get update -qq && $$root apt-get install -y -qq --no-install-recommends chromium >/dev/null

# The layout as installed, in links: what type checkers read, and what runs the code without an install.
.PHONY: types
types: ## make the link tree .types/headscope
	@mkdir -p .types/headscope
	@for path in headscope/*; do name=$$(basename $$path); [ $$name = __pycache__ ] || ln -sfn ../../$$path .types/headscope/$$name; done
	@for name in probes interventions kernels app; do ln -sfn ../../$$name .types/headscope/$$name; done
	@find .types -xtype l -delete

.PHONY: clean
clean: ## remove what was built; the runs and the model cache stay
	rm -rf $(VENV) .types build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
