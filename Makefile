# make toy      the whole path on a CPU: install, draw a data set, prepare, train REG, sample, score
# make toy-t2i  the same from captions: text to image
# make compare  SiT, REPA and REG side by side on the toy: see docs/miniature.md
# make test     install, ruff, and the whole test suite
# All install into .venv; VENV=DIR uses (and completes) an existing environment instead.
VENV ?= .venv
PYTHON3 ?= python3
PYTHON := $(abspath $(VENV))/bin/python

.PHONY: toy toy-t2i compare test
toy: $(VENV)/.installed
	PYTHON=$(PYTHON) bash toy/run.sh

toy-t2i: $(VENV)/.installed
	PYTHON=$(PYTHON) bash toy/run-t2i.sh

compare: $(VENV)/.installed
	PYTHON=$(PYTHON) bash toy/compare.sh --scale cpu

test: $(VENV)/.installed-tests
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

$(VENV)/.installed: requirements.txt
	test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install -r requirements.txt
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(PYTHON) -m pip install -r tests/requirements.txt
	touch $@
