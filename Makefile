# What you need: GNU make, and Python 3.11 or newer with its venv module. Works from any folder
# (make -C DIR run, make -f DIR/Makefile run); PYTHON=/path/to/python names another interpreter.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:

# The folder of this file, which may hold spaces (that is why no make function takes it apart).
QUOTED := '$(subst ','\'',$(MAKEFILE_LIST))'
ROOT := $(shell cd "$$(dirname "$$(printf '%s' $(QUOTED) | sed 's/^ //')")" && pwd -P)

ifneq ($(ROOT),$(shell pwd -P))

GOALS := $(or $(MAKECMDGOALS),help)
.PHONY: $(GOALS)
$(GOALS):
	@exec $(MAKE) --no-print-directory -C "$(ROOT)" $@

else

# Compiled modules are kept: an hb that compiles all that it imports takes 3 s to start, instead of 0.8.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
RUNS := .venv/runs
READY := .venv/ready
COMPARED := .venv/compared

.PHONY: help setup run test test-long lint types check api-check bench bench-gateway chaos flips mutants docs constraints clean

help: ## these lines
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 20

setup: $(READY) ## .venv with everything, from constraints.txt
	@echo 'ready: $(BIN)/hb'

run: $(RUNS) ## the whole system with a sample, until Ctrl-C (ARGS=--once: ends after the sample)
	@exec $(BIN)/hb up $(ARGS)

test: $(READY) ## all tests (ARGS="-k name" and the like go to pytest; --fast leaves out the slow ones)
	@exec $(BIN)/python -m pytest -n auto --dist worksteal --durations=20 $(ARGS)

test-long: $(READY) ## all tests, costly properties with ten times the examples, others each time
	@exec $(BIN)/python -m pytest -n auto --dist worksteal --hypothesis-profile=long \
	  --timeout=3600 $(ARGS)

lint: $(READY) ## format, lint rules and layers
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

types: $(READY) ## mypy, strict
	@exec $(BIN)/mypy

api-check: $(READY) ## ask a gateway whether it does what /openapi.json says, for most of a minute
	@exec $(BIN)/python -m pytest hb_assets_tests/gateway/conformance.py $(ARGS)

check: lint types test api-check ## all that CI asks for

bench: $(COMPARED) ## drain and consolidation against floors and alternatives, half an hour (ARGS=--quick: shorter)
	@exec $(BIN)/python -m bench.engines $(ARGS)

bench-gateway: $(READY) ## the gateway against FastAPI and its own targets, half an hour (ARGS=--quick: shorter)
	@exec $(BIN)/python -m bench.gateway $(ARGS)

chaos: $(READY) ## kill everything for a quarter of an hour, lose nothing (ARGS=--short: under 2 minutes)
	@exec $(BIN)/python -m chaos $(ARGS)

flips: $(READY) ## flip bits and cut files of a lake, a thousand times: no wrong answer (ARGS="--count 100": fewer)
	@exec $(BIN)/python -m chaos.flips $(ARGS)

mutants: $(READY) ## change lines one at a time: a test must notice each, ten minutes (ARGS=--short: a quarter)
	@exec $(BIN)/python -m mutants $(ARGS)

docs: $(READY) ## the generated pages
	@$(BIN)/python -m hb_assets.core.settings_page > docs/settings.md

# Resolved for the oldest Python that we support: what it can install, newer ones can too.
constraints: $(READY) ## renew constraints.txt: the newest releases that pyproject.toml allows
	@new=$$(mktemp) && trap 'rm -f "$$new"' EXIT && $(PIP) uv && \
	{ echo '# Every package that make setup and make bench install. Renew: make constraints'; \
	  echo uv | $(BIN)/uv pip compile --quiet --system-certs --upgrade --extra dev --extra bench --python-version 3.11 \
	    --python-platform linux --no-annotate --no-header --no-emit-index-url \
	    --no-emit-find-links pyproject.toml -; } > "$$new" && \
	cp "$$new" constraints.txt

# Installs this tree with so many extras. uv takes seconds where pip takes a minute; pip does it where
# uv can't be had, or doesn't find the way to the packages that pip's configuration tells.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input --constraint constraints.txt
install = { [ -x $(BIN)/uv ] || $(PIP) uv 2>/dev/null; } && $(BIN)/uv pip install --quiet --system-certs \
  --python $(BIN)/python --constraint constraints.txt --editable '$(1)' 2>/dev/null || $(PIP) --editable '$(1)'

# What make bench compares with, beside what make setup installs.
$(COMPARED): $(READY)
	@echo "installing what is compared with" >&2; $(call install,.[bench]) && touch $@

# What tests, lint and types need, beside what runs.
$(READY): $(RUNS)
	@echo "installing what tests need" >&2; $(call install,.[dev]) && pwd -P > $@

clean: ## remove .venv and caches; .hb (your data) stays
	rm -rf .venv build *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# A .venv is bound to its place and its Python: a moved folder or a Python that is gone needs another.
HOLDS := [ "$$(cat $(RUNS))" = "$$(pwd -P)" ] && $(BIN)/python -c 'import pip'
ifneq ($(shell { $(HOLDS); } 2>/dev/null && echo yes),yes)
.PHONY: $(RUNS)
endif

# The newest Python that can make a venv; pyenv's shims and the like are tried, not trusted.
$(RUNS): pyproject.toml setup.py constraints.txt
	@found=; lame=; \
	for python in $${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 python}; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if "$$python" -c 'import venv, ensurepip' 2>/dev/null; then found=$$python; break; fi; \
	  lame=$${lame:-$$python}; \
	done; \
	if [ -z "$$found" ] && [ -n "$$lame" ]; then \
	  version=$$("$$lame" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "make: $$lame has no venv module; on Debian and Ubuntu: apt-get install python$$version-venv" >&2; \
	  exit 2; \
	elif [ -z "$$found" ]; then \
	  echo "make: no Python 3.11 or newer on PATH; install one, or name it: make PYTHON=/path/to/python3 setup" >&2; \
	  exit 2; \
	fi; \
	if ! { $(HOLDS); } 2>/dev/null; then \
	  "$$found" -m venv --clear .venv || exit 2; \
	fi; \
	echo "setting up .venv with $$($(BIN)/python --version): a quarter of a minute, by pip alone one or two" >&2; \
	$(call install,.) && pwd -P > $@

endif
