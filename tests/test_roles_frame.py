"""The table of roles: its columns, what they may hold, and the damage of replacements."""

from __future__ import annotations

import inspect
import math

import pytest
import tiny
import torch

import sat_lens as sl
from sat_lens.attention import Limit, Uniform
from sat_lens.roles import HeadRoles, merge
from sat_lens.roles.rule import IDEAL
from sat_lens.vocabulary import ROLES

TOKENS = tiny.tokens(4, 14)
SHARES = [
    "tv_argmax",
    "tv_mean",
    "tv_nearest",
    "lean",
    "m_share",
    "n_eff_share",
    "sink_mass",
    "lean_no_sink",
    "modal_share",
    "modal_mass",
    "previous",
    "self",
    "next",
    "first",
    "induction",
    "duplicate",
    "agreement",
]


@pytest.fixture(scope="module")
def model():
    return tiny.native()


@pytest.fixture(scope="module")
def damaged(model):
    return sl.head_roles(model, TOKENS, damage=True, progress=False)


def documented():
    """Give the names in the first column of the table in the docstring of frame()."""
    lines = inspect.getdoc(HeadRoles.frame).splitlines()
    start, head, end = (i for i, line in enumerate(lines) if line.startswith("==="))
    assert head == start + 2
    cells = [line[:18].rstrip(", ") for line in lines[head + 1 : end]]
    return ", ".join(filter(None, cells)).split(", ")


def test_every_column_is_documented_in_its_place(damaged):
    assert documented() == list(damaged.frame().columns)
    assert damaged.frame().index.name == "label"


def test_columns_are_the_same_whatever_the_model_and_the_data(model, demo):
    plain = list(sl.head_roles(model, TOKENS, progress=False).frame().columns)
    damage = [name for name in documented() if "damage" in name]
    assert plain == [name for name in documented() if name not in damage]
    other = sl.head_roles(demo, ["import os, sys, re, json"], metric="loss", progress=False)
    assert list(other.frame().columns) == plain


def test_numbers_lie_where_they_are_said_to(damaged):
    frame = damaged.frame()
    assert ((frame[SHARES] >= 0) & (frame[SHARES] <= 1 + 1e-6)).all(axis=None)
    assert (frame["median_m"] >= 1).all()
    assert ((frame["c_lo"] > 0) & (frame["c_hi"] > frame["c_lo"])).all()
    assert frame["modal_offset"].between(-64, 0).all()
    assert (frame["lean_se"] > 0).all()
    assert set(frame["role"]) <= set(ROLES)
    for flag in ("saturable_exact", "saturable_nearest", "sink"):
        assert frame[flag].dtype == bool
    # No tokenizer, so no token is known to be special; the first one is a sink still.
    assert frame["special"].max() == 0
    assert frame["sink_mass"].tolist() == pytest.approx(frame["first"].tolist())


def test_every_head_of_no_distance_has_a_lean_in_range(model):
    with sl.replace_attention(model, Uniform()):
        frame = sl.head_roles(model, TOKENS, progress=False).frame()
    assert frame["tv_mean"].min() >= 0
    assert frame["lean"].between(0, 1e-6).all()


@pytest.mark.parametrize("metric", [None, "custom"])
def test_damage_is_that_of_the_replaced_pattern(model, metric):
    def value(logits):
        return logits[:, -1, 7].mean() - logits[:, -1, 9].mean()

    chosen = value if metric else sl.metrics.next_token_loss(TOKENS)
    kwargs = {"metric": value} if metric else {}
    frame = sl.head_roles(model, TOKENS, damage=True, progress=False, **kwargs).frame()
    replacements = {"argmax": Limit(), "uniform": Uniform(), "nearest": Limit("nearest")}
    # No tokenizer: of the sinks only the first key is known.
    replacements["no_sink"] = lambda scores: (
        Uniform()(scores)
        .index_fill(-1, torch.tensor(0), -math.inf)
        .where((torch.arange(scores.shape[-2]) > 0)[:, None], scores)
    )
    with torch.no_grad():
        soft = float(chosen(model(TOKENS)))
        for label in ("L0H1", "L1H3"):
            for name, transform in replacements.items():
                with sl.replace_attention(model, transform, label):
                    rise = float(chosen(model(TOKENS))) - soft
                assert frame.loc[label, f"damage_{name}"] == pytest.approx(rise, abs=1e-5)
            hook = f"blocks.{label[1]}.attn.hook_z"

            def zero(z, hook, head=int(label[3])):
                z[:, :, head] = 0
                return z

            zeroed = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, zero)])
            rise = float(chosen(zeroed)) - soft
            assert frame.loc[label, "damage_zero"] == pytest.approx(rise, abs=1e-5)


def test_the_relative_damage_is_that_of_the_roles_own_ideal(model, damaged):
    frame = damaged.frame()
    assert set(IDEAL) == set(ROLES)
    assert len(set(frame["role"])) > 1
    for _, row in frame.iterrows():
        own = row[f"damage_{IDEAL[row['role']]}"]
        needed = abs(row["damage_zero"]) > 2 * row["damage_zero_se"]
        wanted = own / row["damage_zero"] if needed else math.nan
        assert row["relative_damage"] == pytest.approx(wanted, nan_ok=True)
    assert frame["relative_damage"].notna().any()
    alone = sl.head_roles(model, TOKENS[:1], damage=True, progress=False).frame()
    assert alone[["damage_zero_se", "relative_damage"]].isna().all(axis=None)


def test_damage_merges_and_is_kept_in_files(model, damaged, tmp_path):
    for i, part in enumerate(TOKENS.split(1)):
        sl.head_roles(model, part, damage=True, progress=False).save(tmp_path / f"{i}.st")
    merged = merge([HeadRoles.load(tmp_path / f"{i}.st") for i in range(4)]).frame()
    for name in [name for name in documented() if name.startswith("damage_")]:
        assert merged[name].tolist() == pytest.approx(damaged.frame()[name].tolist(), abs=1e-5)


def test_a_saturated_head_is_not_damaged_by_what_it_already_is(model):
    def previous(scores):
        keys = (torch.arange(scores.shape[-2]) - 1).clamp(min=0)
        return torch.nn.functional.one_hot(keys, scores.shape[-1]) * 100.0 + 0 * scores.clamp(max=0)

    with sl.replace_attention(model, previous, "L1H2"):
        frame = sl.head_roles(model, TOKENS, damage=True, progress=False).frame()
    row = frame.loc["L1H2"]
    assert (row["role"], row["target"]) == ("argmax", "previous")
    assert row[["damage_argmax", "damage_nearest"]].abs().max() < 1e-5
    assert abs(row["damage_uniform"]) > 1e-3
    assert not abs(row["relative_damage"]) >= 0.05
