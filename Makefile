# Each target does its own set-up, and the second time in a moment. The same without make: python -m rlnb <target>
PYTHON ?= python3

.PHONY: run test lab setup real lint site clean

run test lab setup:
	@$(PYTHON) -m rlnb $@

# The real model: half an hour or more on two cores. Interrupted, it goes on where it was.
real:
	@$(PYTHON) -m rlnb fetch smollm2-135m
	@$(PYTHON) -m rlnb run 16_real_model

lint:
	@$(PYTHON) -m rlnb test lint

# The notebooks as they are stored, with search, as pages that need no network. Sphinx has an environment of its own.
site: .venv-site/ready
	@.venv-site/bin/sphinx-build -q -n -W --keep-going -c .site -d html/.doctrees . html/site
	@echo "Open html/site/index.html"

.venv-site/ready: pyproject.toml
	@echo "Setting up .venv-site; this takes a minute or more the first time."
	@$(PYTHON) -m venv --upgrade-deps .venv-site
	@.venv-site/bin/python -m pip install -q --group site
	@touch $@

# Environments and caches go; runs/ stays.
clean:
	rm -rf .venv .venv-plain .venv-site build rlnb.egg-info .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
