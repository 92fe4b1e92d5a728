# Every target first makes the environment it needs, in $(VENV), and renews it when the
# requirements change. Assumed on the machine: make, and Python 3.11 or newer as $(PYTHON).

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
API ?= build/api

PY := $(VENV)/bin/python
TRAIN := $(VENV)/.installed-train
TEST := $(VENV)/.installed-test
# Rooms of the library. Those named like a function are found through the package.
ROOMS := $(filter-out ab_jax/__% %.typed ab_jax/blend.py ab_jax/describe.py,$(wildcard ab_jax/*))
TORCH_VENV := $(VENV)-torch
TORCH := $(TORCH_VENV)/.installed-torch

# Most programs of the tests run a few times at most: compiling takes nearly all of their time.
QUICKLY := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# No training, and nothing but JAX and the core to compile.
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,architecture blend estimators layerwise \
	quantizers schedules))
# What follows functions through JAX's internals, and these move.
JAX_TESTS := tests/products tests/test_blend.py tests/test_nnx.py
# The newest wants a newer Python than the oldest does.
NEWEST_PYTHON ?= python3.13
# What is promised bit for bit; compiled as users compile it.
EXACT_TESTS := tests/test_blend.py tests/test_estimators.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-full test-jax test-torch stress lint format docs clean distclean

help: ## show this list
	@echo "Targets:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | awk -F'|' '{ printf "  %-12s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer)  VENV=$(VENV)  JOBS=$(JOBS) (test processes)"

quickstart: $(TRAIN) ## train one small network in float, with STE and with AB (2 minutes)
	$(PY) -m examples.quickstart

test: lint ## check the style and the types, then run the tests (20 minutes)
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(EXACT_TESTS); exact=$$?; \
	$(QUICKLY) $(PY) -m pytest -n $(JOBS) --dist worksteal $(addprefix --ignore=,$(EXACT_TESTS)) && \
		exit $$exact

test-fast: $(TEST) ## the core alone: rules, quantizers, estimators, ramps (under a minute)
	$(QUICKLY) $(PY) -m pytest -n $(JOBS) --dist worksteal $(CORE_TESTS)

test-full: lint ## what test runs, long trainings, and whole studies cut off and resumed (an hour)
	$(PY) -m pytest -m "" -n $(JOBS) --dist worksteal tests ab_jax tests/long/*.py
	$(MAKE) test-jax

test-jax: $(VENV)-oldest/.installed $(VENV)-newest/.installed ## the core and products with the oldest and the newest JAX (20 minutes)
	for jax in oldest newest; do \
		$(VENV)-$$jax/bin/python -m pytest -n $(JOBS) --dist worksteal $(JAX_TESTS) || exit 1; \
	done

test-torch: $(TORCH) ## compare PARQ with its authors' code, in an environment with PyTorch
	JAX_PLATFORMS=cpu $(TORCH_VENV)/bin/python -m pytest tests/against_torch/live.py

stress: $(TEST) ## kill training runs and damage their checkpoints, resume, compare (10 minutes)
	$(PY) -m tests.stress.survive
	$(PY) -m pytest tests/stress/full_disk.py tests/stress/killed_together.py

lint: $(TEST) ## check the style and the types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(TEST) ## put the sources into the house's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(TEST) ## write the API reference into build/api, from the docstrings
	$(PY) -W error -m pdoc --docformat google --no-show-source --output-directory $(API) ab_jax \
		$(subst /,.,$(basename $(ROOMS)))
	@echo "Open $(API)/index.html"

clean: ## remove caches and build leftovers; runs and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ab_jax benchmarks examples experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf .venv .venv-torch .venv-oldest .venv-newest

# The environment. A stamp file says which list is installed; an environment made by hand has none,
# and pip then installs into it whatever is missing.

define CHECK_PYTHON
import sys; sys.version_info >= (3, 11) or sys.exit("error: %s is Python %d.%d, and ab_jax needs 3.11 or newer. Name another one (make PYTHON=python3.12 ...); if it is the one in $(VENV), remove that folder first." % ((sys.executable,) + tuple(sys.version_info[:2])))
endef

$(PY):
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_PYTHON)'
	@echo "Making the environment in $(VENV)"
	@rm -f $(TRAIN) $(TEST) $(PY)* # a link to a Python that is gone, too
	@"$(PYTHON)" -m venv $(VENV) || { rm -f $(PY); echo "error: could not make $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(TRAIN): requirements.txt $(PY)
	@$(PY) -c '$(CHECK_PYTHON)'
	@echo "Installing requirements.txt into $(VENV) (once; some minutes, about 1.2 GB)"
	$(PY) -m pip install -r requirements.txt
	@touch $@

$(TEST): requirements-test.txt pyproject.toml $(TRAIN)
	@echo "Installing the test tools into $(VENV)"
	$(PY) -m pip install -e '.[train,test]'
	@touch $@

# JAX of one version, what uses it in the tests of the core and products, and the library itself.
define JAX_ENVIRONMENT
	"$(1)" -m venv $(@D)
	$(@D)/bin/python -m pip install -c requirements-test.txt $(2) 'flax>=0.12.8,<0.14' safetensors equinox dm-haiku \
		pytest pytest-xdist hypothesis
	$(@D)/bin/python -m pip install --no-deps -e .
	@touch $@
endef

$(VENV)-oldest/.installed: requirements-test.txt pyproject.toml
	$(call JAX_ENVIRONMENT,$(PYTHON),jax==0.10.0 jaxlib==0.10.0 optax==0.2.8)

$(VENV)-newest/.installed: requirements-test.txt pyproject.toml
	$(call JAX_ENVIRONMENT,$(NEWEST_PYTHON),--upgrade 'jax<0.13' 'optax<0.4')

# JAX and the library without its training, and the two test tools that tests/conftest.py wants.
# PIP_EXTRA_INDEX_URL may name where builds of PyTorch for CPUs are, which take a tenth of the disk.
$(TORCH): requirements-torch.txt requirements-test.txt pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "error: there is no '$(PYTHON)' here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_PYTHON)'
	@echo "Making the environment in $(TORCH_VENV)"
	"$(PYTHON)" -m venv $(TORCH_VENV)
	$(TORCH_VENV)/bin/python -m pip install -c requirements-test.txt -e '.[torch]' pytest hypothesis
	@touch $@
