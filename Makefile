# The two commands are `make demo` and `make test`; each sets everything up by itself first. `make test-slow` runs the
# tests that take long or need the machine for themselves.
PYTHON ?= python3
BIN := .venv/bin
LOCKS := configs/locks/cpu.txt configs/locks/dev.txt

.PHONY: demo demo-ppo test test-slow lint format docs clean

demo: .venv/.installed
	$(BIN)/raylign demo

demo-ppo: .venv/.installed
	$(BIN)/raylign demo-ppo

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: .venv/.installed
	@status=0; $(BIN)/python -m pytest -m "slow and alone" || status=$$?; \
	$(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadscope --no-loadscope-reorder || status=$$?; exit $$status

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/reference, which are written from the code.
docs: .venv/.installed
	$(BIN)/python -m docs.generate

# One pinned list, no resolver: CONTRIBUTING.md, "The lock", says why.
.venv/.installed: $(LOCKS) pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --no-deps $(addprefix -r ,$(LOCKS))
	$(BIN)/pip install --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv runs
