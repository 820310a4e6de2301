"""Files of results: they come back as they were, and nothing else is taken for one."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import json
import math
import os
import pickle
import struct
from collections.abc import Mapping
from typing import Any, Literal

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from safetensors.torch import save

import sat_lens as sl
from sat_lens import results
from sat_lens.errors import FileFormatError
from sat_lens.results import (
    Provenance,
    Result,
    csv_text,
    library_versions,
    read_result,
    write_csv,
    write_result,
    write_whole,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
# csv.reader of Python 3.10 refuses NUL.
CELLS = st.text(st.characters(exclude_characters="\0", codec="utf-8"))
FORMULAS = st.tuples(st.sampled_from("=+-@\t\r"), CELLS).map("".join)


def refusal(*words):
    assert issubclass(FileFormatError, sl.SatLensError)
    return pytest.raises(FileFormatError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def rows_of(text):
    return list(csv.reader(io.StringIO(text, newline="")))


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.tensor([draw(st.integers(0, 200)) for _ in range(math.prod(shape))])
    return values.reshape(shape).to(draw(st.sampled_from(DTYPES)))


@given(
    named=st.dictionaries(NAMES, tensors(), max_size=3),
    meta=st.dictionaries(st.text(max_size=8), JSON, max_size=4),
)
def test_a_result_comes_back_as_it_was(tmp_path_factory, named, meta):
    path = tmp_path_factory.mktemp("results") / "r.safetensors"
    write_result(path, "kind", named, meta)
    found, header = read_result(path, "kind")
    assert header == meta
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], named[name]) for name in named)
    assert all(found[name].dtype == named[name].dtype for name in named)


def test_views_of_one_tensor_can_be_saved(tmp_path):
    whole = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    views = {"whole": whole, "turned": whole.T, "row": whole[1], "same": whole}
    write_result(tmp_path / "r", "kind", views, {})
    found, _ = read_result(tmp_path / "r", "kind")
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_infinities_and_nan_come_back(tmp_path):
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
    write_result(tmp_path / "r", "kind", {"x": values}, {"c": math.inf})
    found, meta = read_result(tmp_path / "r", "kind")
    torch.testing.assert_close(found["x"], values, equal_nan=True, rtol=0, atol=0)
    assert meta == {"c": math.inf}


@settings(max_examples=40)
@given(st.data())
def test_a_truncated_file_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("results") / "r.safetensors"
    write_result(path, "kind", {"x": torch.arange(9.0)}, {"a": [1, 2]})
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with refusal("r.safetensors is broken", "Measure again"):
        read_result(path, "kind")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("results") / "r.safetensors"
    path.write_bytes(content)
    with refusal("broken"):
        read_result(path, "kind")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    with open("r.safetensors", "wb") as file:
        write(Payload(), file)
    with refusal("broken or no safetensors file"):
        read_result("r.safetensors", "kind")
    assert not (tmp_path / "was_run").exists()


def with_header(header):
    return save({"x": torch.zeros(1)}, metadata={"sat_lens": header})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (save({"x": torch.zeros(1)}), ["not written by sat_lens"]),
        (save({"x": torch.zeros(1)}, metadata={"format": "pt"}), ["not written by sat_lens"]),
        (with_header("[1]"), ["not written by sat_lens"]),
        (with_header('{"kind": "kind", "format": 2}'), ["not written by sat_lens"]),
        (with_header('{"kind": "kind", "format": 2, "meta": [1]}'), ["not written by sat_lens"]),
        (with_header("{nonsense"), ["broken"]),
        (with_header("[" * 100_000), ["broken"]),
        (with_header('{"kind": "other", "format": 2, "meta": {}}'), ["'other'", "'kind' was need"]),
        (with_header('{"kind": "kind", "format": 1, "meta": {}}'), ["older sat_lens", "Measure"]),
        (with_header('{"kind": "kind", "format": 3, "meta": {}}'), ["newer sat_lens", "Update"]),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, words):
    path = tmp_path / "r.safetensors"
    path.write_bytes(content)
    with refusal("r.safetensors", *words):
        read_result(path, "kind")


def test_a_header_that_promises_gigabytes_is_refused(tmp_path):
    entry = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    header = json.dumps(entry).encode()
    (tmp_path / "r").write_bytes(struct.pack("<Q", len(header)) + header)
    with refusal("broken"):
        read_result(tmp_path / "r", "kind")


def test_a_file_that_is_not_there(tmp_path):
    with refusal("There is no file", "nowhere"):
        read_result(tmp_path / "nowhere", "kind")
    with refusal("is a folder", "name the file"):
        read_result(tmp_path, "kind")


def test_a_file_is_replaced_whole(tmp_path):
    target = tmp_path / "r"
    write_whole(target, b"first")
    write_whole(str(target), b"second, longer")
    assert target.read_bytes() == b"second, longer"
    assert os.listdir(tmp_path) == ["r"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error):
    target = tmp_path / "r"
    write_result(target, "kind", {"x": torch.ones(3)}, {})
    before = target.read_bytes()

    def half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr("pathlib.Path.write_bytes", half)
    expected = refusal("cannot be written", "No space") if isinstance(error, OSError) else None
    with expected or pytest.raises(KeyboardInterrupt):
        write_result(target, "kind", {"x": torch.zeros(300)}, {})
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["r"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target in ("nowhere/r", "file/r", "folder", "n" * 300):
        with refusal("cannot be written"):
            write_whole(tmp_path / target, b"content")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


@given(st.lists(st.one_of(FORMULAS, CELLS), min_size=1), st.one_of(FORMULAS, CELLS))
def test_no_cell_is_a_formula(cells, name):
    read = [row[0] for row in rows_of(csv_text(pd.DataFrame({name: cells}, dtype=object)))]
    for cell, found in zip([name, *cells], read, strict=True):
        risky = cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number(cell)
        assert found == (f"'{cell}" if risky else cell)


@given(st.lists(st.floats() | st.integers(), min_size=1))
def test_numbers_stay_numbers(values):
    frame = pd.DataFrame({"x": pd.Series(values, dtype=object), "text": [str(v) for v in values]})
    for row, value in zip(rows_of(csv_text(frame))[1:], values, strict=True):
        assert row[0] == row[1]
        assert float(row[0]) == value or math.isnan(value)


class Formula:
    def __str__(self):
        return "=1+1"


def test_an_object_that_reads_like_a_formula():
    assert rows_of(csv_text(pd.DataFrame({"x": [Formula(), None]}))) == [["x"], ["'=1+1"], [""]]


def test_the_index_is_written_if_it_has_a_name(tmp_path):
    frame = pd.DataFrame({"x": [1, 2]}, index=pd.Index(["L0H0", "=L0H1"], name="label"))
    write_csv(tmp_path / "t.csv", frame)
    with open(tmp_path / "t.csv", newline="") as file:
        assert list(csv.reader(file)) == [["label", "x"], ["L0H0", "1"], ["'=L0H1", "2"]]
    two = pd.MultiIndex.from_tuples([("a", 0), ("b", 1)], names=["stack", "layer"])
    assert rows_of(csv_text(pd.DataFrame({"x": [1, 2]}, two)))[1] == ["a", "0", "1"]
    assert rows_of(csv_text(pd.DataFrame({"x": [1]}))) == [["x"], ["1"]]


def test_provenance_names_what_can_change_a_number():
    assert {"python", "sat_lens", "torch", "transformer-lens"} <= library_versions().keys()
    assert Provenance("demo").versions == library_versions()
    assert str(Provenance("demo", "corpus", scale="inf")) == "demo, corpus, c = inf"
    assert str(Provenance("demo")) == "demo"


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    pair: tuple[int, float]
    choice: Literal["a", 3] | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Sample(Result, kind="a sample for tests"):
    values: Float[torch.Tensor, " n"]
    parts: tuple[Part, ...]
    by_name: dict[str, torch.Tensor]
    anything: Mapping[str, Any]
    names: frozenset[str] = frozenset()
    limit: float = math.inf
    seed: int | None = None
    complete: bool = True
    _summed = ("values", "by_name", "limit")

    def frame(self):
        return pd.DataFrame({"value": self.values.tolist()})


def sample(**changes):
    given = {
        "values": torch.tensor([1.0, math.nan]),
        "parts": (Part("x", (1, math.inf), None), Part("y", (2, math.nan), 3)),
        "by_name": {"a/b": torch.arange(3), "c": torch.ones(2, 2).T},
        "anything": {"mask": torch.zeros(1), "nested": [1, {"deep": torch.ones(2)}], "f": 0.5},
        "names": frozenset({"b", "a"}),
    }
    return Sample(Provenance("m", "d"), **{**given, **changes})


def test_fields_of_every_kind_come_back(tmp_path):
    made = sample()
    made.save(tmp_path / "r")
    for found in (sl.load(tmp_path / "r"), Sample.load(tmp_path / "r")):
        assert type(found) is Sample
        torch.testing.assert_close(found.values, made.values, equal_nan=True)
        assert (found.parts[0], found.parts[1].choice) == (made.parts[0], 3)
        assert math.isnan(found.parts[1].pair[1])
        assert all(torch.equal(found.by_name[k], v) for k, v in made.by_name.items())
        assert list(found.by_name) == ["a/b", "c"]
        assert torch.equal(found.anything["nested"][1]["deep"], torch.ones(2))
        assert (found.names, found.limit, found.seed) == (made.names, math.inf, None)
        assert found.provenance == made.provenance


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": "x"}, "seed"),
        ({"seed": True}, "seed"),
        ({"complete": 1}, "complete"),
        ({"limit": "far"}, "limit"),
        ({"values": {"$tensor": "nowhere"}}, "nowhere"),
        ({"values": {"$tensor": "by_name/a/b"}}, "values"),
        ({"values": [1.0]}, "values"),
        ({"parts": [{"name": "x"}]}, "pair"),
        ({"parts": [3]}, "parts/0"),
        ({"parts": [{"name": "x", "pair": [1, 2, 3], "choice": None}]}, ""),
        ({"parts": [{"name": "x", "pair": [1, 2], "choice": "b"}]}, "choice"),
        ({"more": 1}, "more"),
        ({"by_name": {"a": 1}}, "by_name/a"),
    ],
)
def test_entries_of_another_type_are_refused(tmp_path, change, words):
    sample().save(tmp_path / "r")
    tensors, meta = read_result(tmp_path / "r", "a sample for tests")
    write_result(tmp_path / "r", "a sample for tests", tensors, meta | change)
    with refusal("r lacks or garbles an entry", words):
        Sample.load(tmp_path / "r")


def test_a_kind_that_nobody_knows(tmp_path):
    write_result(tmp_path / "r", "a kind of my own", {}, {})
    with refusal("a kind of my own"):
        sl.load(tmp_path / "r")


def test_a_result_is_shown_in_a_few_lines():
    made = sample(complete=False)
    assert str(made) == repr(made)
    lines = str(made).splitlines()
    assert lines[0] == "A sample for tests of m, d"
    assert "interrupted" in lines[-1]
    assert "tensor" not in str(made)


@pytest.mark.usefixtures("types_unchecked")
def test_parts_add_up():
    values = {"values": torch.ones(2), "anything": {}, "limit": 1.0}
    one, two = sample(**values), sample(**values | {"limit": 2.0, "complete": False})
    whole = Sample.merge([one, two])
    assert whole.values.tolist() == [2.0, 2.0]
    assert whole.by_name["a/b"].tolist() == [0, 2, 4]
    assert (whole.limit, whole.complete, one.limit) == (3.0, False, 1.0)
    for wrong, words in (
        ([], "at least one"),
        ([one, one], "the same"),
        ([one, sample(**values, seed=3)], "seed differs"),
        ([one, 3], "found int"),
    ):
        with pytest.raises(sl.SatLensError, match=words):
            Sample.merge(wrong)


def test_every_kind_is_found_by_its_home():
    for kind, home in results._HOMES.items():
        module = importlib.import_module(home)
        assert getattr(module, results._KINDS[kind].__name__) is results._KINDS[kind]
    own = {k for k, made in results._KINDS.items() if made.__module__.startswith("sat_lens")}
    assert own == results._HOMES.keys()
