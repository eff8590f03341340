# make demo: train small ViTs with different poolings on handwritten digits and compare them.
# make test: lint, types and tests. Both make the environment .venv first.
PYTHON ?= python3
PIP_FLAGS ?= --quiet
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/train
	$(BIN)/python -m eval.demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/train .venv/dev: .venv/%: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv runs
