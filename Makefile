# Everything runs in .venv, which is made when first needed. Wanted: Python 3.11 or newer, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test lint golden clean distclean

help: ## say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(READY) ## run the main job: a byte-level Longformer, plain PyTorch against gossamer
	$(BIN)/python examples/longformer_bytes.py

test: $(READY) ## run the test suite; ARGS="-k align" passes options on to pytest
	$(BIN)/pytest -n 2 $(ARGS)

lint: $(READY) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

golden: $(READY) ## rewrite the golden files; read their diff before you commit it
	$(BIN)/pytest -k golden --update-golden

clean: ## remove what builds and test runs leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing gossamer and its development tools into $(VENV) (2.5 GB, a minute or two)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "expected Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
