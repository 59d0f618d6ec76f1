# `make demo`: set up and watch a model learn under CPPO. `make test`: set up and prove the code. `make test-verl`: the same
# against verl's own losses, in an environment of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VERL_VENV := .venv-verl
VERL_STAMP := $(VERL_VENV)/.installed

.PHONY: demo test lint types unit test-verl wheel bench clean

demo: $(STAMP)
	$(BIN)/cppo train --beside policy_gradient

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest

# verl needs an older transformers than TRL. A missing verl is a failure, not a skip.
test-verl: $(VERL_STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(VERL_VENV)/bin/python -m pytest tests/verl

# The wheel, in an environment that has nothing but what it asks for.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
	cd .venv-wheel && bin/python -I ../tests/check_wheel.py

bench: $(STAMP)
	$(BIN)/python benchmarks/mask.py
	$(BIN)/python benchmarks/token_statistics.py
	$(BIN)/python benchmarks/trl_step.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VERL_STAMP): tests/verl/requirements.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/pip install -q -r tests/verl/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VERL_VENV) .venv-wheel dist build
