"""Files of sweeps and searches: whatever somebody does to them gets an error that says what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tokens
from zoo import model_of

import sat_lens as sl
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.patching import HeadSweep, SaturableHeads, saturable_heads, sweep_heads
from sat_lens.results import Provenance, read_result, write_result

QUIET: dict[str, Any] = {"progress": False}
METRIC = sl.metrics.logit_difference([7] * 2, [9] * 2)


@pytest.fixture(scope="module")
def sweep() -> HeadSweep:
    return sweep_heads(
        model_of("gpt2").eval(),
        tokens(),
        METRIC,
        heads=["L0H0", "L1H1"],
        positions=[0, -1],
        reduce=None,
        baseline="random",
        controls=2,
        **QUIET,
    )


def without(name: str) -> Any:
    return lambda tensors, meta: (tensors if name in tensors else meta).pop(name)


def tensor(name: str, change: Any) -> Any:
    return lambda tensors, meta: tensors.update({name: change(tensors[name])})


def entry(*path: Any, value: Any) -> Any:
    def change(tensors: Any, meta: Any) -> None:
        inside = meta
        for name in path[:-1]:
            inside = inside[name]
        inside[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without("soft"), "soft"),
        (without("items"), "items"),
        (tensor("soft", lambda t: t[:1]), "saturated"),
        (tensor("soft", lambda t: t[:, None]), "soft"),
        (tensor("saturated", lambda t: t.long()), "saturated"),
        (tensor("item_values", lambda t: t[:, :1]), "item_values"),
        (tensor("item_values", lambda t: t[..., 0]), "item_values"),
        (tensor("confirmed", lambda t: t.float()), "confirmed"),
        (tensor("confirmed", lambda t: t[:1]), "confirmed"),
        (tensor("random_values", lambda t: t[0]), "random_values"),
        (entry("items", value=[]), "items"),
        (entry("items", 0, "layer", value=9), "no head"),
        (entry("items", 0, "head", value="1"), "'str'"),
        (entry("items", 1, "label", value="L0H0"), "repeat"),
        (entry("items", 1, "label", value=3), "label"),
        (entry("items", 0, value="L0H0"), ""),
        (entry("shapes", value={"": [2]}), ""),
        (entry("shapes", value={}), ""),
        (entry("positions", value=[0]), "item_values"),
        (entry("positions", value="each"), "int"),
        (entry("arguments", value=[1]), ""),
        (entry("arguments", "direction", value="sideways"), "direction"),
        (entry("arguments", "method", value=["exact"]), "method"),
        (entry("arguments", "transform", value=3), "transform"),
        (entry("provenance", value=None), ""),
        (entry("checks", "colour", value="red"), "colour"),
    ],
)
def test_a_sweep_that_somebody_changed_is_refused(
    sweep: HeadSweep, change: Any, word: str, tmp_path: Path, types_unchecked: None
) -> None:
    path = tmp_path / "sweep"
    sweep.save(path)
    tensors, meta = read_result(path, "head sweep")
    change(tensors, meta)
    write_result(path, "head sweep", tensors, meta)
    with pytest.raises(FileFormatError, match=f"lacks or garbles an entry.*{word}"):
        HeadSweep.load(path)


def test_a_sweep_comes_back_whole(sweep: HeadSweep, tmp_path: Path) -> None:
    sweep.save(tmp_path / "sweep")
    loaded = HeadSweep.load(tmp_path / "sweep")
    assert loaded.frame().equals(sweep.frame())
    for field in dataclasses.fields(HeadSweep):
        first, second = getattr(sweep, field.name), getattr(loaded, field.name)
        same = torch.equal(first, second) if isinstance(first, torch.Tensor) else None
        assert same is True or field.name in ("inputs", "checks") or first == second, field.name


@pytest.mark.parametrize("path", ["", ".", "/", "a\0b"])
def test_a_path_that_names_no_file(sweep: HeadSweep, path: str) -> None:
    with pytest.raises(FileFormatError, match="names no file"):
        sweep.save(path)


def test_a_path_of_another_type(sweep: HeadSweep, types_unchecked: None) -> None:
    with pytest.raises(FileFormatError, match="None was given"):
        sweep.save(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"), [("order", ["L0H0"]), ("tolerance", "much"), ("soft", None)]
)
def test_a_search_result_that_somebody_changed(field: str, value: Any, tmp_path: Path) -> None:
    found = SaturableHeads(
        Provenance("a model"),
        "noising",
        0.1,
        1.0,
        2.0,
        ("L0H0", "L0H1"),
        torch.tensor([1.0, 1.5]),
        2,
    )
    found.save(tmp_path / "found")
    tensors, meta = read_result(tmp_path / "found", "saturable heads")
    write_result(tmp_path / "found", "saturable heads", tensors, meta | {field: value})
    with pytest.raises(FileFormatError, match="lacks or garbles"):
        SaturableHeads.load(tmp_path / "found")


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept["steps"].append(["L9H9", 1.0]),
        lambda kept: kept["steps"].append(kept["steps"][0]),
        lambda kept: kept["steps"].append(["L0H1"]),
        lambda kept: kept["known"].pop("L0H0"),
        lambda kept: kept["known"].update(L0H0=float("nan")),
        lambda kept: kept.update(known=[]),
        lambda kept: kept.update(asked=None),
        lambda kept: kept.update(steps=7),
        lambda kept: kept.pop("kind"),
    ],
)
def test_a_search_file_that_somebody_changed(change: Any, tmp_path: Path) -> None:
    model, file = model_of("gpt2").eval(), tmp_path / "search.json"
    arguments: dict[str, Any] = {"heads": ["L0H0", "L0H1", "L1H0"], "state": file, **QUIET}
    saturable_heads(model, tokens(), METRIC, 0.0, full_curve=True, **arguments)
    kept = json.loads(file.read_text())
    change(kept)
    file.write_text(json.dumps(kept))
    with pytest.raises(FileFormatError):
        saturable_heads(model, tokens(), METRIC, 0.0, **arguments)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b"null"])
def test_a_foreign_search_file(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match="holds no search"):
        saturable_heads(model_of("gpt2").eval(), tokens(), METRIC, 0.0, "L0H0", state=file, **QUIET)


def test_a_search_that_cannot_be_kept_is_not_begun(tmp_path: Path) -> None:
    calls = 0

    def metric(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return logits[..., 3].mean()

    with pytest.raises(FileFormatError, match="cannot be written"):
        saturable_heads(
            model_of("gpt2").eval(), tokens(), metric, 0.0, state=tmp_path / "no" / "f", **QUIET
        )
    assert calls == 2, "the soft and the saturated run alone"


@pytest.mark.parametrize("wrong", [{"candidates": 1.5}, {"candidates": "x"}, {"state": 3}])
def test_arguments_of_a_search_of_another_kind(
    wrong: dict[str, Any], types_unchecked: None
) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        saturable_heads(model_of("gpt2").eval(), tokens(), METRIC, 0.0, **wrong, **QUIET)


@pytest.mark.parametrize("wrong", [{"confirm": "x"}, {"seed": "x"}, {"model": "demo"}])
def test_arguments_of_a_sweep_of_another_kind(wrong: dict[str, Any], types_unchecked: None) -> None:
    given = {"model": model_of("gpt2").eval(), "inputs": tokens(), "metric": METRIC, **wrong}
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        sweep_heads(**given, **QUIET)
