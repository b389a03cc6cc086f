# Two commands do everything on a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-all lint docs install clean wheel

install: $(STAMP)

# torch first and alone: whatever build the index offers (the CPU's is enough) stays, and nothing pulls another in;
# torch-fidelity without torchvision, whose builds do not load beside every build of torch
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[metrics,multilingual,quantize,app,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps torch-fidelity
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fewstep demo --out demo

# every recipe, backbone, export form, kill and resume once; `test-slow` is the rest that CI runs, `test-all` also the
# remaining products of parameters
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not exhaustive"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "slow and not exhaustive" --durations 40 $(LIMIT)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the site, from docs/ and the docstrings in site/: sources are read, nothing of the project is imported or installed
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

# the wheel in dist/, tried in an empty environment outside the checkout
wheel:
	PYTHON=$(PYTHON) .ci/wheel

clean:
	rm -rf $(VENV) build dist site
