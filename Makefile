# make toy    the whole story on a CPU: install, draw, prepare, train REG, sample, score
# make test   install, ruff, and the whole test suite
# Both install into .venv; VENV=DIR uses (and completes) an existing environment instead.
VENV ?= .venv
PYTHON3 ?= python3
PYTHON := $(abspath $(VENV))/bin/python

.PHONY: toy test
toy: $(VENV)/.installed
	PYTHON=$(PYTHON) bash toy/run.sh

test: $(VENV)/.installed-tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest

$(VENV)/.installed: requirements.txt
	test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(PYTHON) -m pip install -r tests/requirements.txt
	touch $@
