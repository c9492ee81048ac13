# Everything runs in .venv, made on first use from requirements.lock with Python 3.11, 3.12 or 3.13.
# Another interpreter: make train PYTHON=/path/to/python3.12

FITS := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for each in python3.13 python3.12 python3.11 python3; do \
  $$each -c '$(FITS)' 2>/dev/null && echo $$each && break; done)
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: train test test-full mutants ablation lint bench clean

train: $(READY)
	$(BIN)/moe-jax train --config=configs/quickstart.py --workdir=runs/quickstart

test: $(READY)
	$(PYTEST)

test-full: $(READY)
	$(PYTEST)
	$(PYTEST) --dist load -m full --full-report=tests

mutants: $(READY)
	$(BIN)/python tests/mutations/run.py

ablation: $(READY)
	$(BIN)/moe-jax sweep --config=experiments/router_zoo/config.py --profile=smoke --workers=2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(READY)
	$(BIN)/python -m experiments.benchmarks.moe_layer

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache

# The stamp is written last: an interrupted install leaves none and starts over from an empty .venv.
$(READY): requirements.lock setup.py
	@$(or $(PYTHON),false) -c '$(FITS)' 2>/dev/null || { echo "make: needs Python 3.11, 3.12 or 3.13\
	 with its venv module (on Debian also the package python3-venv);\
	 $(if $(PYTHON),$(PYTHON) is not one,none is on the PATH): make PYTHON=/path/to/python" >&2; \
	  exit 2; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@
