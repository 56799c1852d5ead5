# make demo | test | lint | bench | soak: each sets up .venv first, then does what it says.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
SOURCES := setup.py pyproject.toml $(CSRC)

.PHONY: demo test test-oldest families lint bench soak clean

demo: $(READY)
	$(BIN)/pcx demo

test: $(READY)
	$(BIN)/python -m pytest tests

# The oldest timm that pcx supports; the environment holds the newest.
test-oldest: $(READY)
	test -d .oldest/timm || $(BIN)/pip install --quiet --no-deps --target .oldest timm==1.0.24
	PYTHONPATH=.oldest $(BIN)/python -m pytest -W ignore::FutureWarning -W ignore::DeprecationWarning \
		tests/models tests/backbones tests/checkpoints

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	PYTHONPATH=. $(BIN)/mkdocs build --strict --quiet
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks

# Kills training, scoring, condensing, searching and saving 500 times; about half an hour.
soak: $(READY)
	$(BIN)/python tests/soak.py --kills 500

# Runs every cell of the table of families, and writes docs/families.md; about 15 minutes.
families: $(READY)
	PYTHONPATH=tests $(BIN)/python tests/matrix.py

# torch first: the extension is built against it.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja pybind11 "torch>=2.11" torchvision
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info pcx/_C*.so
