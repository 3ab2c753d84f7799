# Everything runs from a virtual environment in .venv, made here with the versions of
# constraints.txt. All it takes is Python 3.11 or newer; pip's own configuration is respected.
#   make demo               compile the bundled model and let it write
#   make test               what continuous integration runs
#   make help               the rest

PYTHON ?= python3
JOBS ?= 2
PROMPT ?= If the argument is

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
# Without a C compiler on the machine, one comes as a wheel.
ZIG := $(if $(shell command -v cc || command -v gcc || command -v clang),,,zig)
# Newer ones have no matrix instructions for these GPUs, and only one can be imported.
OLD_TRITON := 3.2.0
PIP_INSTALL := set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check \
	--progress-bar off -c constraints.txt
SHOW_DOWNLOADS := { grep --line-buffered '^ *Downloading' || true; }

.PHONY: help demo test quick lint types format bench clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       compile the bundled model and let it write (PROMPT='...')"
	@echo "make test       lint, types and all tests (JOBS=$(JOBS) at a time)"
	@echo "make quick      the tests that are not slow"
	@echo "make lint       ruff: rules and format        make format    apply them"
	@echo "make types      pyright"
	@echo "make bench      measure against the peers that are installed"
	@echo "make clean      remove what was built         make distclean also $(VENV)"
	@echo "PYTHON=$(PYTHON) is used to make $(VENV)"

demo: $(VENV)/.compile
	@mkdir -p build
	$(BIN)/dilu compile examples/stdlib-moe -o build/stdlib-moe.dilu
	@echo; echo "==> what the model writes after: $(PROMPT)"
	$(BIN)/dilu run build/stdlib-moe.dilu --prompt "$(PROMPT)" --max-tokens 64 \
	    --temperature 0.5 --top-p 0.9 --seed 2

test: lint types
	$(BIN)/pytest -n $(JOBS) --dist loadfile

quick: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# Stamps, so that an unchanged environment costs nothing. The one for development also does for
# the demo, whichever was made first.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "error: no $(PYTHON) here; dilu needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1); dilu needs Python 3.11 or newer" \
	        "(make PYTHON=python3.12)" >&2; exit 1; }
	@echo "==> $(VENV), with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.compile: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "==> dilu and what compiling needs (the first time, PyTorch is a large download)"
	@$(PIP_INSTALL) -e '.[compile$(ZIG)]' | $(SHOW_DOWNLOADS)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "==> dilu and what developing needs (the first time, PyTorch is a large download)"
	@$(PIP_INSTALL) -e '.[dev$(ZIG)]' | $(SHOW_DOWNLOADS)
	@echo "==> Triton $(OLD_TRITON), which compiles for cuda:70 and cuda:75"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    --no-deps --upgrade --target $(VENV)/share/dilu/triton-3.2 triton==$(OLD_TRITON) \
	    | $(SHOW_DOWNLOADS)
	@touch $@ $(VENV)/.compile
