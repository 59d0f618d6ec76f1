# `make demo`: set up and watch a model learn under CPPO. `make test`: set up and prove the code. `make test-verl` and
# `make test-stacks`: the same against verl and the other frameworks, in an environment of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STACKS_VENV := .venv-stacks
STACKS_BIN := $(STACKS_VENV)/bin
# Beside the others, not among them: verl's workers do not start where TRL 1 can be imported.
STACKS_TRL := $(STACKS_VENV)/trl
STACKS_STAMP := $(STACKS_VENV)/.installed
# What is imported is compiled then, once; to compile all that is installed takes a minute an environment.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo environments test lint types unit test-verl test-stacks wheel bench clean

demo: $(STAMP)
	$(BIN)/cppo train --beside policy_gradient

# With -j 2 both at once.
environments: $(STAMP) $(STACKS_STAMP)

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# In the order of tests/conftest.py: by their number of tests the slow files would come last. The mutants run in two
# processes of their own.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_mutants.py
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_mutants.py

# verl needs an older transformers than TRL. A missing verl is a failure, not a skip.
test-verl: $(STACKS_STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=src $(STACKS_BIN)/python -m pytest tests/verl

# main_ppo runs once in the line above; once more, by a recipe's launcher: pytest tests/stacks/test_recipes.py
test-stacks: $(STACKS_STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=src:$(STACKS_TRL) $(STACKS_BIN)/python -m pytest -m 'not slow' tests/stacks

# The wheel, in an environment that has nothing but what it asks for.
wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/pip install -q --no-compile -c constraints.txt dist/*.whl
	cd .venv-wheel && bin/python -I ../tests/check_wheel.py

bench: $(STAMP)
	$(BIN)/python benchmarks/mask.py
	$(BIN)/python benchmarks/token_statistics.py
	$(BIN)/python benchmarks/trl_step.py
	$(BIN)/python benchmarks/inspect_log.py
	$(BIN)/python benchmarks/certificate.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

$(STACKS_STAMP): tests/stacks/requirements.txt
	$(PYTHON) -m venv $(STACKS_VENV)
	$(STACKS_BIN)/pip install -q --no-compile -r tests/stacks/requirements.txt
	$(STACKS_BIN)/pip install -q --no-compile --no-deps skyrl==0.3.0
	$(STACKS_BIN)/pip install -q --no-compile --no-deps --target $(STACKS_TRL) trl==1.16.0
	touch $@

clean:
	rm -rf $(VENV) $(STACKS_VENV) .venv-wheel dist build
