# On a fresh machine with Python 3.11 or newer, each target does its own set-up, in .venv.
#   make demo    the bundled model and its CLT through nnsight and TransformerLens, offline
#   make test    the tests
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready

.PHONY: demo test docs docs-serve lint clean

demo: $(READY)
	$(BIN)/clt demo

# On as many processes as there are cores, each of one thread: most tests are small, and threads would only wait.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

docs: $(READY)
	$(BIN)/mkdocs build --strict

docs-serve: $(READY)
	$(BIN)/mkdocs serve

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# torch by itself first: beside an open range, pip would look at other builds of it.
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,docs,lint]'
	@touch $@

clean:
	rm -rf $(VENV) site demo-report
