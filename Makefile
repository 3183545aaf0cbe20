# The two commands are `make demo` and `make test`; each sets everything up by itself first.
PYTHON ?= python3
BIN := .venv/bin
LOCKS := configs/locks/cpu.txt configs/locks/dev.txt

.PHONY: demo demo-ppo test lint format clean

demo: .venv/.installed
	$(BIN)/raylign demo

demo-ppo: .venv/.installed
	$(BIN)/raylign demo-ppo

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One pinned list, no resolver: README, "The lock", says why.
.venv/.installed: $(LOCKS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps $(addprefix -r ,$(LOCKS))
	$(BIN)/pip install --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs
