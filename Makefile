# make demo: train small ViTs with different poolings on handwritten digits and compare them; then the accelerator model.
# make test: lint, types and tests, those of the GPU kernels among them, which need no GPU. Both make the environment .venv first.
PYTHON ?= python3
PIP_FLAGS ?= --quiet
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/train
	$(BIN)/python -m eval.studies.demo
	$(BIN)/python -m eval.studies.accelerator

test: .venv/dev .venv/cuda
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m interpreter tests/test_kernels_interpreted.py
	PYTHONPATH=.venv/cuda $(BIN)/python -m pytest -n 2 -m "compiled or lowering" tests/test_kernels_compiled.py tests/test_kernels_lowered.py
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/train .venv/dev: .venv/%: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@

# The CUDA plugin of the same JAX, without CUDA itself, lets kernels be lowered where there is no GPU. In a folder of its own: only those tests see it.
.venv/cuda: .venv/dev
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && \
	for cuda in 12 13; do \
	    $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target $@ "jax-cuda$$cuda-plugin==$$version" && break; \
	done
	@test -d $@ && touch $@

clean:
	rm -rf .venv runs
