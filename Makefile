PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# What says in about a minute whether the numbers still stand.
NUMERICS := $(addprefix tests/test_,factors.py signals.py fisher.py matrix_free.py dynamics.py infinite.py ledger.py)

.PHONY: help book chapter lab check numerics test certify sync mutate bench record clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*##/ {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(STAMP)  ## run the chapters that have no run yet, and build the pages
	$(BIN)/python book/_ext/chapters.py
	$(BIN)/jupyter-book build .
	@echo "Read it: open _build/html/index.html"

chapter: $(STAMP)  ## run and render one chapter: make chapter C=13 (after make book)
	@test -n "$(C)" || { echo "which one? make chapter C=13"; exit 2; }
	$(BIN)/python book/_ext/chapters.py $(C)
	$(BIN)/jupyter-book build .
	@echo "Read it: open _build/html/$$(ls notebooks/$(C)*.md | sed 's/md$$/html/')"

lab: $(STAMP)  ## open the chapters as notebooks that save back to their .md
	JUPYTER_CONFIG_PATH=book/_ext/lab $(BIN)/jupyter lab

check: $(STAMP)  ## lint, and the numerics, in about a minute
	$(BIN)/python notebooks/sync.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -x -q $(NUMERICS)

numerics:
	@echo $(NUMERICS)

test: $(STAMP)  ## all tests
	$(BIN)/python notebooks/sync.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

certify:  ## the findings that are shown in exact arithmetic; needs Python alone
	@set -e; for file in book/certificates/*.py; do $(PYTHON) -I $$file; done

mutate: $(STAMP)  ## break formulas on purpose, one at a time, and see who notices (about an hour)
	$(BIN)/python tests/mutate.py

bench: $(STAMP)  ## time ngdcore beside other libraries, which are installed apart (half an hour)
	$(BIN)/python benchmarks/peers.py

record: $(STAMP)  ## run chapters at the papers' sizes, unless a run of this code is kept (hours)
	$(BIN)/python -m ngdcore record --scale paper

sync: $(STAMP)  ## make the .ipynb beside each chapter from its .md
	$(BIN)/python notebooks/sync.py

clean:  ## remove what was built
	rm -rf _build

# torch first and alone: resolved together with the rest, pip may pick another build of it.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@
