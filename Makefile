# Shortcuts for work on this repository; `make env` once, then the rest. What CI does is .ci/run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: env format lint types test check dist ci clean

env:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e ".[cpu,dev]"

format:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	PYTHON=$(BIN)/python .ci/types

test:
	$(BIN)/pytest

check: lint types test

dist:  # through the sdist, so that a stale build/ cannot ship old files
	rm -rf build dist
	$(BIN)/python -m build

ci:
	.ci/run

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
