# Two commands matter: `make demo` and `make test`. Both start from nothing but Python 3.11+ and a package index.
SHELL  := /bin/bash
PYTHON ?= python3
VENV   := .venv
ORACLE := .oracle
# -qq: errors only. pip is chatty about links it does not use.
PIP    := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest
JOBS   ?= 2

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all bench lint format clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo      fine-tune a LoRA on a real model and data (6 to 10 minutes on 2 cores after the install)"
	@echo "make test      the tests; test-all adds the slow ones and the linters"
	@echo "make bench     the benchmarks (ARGS=--write puts their tables into docs/benchmarks.md)"
	@echo "make lint      ruff and mypy        make format   apply ruff's fixes and layout"
	@echo "make clean     remove the environments and caches of this folder"

# --- environments: a stamp file per step, so that a second run installs nothing ---

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trimtab needs Python 3.11 or newer; set PYTHON=...")'
	@echo "Making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch first and pinned: a bare `torch` pulls a CUDA build of several GB where a CPU build would do.
$(VENV)/.stamp-torch: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch"
	@$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-torch
	@echo "Installing trimtab[demo]"
	@$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.stamp-test: pyproject.toml $(VENV)/.stamp-torch
	@echo "Installing trimtab[test]"
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.stamp-demo

# peft is the oracle of tests/parity. It lives in a folder of its own: nothing else may import it.
$(ORACLE)/.stamp: constraints.txt $(VENV)/.stamp-torch
	@echo "Installing the parity oracle"
	@rm -rf $(ORACLE)
	@$(PIP) install --no-deps --target $(ORACLE) "$$(grep '^peft==' constraints.txt)"
	@touch $@

# --- verbs ---
# tests/as_peft is a process of its own: there the name `peft` means trimtab from the first import on.

demo: $(VENV)/.stamp-demo
	@$(VENV)/bin/trimtab demo $(ARGS)

test: $(VENV)/.stamp-test $(ORACLE)/.stamp
	$(PYTEST) -n $(JOBS) -m "not slow" tests --ignore=tests/parity --ignore=tests/as_peft $(ARGS)
	$(PYTEST) -n $(JOBS) -m "not slow" tests/as_peft $(ARGS)
	PYTHONPATH=$(ORACLE) $(PYTEST) -n $(JOBS) -m "not slow" tests/parity $(ARGS)

test-all: $(VENV)/.stamp-test $(ORACLE)/.stamp lint
	$(PYTEST) -n $(JOBS) tests --ignore=tests/parity --ignore=tests/as_peft $(ARGS)
	$(PYTEST) -n $(JOBS) tests/as_peft $(ARGS)
	PYTHONPATH=$(ORACLE) $(PYTEST) -n $(JOBS) tests/parity $(ARGS)

bench: $(VENV)/.stamp-test $(ORACLE)/.stamp
	@set -e; for script in bench/adapter_count.py bench/method_step.py bench/qlora.py; do echo "== $$script"; PYTHONPATH=$(ORACLE) $(VENV)/bin/python $$script $(ARGS); done

lint: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(ORACLE) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
