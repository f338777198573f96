# Each target first makes .venv from the pinned constraints.txt.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

.PHONY: demo test test-oldest test-newest fuzz programs lint docs bench base clean

demo: .venv/ready
	$(BIN)/python -m research.demo

test: .venv/ready .venv/extras
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS)

# Both leave constraints.txt aside, and each has an environment of its own. uv knows how to take the oldest versions.
test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -qq uv
	VIRTUAL_ENV=$(CURDIR)/.venv-$* .venv-$*/bin/uv pip install -q --upgrade --resolution $(RESOLUTION) \
		--requirements pyproject.toml --all-extras --editable .
	if [ $* = oldest ]; then .venv-$*/bin/python -m tests.bounds; fi
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-$*/bin/python -m pytest -n $(WORKERS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ten minutes in all. Atheris has wheels for Linux and Python 3.11 to 3.13.
fuzz: FUZZ_SECONDS ?= 50
fuzz: .venv/ready
	@$(BIN)/python -m pip install -qq --constraint constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Both checks run, whatever the first finds.
programs: .venv-programs/ready
	@failed=0; for check in invokeai stable_diffusion_cpp; do \
		OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-programs/bin/python -m tests.programs.$$check || failed=1; \
	done; exit $$failed

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Wrote site/index.html"

bench: .venv/ready
	for file in benchmarks/[a-z]*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py) || exit; done

base: .venv/ready
	$(BIN)/python -m recipes.base

.venv/ready: pyproject.toml constraints.txt
	@echo "Making .venv: torch, the largest part; a minute or more"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --constraint constraints.txt torch
	@echo "Making .venv: the rest"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Apart, since the libraries that depend on torchao load it and log much about it wherever it is installed.
.venv/extras: .venv/ready
	@echo "Making .venv: quantized bases, optimizers and datasets, for the tests"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev,lycoris,quantized,serve,train]'
	@touch $@

.venv-programs/ready: pyproject.toml constraints.txt tests/programs/requirements.txt
	@echo "Making .venv-programs: torch, InvokeAI and stable-diffusion.cpp; a minute or more"
	@$(PYTHON) -m venv .venv-programs
	@.venv-programs/bin/python -m pip install -qq --constraint constraints.txt torch --editable . && \
		.venv-programs/bin/python -m pip install -qq --no-deps --requirement tests/programs/requirements.txt || \
		{ echo "make programs needs PyPI and Python 3.11 or 3.12: something of it could not be installed."; exit 1; }
	@touch $@

.venv/docs: .venv/ready
	@echo "Making .venv: the documentation's site"
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-programs .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo-output site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
