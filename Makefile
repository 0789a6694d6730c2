# Two commands do all the set-up: `make demo` and `make test`. Everything they fetch or build lives in
# .venv/ and .cache/; Debian packages are installed where they are missing (as root).

PYTHON ?= python3
SHELL := /bin/bash
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --durations=15
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends -o DPkg::Lock::Timeout=300
HOSTS ?= 2
# Where it is set, every start of Python compiles all modules again: half of the time of a deploy's start.
unexport PYTHONDONTWRITEBYTECODE

# What the demo and the tests need of Debian: disposable hosts, the stand-ins for GitHub and the Hub,
# a compiler for the oracle and the fake NVML.
PACKAGES := mmdebstrap systemd-container openssh-client git curl cmake ninja-build g++ gcc libc6-dev libgomp1
# And the tests alone: the gateway, file systems for the power cuts, other distributions' package managers.
test test-long: PACKAGES += haproxy e2fsprogs xfsprogs dnf zypper pacman-package-manager createrepo-c rpm chromium

.PHONY: help demo test test-offline test-long test-cuda check check-style check-types check-imports lock
.PHONY: sandbox-up sandbox-down prepared packages

help: ## this list, which plain `make` prints too
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: prepared ## two disposable hosts, the real deploy, a completion, a second run without change
	$(BIN)/python -m sandbox.demo

# The lanes run side by side: tests/lanes.py.
test: prepared ## what a change must pass: `check`, and all tests but the long ones and the CUDA build
	$(BIN)/python -m sandbox.programs
	$(BIN)/python -m tests.lanes

test-offline: .venv/ready ## the tests that need neither root nor a compiler
	$(PYTEST) -m "not cuda and not e2e and not oracle and not long"

test-long: prepared ## what `make test` does a few times, many times; and what takes minutes
	$(BIN)/python -m sandbox.programs
	$(PYTEST) -m "long and not cuda"

test-cuda: prepared ## compile llama.cpp with CUDA in a host without a GPU; 8 GB of disk
	$(PYTEST) -m cuda

check: .venv/ready ## ruff, its formatter, mypy in strict mode, import-linter
	@$(MAKE) --no-print-directory check-style check-types check-imports

# The hooks of .pre-commit-config.yaml run these from within .venv: they must never make it anew.
check-style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-types:
	$(BIN)/mypy
	cd llamafleet/remote && $(CURDIR)/$(BIN)/mypy --config-file= --cache-dir=$(CURDIR)/.mypy_cache/remote \
	    --strict --explicit-package-bases --python-version 3.10 *.py

check-imports:
	$(BIN)/lint-imports --no-logo --cache-dir .cache/import_linter

sandbox-up: prepared ## start HOSTS=2 disposable hosts to play with, and the stand-ins for GitHub and the Hub
	mkdir -p .cache/builds
	$(BIN)/python -m sandbox up --hosts $(HOSTS) --bind $(CURDIR)/.cache/builds:/var/cache/llamafleet-builds
	$(BIN)/python -m sandbox.outside start

sandbox-down: .venv/ready ## remove these hosts and end the stand-ins
	$(BIN)/python -m sandbox.outside stop
	$(BIN)/python -m sandbox down

.PHONY: adopt
adopt: prepared ## what llama.cpp's release REF=bNNNNN would change here; compiles it
	$(BIN)/python -m bench.adopt $(REF)

lock: .venv/ready ## pin locks/dev.txt anew, after a change of dependencies
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
	    --no-emit-index-url --no-header --output-file locks/dev.txt

prepared:
	@$(MAKE) --no-print-directory --jobs=2 .venv/ready packages PACKAGES="$(PACKAGES)"

packages:
	@missing=(); for name in $(PACKAGES); do \
	    [ "$$(dpkg-query -W -f '$${db:Status-Status}' $$name 2>/dev/null)" = installed ] || missing+=($$name); done; \
	if [ "$${#missing[@]}" -gt 0 ]; then \
	    echo "installing $${missing[*]}"; \
	    apt-get update -q && $(INSTALL) "$${missing[@]}"; \
	fi

# uv takes 4 s where pip takes 20, and knows neither pip's index nor the machine's certificates unless told; where it
# fails nevertheless, pip does it.
.venv/ready: locks/dev.txt pyproject.toml
	@[ ! -L .venv ] || { echo "error: .venv is a link, and making it anew would empty $$(readlink .venv)"; exit 1; }
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -q && $(INSTALL) python3-venv; }
	$(PYTHON) -m venv --clear .venv
	sed -n '/^uv==/,/[^\\]$$/p' locks/dev.txt > .venv/uv.txt
	$(PIP) --require-hashes --no-deps -r .venv/uv.txt
	index=$${PIP_INDEX_URL:-$$($(BIN)/python -m pip config get global.index-url 2>/dev/null)}; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	UV_CACHE_DIR=.cache/uv UV_SYSTEM_CERTS=1 $(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps -r locks/dev.txt \
	    || $(PIP) --require-hashes --no-deps -r locks/dev.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@
