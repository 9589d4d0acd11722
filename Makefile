PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: book test certify sync clean

book: $(STAMP)
	$(BIN)/python book/_ext/chapters.py
	$(BIN)/jupyter-book build .
	@echo "Read it: open _build/html/index.html"

test: $(STAMP)
	$(BIN)/python notebooks/sync.py --check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

# The findings that are shown in exact arithmetic. Needs Python alone.
certify:
	@set -e; for file in book/certificates/*.py; do $(PYTHON) -I $$file; done

# The .ipynb beside each chapter, made from its .md.
sync: $(STAMP)
	$(BIN)/python notebooks/sync.py

clean:
	rm -rf _build

# torch first and alone: resolved together with the rest, pip may pick another build of it.
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -e .
	@touch $@
