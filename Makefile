# Everything a checkout can do, on a machine with only Python and make: `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# One thread a worker: the workers already fill the cores, and torch's own threads would only compete with them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help demo test quick slow docs package lint clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-bench ## Train on real digits with and without SAM; print a table, write results/
	$(BIN)/python -m benchmarks demo $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (ARGS="-k asam" narrows, JOBS=4 uses more cores; "make quick" is a part)
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

quick: $(VENV)/.installed-dev ## Run the quick part of the tests: every optimizer, its parts, the steps
	$(PYTEST) -n $(JOBS) --dist worksteal tests/variants tests/parts tests/numerics tests/replay tests/step/test_conformance.py $(ARGS)

slow: $(VENV)/.installed-dev ## Run the tests that take tens of seconds each
	$(PYTEST) -m slow $(ARGS)

docs: $(VENV)/.installed-docs ## Build the documentation site into site/ (strict, without a network)
	$(BIN)/zensical build --strict --clean

package: $(VENV)/.installed-dev ## Build the sdist and the wheel, install each, import from elsewhere
	$(PYTEST) -m slow tests/project/test_packaging.py $(ARGS)

lint: $(VENV)/.installed-dev ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy samopt

clean: ## Remove the environment, builds and caches; results/ stays
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 14) else \
	"samopt needs Python 3.10 to 3.13; $(PYTHON) is %d.%d; name another, as in: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml setup.cfg constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[$*]"
	@touch $@
