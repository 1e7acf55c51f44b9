# `make` lists the targets. Each does the set-up that it needs.

PYTHON  ?= $(shell for python in python3.11 python3; do $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
VENV    ?= .venv
WORKERS ?= 2
CONFIG  ?= demo
RUN     ?= runs/$(CONFIG)
ARGS    ?=

INSTALLED := $(VENV)/.installed
BIN       := $(abspath $(VENV))/bin
# DeepSpeed looks for ninja on PATH.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-golden test-matrix lint train check eval chat export bench clean

help: ## list the targets
	@echo 'make TARGET [CONFIG=$(CONFIG)] [RUN=runs/CONFIG] [ARGS="key=value --option"] [PYTHON=python3.11] [VENV=.venv]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## make the virtual environment and install everything into it (nothing to do when it is up to date)

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make setup: no Python >= 3.11, < 3.13 was found; name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes and about 2 GB the first time"
	@$(PYTHON) -m venv $(VENV)
	@# torch is named so that a CPU build (2.13.0+cpu) among pip's links satisfies it
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt "torch==2.13.0" -e ".[all,dev]"
	@touch $@

demo: $(INSTALLED) ## train a small VLM on drawn scenes, score it, ask it, export it: some 6 minutes on 2 cores
	@$(BIN)/vlm demo $(ARGS)

test: $(INSTALLED) ## unit tests and golden cases, on WORKERS processes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/golden -q -n $(WORKERS) --dist loadfile $(ARGS)

test-golden: $(INSTALLED) ## the reference tensors of ../shared/golden, or of the folder VLM_GOLDEN; prints why cases were skipped
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/golden -q -rs $(ARGS)

test-matrix: $(INSTALLED) ## the long tests: combinations of parts, the demo, the wheel
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/matrix -q -rs $(ARGS)

lint: $(INSTALLED) ## ruff (rules and format) and basedpyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

train: $(INSTALLED) ## train CONFIG; ARGS are overrides and options of `vlm train`
	@$(BIN)/vlm train $(CONFIG) $(ARGS)

check: $(INSTALLED) ## say everything about CONFIG that can be known without weights
	@$(BIN)/vlm check $(CONFIG) $(ARGS)

eval: $(INSTALLED) ## score RUN on its held-out data
	@$(BIN)/vlm eval $(RUN) $(ARGS)

chat: $(INSTALLED) ## talk to RUN
	@$(BIN)/vlm chat $(RUN) $(ARGS)

export: $(INSTALLED) ## write RUN as a model that transformers loads by itself
	@$(BIN)/vlm export $(RUN) --to llava $(ARGS)

bench: $(INSTALLED) ## run every file of benchmarks/
	@failed=0; for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || failed=1; done; exit $$failed

clean: ## remove builds and caches; the environment and runs/ stay
	@rm -rf build dist vlm.egg-info .pytest_cache .ruff_cache
	@find . \( -name .venv -o -name .git -o -name runs \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
