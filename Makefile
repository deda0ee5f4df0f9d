# The verbs of this repository. `make` or `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
SERVER ?= torchserve

# Downloading another Python is never wanted; warm bytecode halves a worker's start.
export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1
UV := .venv/bin/uv
READY := .venv/.ready

# The first Python that really runs, is 3.10 to 3.12 and has venv with pip.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$python; break; }; done)

.PHONY: help setup serve test test-server test-shared test-train test-readme test-all check lock clean

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(READY) ## make the environment in .venv from the hashed lock file

$(READY): requirements/main.txt requirements/uv.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo "make: no Python 3.10, 3.11 or 3.12 with venv on the PATH;" \
		"install one (Debian: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up .venv with $$($(PYTHON) --version): once, about 5 GB with PyTorch's CUDA parts"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@$(UV) pip install --quiet --python .venv/bin/python --require-hashes --compile-bytecode -r requirements/main.txt
	@$(UV) pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

serve: ## everything: data, training, archive, a running server (SERVER=mms; ARGS="--port 9000")
	@start=$$SECONDS; $(MAKE) -s --no-print-directory setup && \
		exec .venv/bin/beeline quickstart --server $(SERVER) $(ARGS) --setup-seconds $$((SECONDS - start))

test: setup ## the fast tests: no server, no training
	@.venv/bin/pytest -q -m "not server and not train and not shared and not readme"

test-server: setup ## the tests on real TorchServe and real Multi Model Server
	@.venv/bin/pytest -q -m "server and not shared and not train"

test-shared: setup ## the tests on real pictures and weights (BEELINE_SHARED names their folder)
	@.venv/bin/pytest -q -m "shared and not train and not readme"

test-train: setup ## the tests that train a model on real pictures
	@.venv/bin/pytest -q -m train

test-readme: setup ## every command block of the README, with real pictures
	@.venv/bin/pytest -q -m readme

test-all: test test-server test-shared test-train test-readme ## every tier

check: setup ## format, lint, types and the layers between rooms
	@.venv/bin/ruff format --check --quiet . || { .venv/bin/ruff format --diff --quiet .; exit 1; }
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy --no-error-summary handlers archive train serve bench cli tests
	@.venv/bin/lint-imports

lock: setup ## resolve requirements/*.in again, with hashes and without an index
	@for name in uv main mms; do $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes \
		--no-emit-index-url --no-header requirements/$$name.in -o requirements/$$name.txt; done

clean: ## remove what was built: archives, runs, caches (not the environments, not downloaded data)
	@rm -rf runs model_store/*.mar model_store/index.json .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
