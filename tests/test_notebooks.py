"""Every tutorial runs from top to bottom, and shows what its text says.

The first runs with the everyday tests; the others are asked for by `make test-notebooks`.
"""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parent.parent / "tutorials"
MOST_BYTES = 500_000

# For each notebook a file of what must hold after it has run, executed as its last cell.
CLAIMS = Path(__file__).parent / "notebook_claims"


def run(name):
    notebook = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell((CLAIMS / f"{name}.py").read_text()))
    client = NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(TUTORIALS)}})
    client.execute()


def names():
    return sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))


@pytest.mark.slow
def test_the_first_tutorial_runs_and_shows_what_it_says():
    run("01_saturate_a_model")


@pytest.mark.notebook
@pytest.mark.parametrize("name", names())
def test_tutorial_runs_and_shows_what_it_says(name):
    run(name)


@pytest.mark.parametrize("name", names())
def test_notebook_and_source_are_the_same(name):
    stored = nbformat.read(TUTORIALS / f"{name}.ipynb", as_version=4)
    source = jupytext.read(TUTORIALS / f"{name}.py")
    assert [(c.cell_type, c.source) for c in stored.cells] == [
        (c.cell_type, c.source) for c in source.cells
    ]


@pytest.mark.parametrize("name", names())
def test_notebook_is_small_names_no_machine_and_holds_no_error(name):
    path = TUTORIALS / f"{name}.ipynb"
    assert path.stat().st_size <= MOST_BYTES
    text = path.read_text()
    assert "/root/" not in text
    assert "/work/" not in text
    assert '"output_type": "error"' not in text


def test_every_notebook_is_listed_and_has_claims():
    listed = (TUTORIALS / "README.md").read_text()
    assert set(names()) == {path.stem for path in CLAIMS.glob("*.py")}
    assert all(f"{name}.ipynb" in listed for name in names())
