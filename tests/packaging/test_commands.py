"""make and .ci/run, where the Python that they need is not there."""

import os
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(*command, **variables):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ours | variables, capture_output=True, text=True
    )
    assert done.returncode != 0
    return done.stderr.splitlines()


def test_make_refuses_a_python_that_is_too_old_before_anything_is_made(tmp_path):
    old = program(tmp_path / "python", 'if [ "$1" = -V ]; then echo Python 3.9.18; else exit 1; fi')
    first, second = run("make", "report", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert "needs Python 3.10 to 3.14" in first
    assert "is Python 3.9.18" in first
    assert "make report PYTHON=python3.12" in first
    assert second.startswith("make: ***")
    assert not (tmp_path / "venv").exists()


def test_a_missing_interpreter_fails_the_step_and_is_named(tmp_path):
    """A shim that does not run is no interpreter."""
    for name in ("python3.10", "pyenv"):
        program(tmp_path / name, "echo not installed >&2; exit 127")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    lines = run("bash", ".ci/run", "pythons", PATH=path)
    assert lines == ["Python 3.10 is needed here, and none that runs is on PATH or known to pyenv."]


def test_a_step_that_does_not_exist_is_refused_with_a_list():
    (line,) = run("bash", ".ci/run", "nonesuch")
    assert "nonesuch" in line
    assert "older-lens" in line


def test_the_short_run_names_tests_that_exist():
    (line,) = re.findall(r'^SHORT="(.*)"$', (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert [name for name in line.split() if not (REPOSITORY / name).is_file()] == []
