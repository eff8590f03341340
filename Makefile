# make demo: train small ViTs with different poolings on handwritten digits and compare them; then the accelerator model.
# make check: lint, formatting, types and the fast tests.
# make test: lint, formatting, types and all tests that are not marked slow, those of the GPU kernels among them, which need no GPU.
# Each makes the environment .venv first. Compiled programs are kept in .jax_cache.
PYTHON ?= python3
PIP_FLAGS ?= --quiet --no-compile --prefer-binary
BIN := .venv/bin
# A file stays on one worker, which has compiled its programs; the costly files come first.
TESTS = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The ptxas that comes with JAX, before any that is on this machine.
JAX_PTXAS = PATH="$$(echo $(CURDIR)/.venv/cuda/nvidia/*/bin):$$PATH"

.PHONY: demo check test lint clean

demo: .venv/train
	$(BIN)/python -m eval.studies.demo
	$(BIN)/python -m eval.studies.accelerator

check: lint
	$(TESTS) --fast

# Wheels are downloaded while mypy computes.
test: .venv/dev
	$(MAKE) -j4 lint docs .venv/cuda .venv/pjrt
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m "interpreter and not slow" tests/test_kernels_interpreted.py
	$(JAX_PTXAS) JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=.venv/cuda:.venv/pjrt $(BIN)/python -m pytest -n 2 -m "(compiled or lowering or assembled or aot or ptx) and not slow" tests/test_kernels_compiled.py tests/test_kernels_amd.py tests/test_model_kernels.py tests/test_kernels_lowered.py tests/test_kernels_assembled.py tests/test_kernels_partitioned.py tests/test_kernels_ptx.py
	$(TESTS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

# The extra dev has train and docs in it.
.venv/train .venv/dev .venv/docs: .venv/%: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$*]'
	@touch $@ $(if $(filter dev,$*),.venv/train .venv/docs)

# Parts of the CUDA packages of the same JAX, without CUDA itself, for tests where there is no GPU; each in a folder of its own, which only those tests see.
# .venv/cuda lowers kernels and assembles them: the plugin, and the ptxas that comes with it. .venv/pjrt (460 MB) is XLA's compiler.
.venv/cuda: .venv/dev Makefile
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && rm -rf $@ && \
	for wheels in "jax-cuda12-plugin==$$version nvidia-cuda-nvcc-cu12==12.*" "jax-cuda13-plugin==$$version nvidia-cuda-nvcc==13.*"; do \
	    $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $@ $$wheels && break; \
	done
	@test -d $@ && touch $@

.venv/pjrt: .venv/dev Makefile
	version=$$($(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))') && rm -rf $@ && \
	for cuda in 12 13; do \
	    $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $@ "jax-cuda$$cuda-pjrt==$$version" && break; \
	done
	@test -d $@ && touch $@

# XLA's compiler for TPUs, of the same JAX (200 MB to download, 680 MB), for --dry-run --on v5e:8 and its tests, which make test skips:
# PYTHONPATH=.venv/tpu .venv/bin/python -m pytest tests/test_train_dry_run.py -k tpu
.venv/tpu: .venv/dev Makefile
	rm -rf $@ && $(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $@ "$$($(BIN)/python -c 'from importlib.metadata import requires; print(next(r.partition(";")[0] for r in requires("jax") if r.startswith("libtpu")))')"
	@touch $@

clean:
	rm -rf .venv .jax_cache runs

# make docs: the documentation site in site/, built strictly: a broken link or an unknown name is an
# error (but not with --quiet, which lets warnings pass). Part of make test.
.PHONY: docs clean-docs
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: clean-docs
clean-docs:
	rm -rf site
