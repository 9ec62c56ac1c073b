# Two commands matter: `make demo` and `make test`. Both start from nothing but Python 3.11+ and a package index.
SHELL  := /bin/bash
PYTHON ?= python3
# An environment each: neither the demo nor the tests see what the other installed.
VENV   := .venv
DEMO   := .venv-demo
ORACLE := .oracle
# -qq: errors only. pip is chatty about links it does not use.
PIP    := bin/python -m pip -qq --disable-pip-version-check
PYTEST := $(VENV)/bin/python -m pytest
JOBS   ?= 2

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo demo-tasks test test-all fresh bench lint format clean help
.DELETE_ON_ERROR:

help:
	@echo "make demo      fine-tune a LoRA on a real model and data (10 to 15 minutes on 2 cores after the install)"
	@echo "make demo-tasks    three tasks trained at once on one model, and one batch that all of them answer"
	@echo "make test      the tests (12 to 30 minutes on 2 cores); test-all adds the slow ones and the linters"
	@echo "make fresh     start as on a new machine: make demo on 8 rows and a plain install, with empty caches"
	@echo "make bench     the benchmarks (ARGS=--write puts their tables into docs/benchmarks.md)"
	@echo "make lint      ruff and mypy        make format   apply ruff's fixes and layout"
	@echo "make clean     remove the environments and caches of this folder"

# --- environments: a stamp file per step, so that a second run installs nothing ---

# torch first and pinned: a bare `torch` pulls a CUDA build of several GB where a CPU build would do.
%/.stamp-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trimtab needs Python 3.11 or newer; set PYTHON=...")'
	@echo "Making the environment $* and installing torch"
	@test -x $*/bin/pip || $(PYTHON) -m venv $*
	@$*/$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(DEMO)/.stamp: pyproject.toml $(DEMO)/.stamp-torch
	@echo "Installing trimtab[demo]"
	@$(DEMO)/$(PIP) install -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.stamp: pyproject.toml $(VENV)/.stamp-torch
	@echo "Installing trimtab[test]"
	@$(VENV)/$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

# peft is the oracle of tests/parity. It lives in a folder of its own: nothing else may import it.
$(ORACLE)/.stamp: constraints.txt $(VENV)/.stamp-torch
	@echo "Installing the parity oracle"
	@rm -rf $(ORACLE)
	@$(VENV)/$(PIP) install --no-deps --target $(ORACLE) "$$(grep '^peft==' constraints.txt)"
	@touch $@

# --- verbs ---
# tests/as_peft is a process of its own: there the name `peft` means trimtab from the first import on.

demo: $(DEMO)/.stamp
	@$(DEMO)/bin/trimtab demo $(ARGS)

demo-tasks: $(DEMO)/.stamp
	@$(DEMO)/bin/trimtab demo --tasks $(ARGS)

test: $(VENV)/.stamp $(ORACLE)/.stamp
	$(PYTEST) -n $(JOBS) -m "not slow" tests --ignore=tests/parity --ignore=tests/as_peft $(ARGS)
	$(PYTEST) -n $(JOBS) -m "not slow" tests/as_peft $(ARGS)
	PYTHONPATH=$(ORACLE) $(PYTEST) -n $(JOBS) -m "not slow" tests/parity $(ARGS)

test-all: $(VENV)/.stamp $(ORACLE)/.stamp lint
	$(PYTEST) -n $(JOBS) tests --ignore=tests/parity --ignore=tests/as_peft $(ARGS)
	$(PYTEST) -n $(JOBS) tests/as_peft $(ARGS)
	PYTHONPATH=$(ORACLE) $(PYTEST) -n $(JOBS) tests/parity $(ARGS)

fresh:
	@PYTHON=$(PYTHON) tools/fresh.sh

bench: $(VENV)/.stamp $(ORACLE)/.stamp
	@set -e; for script in bench/layer_forward.py bench/adapter_count.py "bench/adapter_count.py --real" bench/method_step.py "bench/method_step.py --all-linear" bench/qlora.py bench/step.py "bench/step.py --dropout 0.05" "bench/step.py --dtype bfloat16" bench/decode.py bench/mixed_generation.py bench/many_jobs.py bench/adapter_store.py bench/end_to_end.py "bench/step.py --grid"; do echo "== $$script"; PYTHONPATH=$(ORACLE) OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python $$script $(ARGS); done

lint: $(VENV)/.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) $(ORACLE) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
