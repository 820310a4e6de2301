"""The wheel and the sdist: what is in them, and that the wheel does its work far from here."""

import os
import re
import shutil
import subprocess
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.timeout(1800)  # torch may have to be downloaded

REPOSITORY = Path(__file__).parents[2]
DISTRIBUTIONS = REPOSITORY / "build" / "dist"  # where a release takes them from


def run(*command, cwd, **variables):
    """What a command writes; a failure shows all of it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ours | {"HF_HUB_OFFLINE": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="session")
def built():
    """The sdist, and the wheel that is built from it."""
    shutil.rmtree(DISTRIBUTIONS, ignore_errors=True)
    run("uv", "build", "--no-config", "--quiet", "-o", DISTRIBUTIONS, REPOSITORY, cwd=REPOSITORY)
    (wheel,), (sdist,) = DISTRIBUTIONS.glob("*.whl"), DISTRIBUTIONS.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def package():
    """The package's files in the repository."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "sat_lens"]
    names = run(*listed, cwd=REPOSITORY).splitlines()
    return {name for name in names if (REPOSITORY / name).is_file()}


def test_the_wheel_is_the_package_and_its_licence(built, package):
    wheel, _ = built
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - about == package
    assert {PurePosixPath(name).name for name in about} == {
        *("LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    }


def test_the_package_holds_nothing_but_code_the_demo_model_and_templates(package):
    others = {PurePosixPath(name) for name in package if not name.endswith(".py")}
    folders = {str(path.parent) for path in others - {PurePosixPath("sat_lens/py.typed")}}
    assert folders == {"sat_lens/demo/model", "sat_lens/viz/templates"}
    assert "sat_lens/py.typed" in package


def test_the_sdist_is_what_the_wheel_is_built_from(built, package):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        files = [member.name for member in archive.getmembers() if member.isfile()]
    names = {name.partition("/")[2] for name in files}
    others = {name for name in names - package if not name.startswith("sat_lens.egg-info/")}
    assert package <= names
    assert others == {
        "LICENSE",
        "MANIFEST.in",
        "PKG-INFO",
        "README.md",
        "pyproject.toml",
        "setup.cfg",
        "setup.py",
    }


def test_the_description_has_no_picture_or_link_of_the_checkout(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        description = archive.read(name).decode()
    assert "Description-Content-Type: text/markdown" in description
    assert "## " in description
    assert set(re.findall(r"\]\((?!https?://|#)", description)) == set()


@pytest.fixture(scope="session")
def elsewhere(built, tmp_path_factory):
    """An empty environment into which nothing but the wheel was installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    constraints = REPOSITORY / "constraints.txt"
    pip = [programs / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "install", "--no-compile", "-c", constraints, f"{built[0]}[notebooks]", cwd=folder)
    run(*pip, "check", cwd=folder)
    yield programs
    shutil.rmtree(folder)


def test_the_installed_package_is_not_the_checkout(elsewhere, tmp_path):
    where = run(elsewhere / "python", "-c", "print(__import__('sat_lens').__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(elsewhere.parent)


def test_it_writes_a_report(elsewhere, tmp_path):
    run(elsewhere / "sat-lens", "report", "--out", "report.html", cwd=tmp_path)
    assert "L0H0" in (tmp_path / "report.html").read_text()


def test_it_checks_a_model(elsewhere, tmp_path):
    assert "a trial changes the output" in run(
        elsewhere / "sat-lens", "check", "demo", cwd=tmp_path
    )


def test_a_recipe_runs(elsewhere, tmp_path):
    recipe = shutil.copy(REPOSITORY / "hooks" / "saturate_heads.py", tmp_path)
    assert run(elsewhere / "python", recipe, cwd=tmp_path)


def test_a_notebook_runs(elsewhere, tmp_path):
    notebook = shutil.copy(REPOSITORY / "tutorials" / "01_saturate_a_model.ipynb", tmp_path)
    run(elsewhere / "jupyter-execute", "--inplace", notebook, cwd=tmp_path)
