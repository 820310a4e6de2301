"""Parts that merge and parts that do not: settings, weights, files edited by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import sat_lens as sl
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.roles import HeadRoles, Thresholds, fingerprint, merge

SEQUENCES = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return tiny.native()


def measured(model, part=0, **kwargs):
    data = SEQUENCES[2 * part : 2 * part + 2]
    return sl.head_roles(model, data, progress=False, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 5},
        {"min_keys": 4},
        {"query_positions": [-1, 9]},
        {"thresholds": Thresholds(near=0.2)},
        {"damage": True},
        {"metric": "loss"},
    ],
)
def test_parts_of_other_settings_do_not_merge_from_files_either(model, tmp_path, change):
    measured(model).save(tmp_path / "one.st")
    measured(model, 1, **change).save(tmp_path / "two.st")
    parts = [HeadRoles.load(tmp_path / f"{name}.st") for name in ("one", "two")]
    name = {"metric": "weighted_by"}.get(next(iter(change)), next(iter(change)))
    with pytest.raises(ArgumentError, match=f"{name} differs"):
        merge(parts)


def test_what_was_asked_for_comes_back_from_a_file(model, tmp_path):
    roles = measured(model, rows="all", query_positions=range(8, 12))
    roles.save(tmp_path / "one.st")
    found = HeadRoles.load(tmp_path / "one.st")
    assert (found.rows, found.query_positions, found.damage) == ("all", (8, 9, 10, 11), False)
    assert found.fingerprint == roles.fingerprint == fingerprint(model)


def test_the_device_of_a_kernel_is_no_setting(tmp_path):
    model = tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE), "sdpa")
    parts = [sl.head_roles(model, tiny.tokens(seed=i), min_keys=2, progress=False) for i in (0, 1)]
    sites = [dataclasses.replace(site, runs_in=None) for site in sl.attention_sites(model)]
    assert {site.level for site in sites} == {"kernel"}
    for i, part in enumerate(parts):
        part.save(tmp_path / str(i))
        assert list(part.sites) == sites
    merged = sl.HeadRoles.merge([sl.load(tmp_path / str(i)) for i in (0, 1)])
    assert merged.n_sequences == sum(part.n_sequences for part in parts)


def test_parts_of_two_models_of_one_name_do_not_merge(model):
    other = tiny.native()
    assert fingerprint(other) == fingerprint(model)
    merge([measured(model), measured(other, 1)])
    with torch.no_grad():
        list(other.parameters())[-1].view(-1)[0] += 0.5
    assert fingerprint(other) != fingerprint(model)
    with pytest.raises(ArgumentError, match="different weights"):
        merge([measured(model), measured(other, 1)])


def test_a_fingerprint_sees_names_shapes_and_values_and_nothing_else():
    def of(values, name="weight"):
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(values))
        return fingerprint(module)

    values = torch.arange(24.0).view(4, 6)
    assert of(values) == of(values.clone())
    assert of(values.T.contiguous().T) == of(values)
    assert len({of(values), of(values.view(6, 4)), of(values, "bias"), of(values + 1)}) == 4
    assert of(values.bfloat16()) == of(values)
    assert of((values / 7).bfloat16()) != of(values / 7)
    assert of(torch.zeros(0)) != of(torch.zeros(1))


@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_result_is_not_merged_or_compared(model):
    roles = measured(model)
    with pytest.raises(ArgumentError, match="found str"):
        merge([roles, "roles.st"])
    for wrong in (roles.frame(), None, "roles.st"):
        with pytest.raises(ArgumentError, match=f"found {type(wrong).__name__}"):
            roles.compare(wrong)


def rewritten(path, tensors=None, meta=None):
    """Write the file anew with some tensors or entries replaced; None takes one out."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["sat_lens"])
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    held = {n: t for n, t in (held | (tensors or {})).items() if t is not None}
    header["meta"] = {n: v for n, v in (header["meta"] | (meta or {})).items() if v != "gone"}
    save_file(held, path, metadata={"sat_lens": json.dumps(header)})


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by_name/lean": torch.zeros(1)}, ""),
        ({"by_name/rows": None}, "by_name/rows"),
        ({"by_name/rows": torch.zeros(101, 5, dtype=torch.float64)}, r"\[101, 4\]; .* \[101, 5\]"),
        ({"by_name/tv_mean": torch.zeros(101, 4)}, "float64 .* found torch.float32"),
        ({"by_name/tv_mean": torch.zeros(101, 4, dtype=torch.long)}, "by_name/tv_mean must be"),
        ({"counted": torch.zeros(4, 1, dtype=torch.float64)}, "counted must be"),
        ({"histograms/c_lo": torch.zeros(4, 3, dtype=torch.float64)}, "histogram.c_lo"),
        ({"by_name/rows": torch.full((101, 4), torch.nan).double()}, "sum.rows is not finite"),
    ],
)
def test_tensors_edited_by_hand(model, tmp_path, changes, words):
    path = tmp_path / "edited.st"
    measured(model).save(path)
    site = sl.attention_sites(model)[1].path
    rewritten(path, {f"sums/{site}/{name}": tensor for name, tensor in changes.items()})
    if not words:
        assert HeadRoles.load(path).n_sequences == 2
        return
    with pytest.raises(FileFormatError, match=f"(?s)edited.st.*{words}"):
        HeadRoles.load(path)


@pytest.mark.parametrize(
    "meta",
    [
        {"n_sequences": "two"},
        {"n_sequences": -1},
        {"min_keys": None},
        {"rows": "some"},
        {"rows": 1.5},
        {"query_positions": 3},
        {"query_positions": ["x"]},
        {"thresholds": {"near": "wide"}},
        {"thresholds": {"nearer": 0.1}},
        {"fingerprint": "gone"},
        {"sites": [{"path": "blocks.0.attn"}]},
        {"sites": 5},
        {"provenance": {"colour": "red"}},
    ],
)
def test_entries_edited_by_hand(model, tmp_path, meta):
    path = tmp_path / "edited.st"
    measured(model).save(path)
    rewritten(path, meta=meta)
    with pytest.raises(FileFormatError, match=r"edited\.st"):
        HeadRoles.load(path)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rows": "x"}, "rows .* found 'x'"),
        ({"rows": 2.5}, r"rows .* found 2\.5"),
        ({"rows": True}, "rows .* found True"),
        ({"min_keys": 2.5}, r"min_keys .* found 2\.5"),
        ({"min_keys": "8"}, "min_keys .* found '8'"),
        ({"thresholds": {"near": 0.2}}, r"Thresholds\(near=0.2\); found dict"),
        ({"thresholds": 0.2}, "found float"),
        ({"shard": "1/2"}, "found '1/2'"),
        ({"shard": (1, 2, 3)}, r"found \(1, 2, 3\)"),
        ({"shard": (1.0, 2)}, r"found \(1\.0, 2\)"),
        ({"query_positions": 3}, "found 3"),
        ({"query_positions": "last"}, "found 'last'"),
        ({"query_positions": [0.5]}, r"found \[0\.5\]"),
        ({"batch_size": 1.5}, r"found 1\.5"),
    ],
)
def test_arguments_that_are_none(model, arguments, words):
    with pytest.raises(ArgumentError, match=words):
        sl.head_roles(model, SEQUENCES, progress=False, **arguments)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize("value", [1.5, -0.1, "x", None, True])
def test_thresholds_that_are_none(value):
    with pytest.raises(ArgumentError, match="near must lie in"):
        Thresholds(near=value)


def test_a_model_that_sees_the_next_token_has_no_loss():
    bert = tiny.reader("bert", "BertForMaskedLM", "BertConfig", "softmax", settings=tiny.SIZE)
    model = bert.build()
    for asked in ({"metric": "loss"}, {"damage": True}):
        with pytest.raises(ArgumentError, match="means nothing"):
            sl.head_roles(model, SEQUENCES, progress=False, **asked)
    roles = sl.head_roles(
        model, SEQUENCES, metric=lambda x: x[:, 3].norm(), damage=True, progress=False
    )
    assert roles.frame()["damage_zero"].notna().all()
