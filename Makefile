# `make demo` and `make test` do all of their own set-up in $(VENV); nothing else is touched.
#   make demo TORCH=cpu             torch and torchvision from PyTorch's CPU index (small download)
#   make demo ARGS="--only vision"  options of `scanweave demo`
#   make test PYTEST_ARGS="-k scan" options of pytest
#   make test VENV=../env           another environment; a torch that is in it is kept
VENV ?= .venv
TORCH ?= default
# the first interpreter that is new enough, whatever `python3` happens to be
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python3.10,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $(name))))
BIN := $(VENV)/bin
# a stamp per set of extras and build of torch: installed again only when pyproject.toml changes
DEMO_STAMP := $(VENV)/.scanweave-demo-$(TORCH)
DEV_STAMP := $(VENV)/.scanweave-dev-$(TORCH)
WORKERS ?= 2

.PHONY: help demo test lint bench-smoke clean

help:
	@echo "make demo         install, then train all three demonstrations (results in runs/demo)"
	@echo "make test         install, then lint, types and the whole test suite"
	@echo "make lint         ruff and pyright only"
	@echo "make bench-smoke  every benchmark once at toy size"
	@echo "make clean        remove $(VENV), caches and build products; runs/ stays"

demo: $(DEMO_STAMP)
	$(BIN)/scanweave demo $(ARGS)

# timm's own tests come from its source distribution; the first pytest run executes the Triton kernels themselves, in Triton's interpreter
test: lint
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n $(WORKERS) --poison -m interpret tests/core
	@$(BIN)/python tests/vision/fetch_timm_tests.py || echo "timm's own tests are skipped: they could not be fetched"
	$(BIN)/python -m pytest -q -n $(WORKERS) --poison $(PYTEST_ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench-smoke: $(DEV_STAMP)
	$(BIN)/python -m benchmarks.run all --toy --no-peers

$(DEMO_STAMP): EXTRAS := demo
$(DEV_STAMP): EXTRAS := all,dev
$(DEMO_STAMP) $(DEV_STAMP): pyproject.toml tools/setup_env.py
	@test -n "$(PYTHON)" || { echo "scanweave needs Python 3.10 or later: install it, or set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) tools/setup_env.py --venv $(VENV) --torch $(TORCH) --extras $(EXTRAS)
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache
