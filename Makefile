# Sets everything up in .venv, then runs what is asked for. Needs only make and Python 3.11 or 3.12.
.DEFAULT_GOAL := help
.PHONY: help install install-gcp demo test slow lint benchmarks clean

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_FLAGS ?= -qq
USABLE = 'import importlib.util as u, sys; v = sys.version.split()[0]; print(v if v[:5] not in ("3.11.", "3.12.") else \
	"usable" if u.find_spec("venv") and u.find_spec("ensurepip") else v + " without venv or ensurepip")'
NEEDS_CUDA = 'import importlib.metadata as m, sys; sys.exit(not any("cuda" in r for r in m.requires("torch")))'

# A .venv made with another interpreter than the one that is asked for is made anew.
ifneq ($(PYTHON),$(and $(PYTHON),$(file <.venv/.python)))
.PHONY: .venv/.packages
endif

help:
	@echo 'make demo        a short study on this machine, from nothing to the best model'
	@echo 'make test        lint, types and the fast tests'
	@echo 'make slow        the slow tests'
	@echo 'make lint        lint and types alone'
	@echo 'make benchmarks  every script in tests/benchmarks'
	@echo 'make install     only set up .venv, which all of the above do by themselves'
	@echo 'make install-gcp adds what Ray needs for clusters on Google Cloud'
	@echo 'make clean       remove .venv and all caches'
	@echo 'make PYTHON=/path/to/python3.12 test names the interpreter; make PIP_FLAGS=-v install shows what pip does.'

demo: install
	$(BIN)/tune-service demo

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

# They wait more than they work: two files at a time.
slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --timeout=900

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: install
	@set -e; for script in $(sort $(wildcard tests/benchmarks/bench_*.py)); do \
		echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf .venv build .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install-gcp: install
	@sed -n 's/^#gcp //p' requirements.lock | $(PIP) install $(PIP_FLAGS) --no-deps -r /dev/stdin

# Both stamps come last in their recipes: an interrupted install does not count. The packages are installed from
# scratch, so that nothing of an older lock stays; a change of pyproject.toml alone takes seconds.
install: .venv/.installed

.venv/.installed: .venv/.packages pyproject.toml
	@$(PIP) install $(PIP_FLAGS) --no-deps --no-build-isolation --no-compile --editable .
	@$(BIN)/python -m compileall -qq tune_service trainables search_spaces || true
	@# With no resolution at work, this is what finds a pin that does not fit. ColossalAI's own pins are known not to.
	@if $(PIP) check | grep -v -e '^colossalai ' -e '^No broken'; then \
		echo 'requirements.lock: the packages named above do not fit each other.' >&2; exit 1; fi
	@touch $@

# pip compiles bytecode on one core, compileall on all, and leaving out the packages' own tests. It writes even where
# PYTHONDONTWRITEBYTECODE is set, and ends with an error for a file in newer syntax (torch has one for Python 3.12).
.venv/.packages: requirements.lock
	@python=; found=; for candidate in $(or $(PYTHON),python3.11 python3.12 python3); do \
		is=$$($$candidate -c $(USABLE) 2>/dev/null) || is='not found, or does not run'; \
		if [ "$$is" = usable ]; then python=$$candidate; break; fi; \
		found="$$found  $$candidate: $$is\n"; done; \
	if [ -z "$$python" ]; then \
		printf 'Python 3.11 or 3.12 with its venv module is needed. Found:\n%b' "$$found" >&2; \
		echo 'Install one (Debian: python3.11-venv) or name one: make PYTHON=/path/to/python3.11' >&2; exit 1; fi; \
	echo "Setting up .venv with $$python: one to two minutes; longer where torch is the CUDA build (about 3 GB)"; \
	$$python -m venv --clear .venv && echo $$python >.venv/.python
	@$(PIP) install $(PIP_FLAGS) --no-compile $$(grep -E '^(pip|setuptools)==' requirements.lock)
	@$(PIP) install $(PIP_FLAGS) --no-compile --no-deps --no-build-isolation -r requirements.lock
	@if $(BIN)/python -c $(NEEDS_CUDA); then sed -n 's/^#cuda //p' requirements.lock | \
		$(PIP) install $(PIP_FLAGS) --no-compile --no-deps -r /dev/stdin; fi
	@$(BIN)/python -W ignore -m compileall -qq -j 0 -x /tests/ .venv/lib || true
	@touch $@
