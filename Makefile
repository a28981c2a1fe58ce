# make fit: a first training. make test: the tests. Both make their own environment in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: fit test test-slow lint audit bench bench-quick bench-fit torture load clean

fit: $(VENV)/ready
	$(BIN)/python -m mnist_lightning fit --config shallow.yaml

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2

# what takes minutes, and what needs a PostgreSQL server's programs or Chromium
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow or postgres or browser"

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# known vulnerabilities of the pinned versions; asks an advisory service, so it is run by hand
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

bench: $(VENV)/ready
	$(BIN)/python benchmarks/run.py

# whole trainings: the loop, and the command as users run it, on an idle and on a loaded machine
bench-fit: $(VENV)/ready
	$(BIN)/python benchmarks/run.py --only fit command

# a rough look in under five minutes
bench-quick: $(VENV)/ready
	$(BIN)/python benchmarks/run.py --quick

# kills trainings, cuts the power in simulation, flips bits and disturbs searches, and compares bits
torture: $(VENV)/ready
	$(BIN)/python benchmarks/torture.py
	$(BIN)/python benchmarks/powerloss.py
	$(BIN)/python benchmarks/bitflips.py
	$(BIN)/python benchmarks/searches.py

# long trainings and searches, full folders, many trainings at once: twenty minutes
load: $(VENV)/ready
	$(BIN)/python benchmarks/load.py

# as a variable, pip pins what builds the package too
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
