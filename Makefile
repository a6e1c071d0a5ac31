# Every target sets up what it needs first, on a fresh Linux or Mac: scripts/bootstrap says how.
# PYTHON=... chooses the interpreter of .venv; PYTEST_ARGS="-k name" and DEMO_ARGS=... are handed on.
BIN := .venv/bin

.PHONY: help test demo lint format clean

help:
	@echo "make test    lint, then run all tests"
	@echo "make demo    run the demo on a small real model"
	@echo "make lint    ruff check, ruff format --check, pyright"
	@echo "make format  sort imports and format"
	@echo "make clean   remove caches and build outputs (not .venv, not the demo model)"

test: lint
	@scripts/bootstrap run
	@scripts/with-openblas $(BIN)/python -m pytest $(PYTEST_ARGS)

demo:
	@scripts/bootstrap demo
	@scripts/with-openblas $(BIN)/kvmlx demo $(DEMO_ARGS)

lint:
	@scripts/bootstrap tools
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format:
	@scripts/bootstrap tools
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
