# Everything is set up by plain venv and pip; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help report test test-notebooks test-browser lint types clean picture

help: ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

report: $(VENV)/.installed ## Saturate the demo model over the bundled corpus and write report.html.
	$(BIN)/sat-lens report --out report.html

test: $(VENV)/.installed-dev ## Run the everyday tests.
	$(BIN)/python -m pytest -q

test-notebooks: $(VENV)/.installed-dev ## Run every tutorial from top to bottom.
	$(BIN)/python -m pytest -q -m notebook

test-browser: $(VENV)/.installed-dev ## Open the report in a real browser (needs Debian's chromium).
	$(BIN)/python -m pytest -q -m browser

lint: $(VENV)/.installed-dev ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## Check types.
	$(BIN)/mypy

picture: $(VENV)/.installed ## Draw the picture of the role map in the README.
	$(BIN)/sat-lens roles --figure docs/role_map.png

clean: ## Remove the environment and what was built.
	rm -rf $(VENV) report.html .pytest_cache .mypy_cache .ruff_cache
