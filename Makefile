# Each target does its own set-up, and the second time in a moment. The same without make: python -m rlnb <target>
PYTHON ?= python3

.PHONY: run test lab setup real lint clean

run test lab setup:
	@$(PYTHON) -m rlnb $@

# The real model: half an hour or more on two cores. Interrupted, it goes on where it was.
real:
	@$(PYTHON) -m rlnb fetch smollm2-135m
	@$(PYTHON) -m rlnb run 16_real_model

lint:
	@$(PYTHON) -m rlnb test lint

# Environments and caches go; runs/ stays.
clean:
	rm -rf .venv .venv-plain build rlnb.egg-info .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
