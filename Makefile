# make demo | test | check | kernels-check | lock
PYTHON ?= python3
BIN := .venv/bin
DEPENDS := pyproject.toml requirements.lock
PYTEST := $(BIN)/pytest -q -n logical --maxprocesses 4 --dist worksteal
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c requirements.lock

.PHONY: demo test check unit kernels-check lock clean

# The bundled model, every data-free format, one table and one picture.
demo: .venv/.demo
	$(BIN)/qjax compare --out results/demo

test: check unit

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python scripts/render_tables.py --check

# Compiling takes most of the time, and fusions through MLIR a third of it. What is
# marked `optimized` is compiled as users compile.
unit: .venv/.test
	XLA_FLAGS=--xla_cpu_use_fusion_emitters=false $(PYTEST) -m 'not optimized'
	$(PYTEST) -m optimized

# Kernels and plans, compiled for hardware that is not there, each run with the compiler
# named for it. These lie apart: beside JAX they would be started by every program.
# Counts are of one version of each only, for Python 3.11; later ones skip the check.
kernels-check: .venv/.kernels .venv/.test
	PYTHONPATH=.venv/libtpu $(BIN)/python kernels/bench/check.py --expect=tpu
	PYTHONPATH=.venv/cuda $(BIN)/python kernels/bench/check.py --expect=gpu
	$(BIN)/pytest -q tests/plan/test_command.py

# uv resolves for every supported Python at once; see CONTRIBUTING.md.
# torch brings its own exact CUDA pins, which must not bind the library.
lock: .venv/.test
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --upgrade \
	  --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
	  --index-strategy unsafe-best-match $(UV_FLAGS) -q -o .venv/lock
	grep -vE '^(torch|triton|cuda-.*|nvidia-.*)==' .venv/lock > requirements.lock

clean:
	rm -rf .venv results

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "qjax needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

# One pip call for everything: the peers would otherwise choose torch themselves.
.venv/.demo: $(DEPENDS) | .venv/bin/python
	$(INSTALL) -e .
	touch $@

.venv/.kernels: .venv/.demo kernels/bench/h200.txt
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then \
	  $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
	    -c requirements.lock --target .venv/libtpu libtpu && \
	  $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --upgrade \
	    --target .venv/cuda -r kernels/bench/h200.txt; fi
	touch $@

.venv/.test: $(DEPENDS) | .venv/bin/python
	$(INSTALL) -e '.[test,parity,eval]'
	touch $@
