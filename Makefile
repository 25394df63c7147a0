# Each target does its own set-up, and the second time in a moment. The same without make: python -m rlnb <target>
PYTHON ?= python3

.PHONY: run test lab setup lint clean

run test lab setup:
	@$(PYTHON) -m rlnb $@

lint:
	@$(PYTHON) -m rlnb test lint

# Environments and caches go; runs/ stays.
clean:
	rm -rf .venv .venv-plain build rlnb.egg-info .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
