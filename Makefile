# Set-up, tests, demo. PYTHON chooses the interpreter (3.11 to 3.13), TORCH the build of torch that pip installs: the pin
# stands in the same call as everything else, so that no other package can replace it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin

.PHONY: demo test test-slow test-all lint types examples check clean

demo: .venv/run ## train AT and AT-AWP on the bundled digits, write runs/demo/report.html
	$(BIN)/saltflat demo

test: .venv/dev ## every test that is not slow
	$(BIN)/python -m pytest -n 2

test-slow: .venv/dev ## fresh processes, kills, whole commands
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-all: test test-slow ## all tests

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev
	$(BIN)/mypy

examples: .venv/dev
	for script in examples/*.py; do echo $$script && $(BIN)/python $$script || exit 1; done

check: test-all lint types examples ## all that continuous integration runs

clean:
	rm -rf .venv

.venv/run: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH) -e .
	touch $@

.venv/dev: pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH) -e ".[dev]"
	touch $@
