"""What holds for the package as a whole: its surface, its examples, its rooms, its files."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess

import pytest
import reference
from everyday import everyday

import sat_lens as sl

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGE = REPOSITORY / "sat_lens"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# Not installed with the library, and held to the same rules.
PAPER = sorted((REPOSITORY / "paper").glob("*.py"))
# In the order of the design: a room imports only rooms above it.
ROOMS = [
    ["version", "vocabulary"],
    ["errors"],
    ["_checks"],
    ["results"],
    ["models"],
    ["data"],
    ["metrics"],
    ["attention"],
    ["sites"],
    ["intervention"],
    ["figures"],
    ["caching"],
    ["spectrum"],
    ["temperature"],
    ["roles"],
    ["patching"],
    ["norms"],
    ["monitor"],
    ["training"],
    ["tasks"],
    ["viz"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
KNOW_NO_TRANSFORMER_LENS = {
    "errors",
    "attention",
    "results",
    "figures",
    "metrics",
    "norms",
    "tasks",
}
# It needs Triton, which tests/gpu have.
LEFT_OUT = {"sat_lens.attention.hard_kernel"}
MODULES = [
    module.name
    for folder in (PACKAGE, REPOSITORY / "paper")
    for module in pkgutil.walk_packages([str(folder)], f"{folder.name}.")
    if module.name not in LEFT_OUT
]


def room_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def at_module_level(tree):
    """Walk what an import of the module runs: no function bodies, no TYPE_CHECKING blocks."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not is_function:
            waiting += ast.iter_child_nodes(node)


def imports(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tracked_files():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [
        REPOSITORY / name for name in found.stdout.splitlines() if (REPOSITORY / name).is_file()
    ]


def test_the_surface_is_small_and_there():
    assert len(sl.__all__) <= 30
    assert sl.__all__ == sorted(sl.__all__)
    assert dir(sl) == sl.__all__
    for name in sl.__all__:
        assert getattr(sl, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sl.nonsense


def public_objects():
    """What a user may call: the surface, and what its submodules and rooms export by name."""
    found = {name: getattr(sl, name) for name in sl.__all__}
    for room in ("roles", "figures", "norms", "training", "patching", "viz"):
        module = importlib.import_module(f"sat_lens.{room}")
        found |= {
            f"{room}.{name}": getattr(module, name) for name in getattr(module, "__all__", [])
        }
    for room in ("metrics", "tasks", "transforms"):
        module = getattr(sl, room)
        found |= {
            f"{room}.{name}": value
            for name, value in vars(module).items()
            if getattr(value, "__module__", "") == module.__name__
            and not name.startswith(("_", "check_"))
        }
    return found


def says_what_it_holds(value):
    """Errors, results and protocols: there is nothing to call."""
    if not inspect.isclass(value):
        return False
    is_result = dataclasses.is_dataclass(value) or getattr(value, "_is_protocol", False)
    return is_result or issubclass(value, Exception)


NOT_IN_THE_REFERENCE = {"__main__", "_checks", "cli", "version", "vocabulary"}


def test_every_room_and_every_public_name_stands_in_the_reference():
    rooms = {room for floor in ROOMS for room in floor} - NOT_IN_THE_REFERENCE
    assert rooms == {name.split(".")[1] for name in reference.modules()}
    described = {id(value) for value in reference.described().values()}
    public = [v for v in public_objects().values() if inspect.isclass(v) or inspect.isfunction(v)]
    assert [value.__name__ for value in public if id(value) not in described] == []


def test_everything_in_the_reference_has_a_docstring():
    bare = [name for name, value in reference.described().items() if not inspect.getdoc(value)]
    assert bare == []


def test_every_public_name_is_explained_and_what_is_called_has_an_example():
    bare = []
    for name, value in public_objects().items():
        if inspect.isfunction(value) or inspect.isclass(value):
            words = inspect.getdoc(value) or ""
            if not words or ("Example" not in words and not says_what_it_holds(value)):
                bare.append(name)
    assert bare == [], f"without a docstring or an example: {bare}"


class Finder(doctest.DocTestFinder):
    """Also find the examples of functions that a decorator wraps."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize(
    "name", everyday(MODULES, *(name for name in MODULES if name.startswith("sat_lens")))
)
def test_the_examples_are_true(name, demo, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    load = sl.models.load_model
    monkeypatch.setattr(
        "sat_lens.models.load_model", lambda name="demo": demo if name == "demo" else load(name)
    )
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    shown = []
    for test in Finder().find(module, name):
        runner.run(test, out=shown.append)
    assert runner.failures == 0, "".join(shown)


def names_without_an_import(examples):
    """Names that a paste of these examples would not know."""
    nodes = list(ast.walk(ast.parse("".join(example.source for example in examples))))
    known = set(dir(builtins)) | {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
    return {node.id for node in nodes if isinstance(node, ast.Name)} - known


def test_examples_in_the_reference_can_be_pasted():
    unknown = {}
    for name, value in reference.described().items():
        words = inspect.unwrap(value).__doc__ or ""
        unknown[name] = names_without_an_import(doctest.DocTestParser().get_examples(words))
    assert {name: names for name, names in unknown.items() if names} == {}


def test_examples_are_found_under_decorators():
    found = Finder().find(importlib.import_module("sat_lens.intervention.managers"))
    assert {"saturate", "replace_attention"} <= {
        test.name.rpartition(".")[2] for test in found if test.examples
    }


def test_rooms_look_upwards_only():
    order = {room: i for i, floor in enumerate(ROOMS) for room in floor}
    for path in SOURCES:
        if path == PACKAGE / "__init__.py":
            continue
        room = room_of(path)
        for name in imports(at_module_level(ast.parse(path.read_text()))):
            parts = name.split(".")
            if parts[0] == "sat_lens":
                assert parts[1] in order, f"{path} imports {name} from the surface, not from a room"
                assert order[parts[1]] <= order[room], f"{path}: {name} is no room above {room}"
            assert parts[0] != "paper", f"{path}: the library works without paper/"
            if parts[0] == "transformer_lens":
                assert room not in KNOW_NO_TRANSFORMER_LENS, f"{path} imports {name}"


def module_name(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(path, names):
    """The modules of the package that a file imports anywhere: in functions and for types too."""
    for name in imports(ast.walk(ast.parse(path.read_text()))):
        found = name if name in names else name.rpartition(".")[0]
        if found in names and found != module_name(path):
            yield found


def test_no_two_files_import_each_other():
    names = {module_name(path): path for path in [*SOURCES, *PAPER]}
    graph = {name: set(imported_modules(path, names)) for name, path in names.items()}
    mutual = {tuple(sorted((a, b))) for a in graph for b in graph[a] if a in graph[b]}
    # The surface names the rooms lazily, and rooms do not import the surface.
    found = {pair for pair in mutual if "sat_lens" not in pair}
    assert found == set()


def test_imports_within_functions_are_few_and_say_why():
    found = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        tree = ast.parse("\n".join(lines))
        own = set(at_module_level(tree))
        for node in ast.walk(tree):
            in_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            own |= set(ast.walk(node)) if in_types else set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in own:
                found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}")
                above = lines[node.lineno - 3 : node.lineno - 1]
                assert any(line.strip().startswith("#") for line in above), found[-1]
    assert len(found) <= 8, found


def test_no_function_or_class_has_two_meanings():
    """Commands are named by what the user types."""
    homes = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_"
            if named and path.parent.name != "cli":
                homes.setdefault(node.name, []).append(str(path.relative_to(REPOSITORY)))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_files_keep_the_style():
    for path in [*SOURCES, *PAPER]:
        text = path.read_text()
        tree = ast.parse(text)
        assert "TO" + "DO" not in text, path
        assert ast.get_docstring(tree), f"{path} does not say what it is"
        prints = path.parent.name == "cli" or path == REPOSITORY / "paper" / "__main__.py"
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(alias.name != "*" for alias in node.names), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print" or prints, path
                assert node.func.id not in ("eval", "exec"), path


def test_no_file_names_a_place_on_somebodys_machine():
    places = re.compile(rb"(?<![\w.~])/(?:work|root|home|Users)/\w")
    for path in tracked_files():
        if path.suffix not in (".safetensors", ".png"):
            found = places.search(path.read_bytes())
            assert found is None, f"{path.relative_to(REPOSITORY)}: {found.group()}"
