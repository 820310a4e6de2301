"""Which rows and keys the statistics of roles are about: none, those of blocks, of two texts."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.errors import ArgumentError
from sat_lens.roles.positions import as_rows
from sat_lens.roles.result import head_row
from sat_lens.roles.rule import Thresholds, lean, role_of
from sat_lens.roles.sums import Sums
from sat_lens.sites import AttentionSite
from sat_lens.vocabulary import DESCRIPTIONS

DISTANCES = ["modal_offset", "modal_share", "modal_mass", "previous", "self", "next", "first"]
SHAPES = ["tv_argmax", "tv_mean", "tv_nearest", "lean", "n_eff_share"]
PAIR = {"input": tiny.tokens(3, 12), "decoder_input": tiny.tokens(3, 9, seed=1)}


def frame_of(model, data, **kwargs):
    return sl.head_roles(model, data, **{"min_keys": 2, "progress": False} | kwargs).frame()


@pytest.mark.slow
def test_a_head_without_a_counted_row_has_no_role_and_no_numbers():
    site = AttentionSite("blocks.0.attn", "", 0, "self", 1, "scores")
    row = head_row(site, 0, Sums.empty(1), Thresholds())
    named = {"label", "stack", "layer", "head", "n_rows"}
    words = {"role": "", "target": "", "second_target": "", "role_no_sink": ""}
    flags = dict.fromkeys(("saturable_exact", "saturable_nearest", "sink"), False)
    assert row["n_rows"] == 0
    assert {name: row[name] for name in words | flags} == words | flags
    left = row.keys() - named - words.keys() - flags.keys()
    assert all(math.isnan(row[name]) for name in left)
    assert DESCRIPTIONS[role_of(math.nan, math.nan, math.nan, math.nan)] == "no row counted"
    assert math.isnan(lean(math.nan, math.nan))


@pytest.mark.slow
def test_a_stack_without_a_counted_row_stays_without_a_role_everywhere(tmp_path):
    # Six keys a row in the encoder and across, and at least eight are asked for.
    bart = zoo.model_of("bart")
    few = {"input": tiny.tokens(2, 6), "decoder_input": tiny.tokens(2, 20, seed=1)}
    roles = sl.head_roles(bart, [few], progress=False)
    frame = roles.frame()
    assert set(frame.loc[frame["stack"] != "decoder", "role"]) == {""}
    assert set(frame.loc[frame["stack"] == "decoder", "role"]) <= set(DESCRIPTIONS) - {""}
    assert not frame.loc["encoder.L0H0", ["saturable_exact", "saturable_nearest"]].any()
    assert not roles.compare(roles)["changed"].any()
    roles.plot()
    roles.save(tmp_path / "roles.st")
    assert sl.roles.HeadRoles.load(tmp_path / "roles.st").frame().equals(frame)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", everyday(["longt5_local", "longt5_global", "t5gemma2", "led", "bart"], "bart")
)
def test_distances_are_told_only_where_rows_and_keys_are_of_one_sequence(name):
    frame = frame_of(zoo.model_of(name), [PAIR])
    odd = frame["stack"] == "cross"
    if name != "bart":
        blocked = {"t5gemma2": "decoder"}.get(name, "encoder")
        odd |= frame["stack"] == blocked
    assert 0 < odd.sum() < len(frame)
    assert frame.loc[odd, [*DISTANCES, "induction", "duplicate"]].isna().all(axis=None)
    assert frame.loc[~odd, DISTANCES].notna().all(axis=None)
    assert set(frame.loc[odd, "target"]) <= {"", "special"}
    assert frame[SHAPES].notna().all(axis=None)
    # The tokens behind the keys are known in cross-attention, and in blocks they are not.
    assert frame.loc[frame["stack"] == "cross", "special"].notna().all()
    assert frame.loc[odd & (frame["stack"] != "cross"), "special"].isna().all()


@pytest.mark.slow
def test_a_window_as_long_as_the_text_is_no_learned_sink():
    # Four tokens, a window of four: five keys a row, like four and a sink.
    batch = {"input": tiny.tokens(2, 4), "decoder_input": tiny.tokens(2, 4, seed=1)}
    frame = frame_of(zoo.model_of("led"), [batch])
    assert frame.loc[frame["stack"] == "encoder", DISTANCES].isna().all(axis=None)
    assert frame.loc[frame["stack"] == "decoder", DISTANCES].notna().all(axis=None)
    sink = frame_of(zoo.model_of("gpt_oss_sink"), tiny.tokens(2, 4))
    assert sink[DISTANCES].notna().all(axis=None)


@pytest.mark.slow
def test_padding_in_blocks_is_not_counted():
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = 0
    model = zoo.model_of("longt5_local")
    counted = frame_of(model, [PAIR | {"attention_mask": mask}], rows="all")["n_rows"]
    assert set(counted["encoder.L0H0":"encoder.L1H3"]) == {12 + 7 + 12}
    # Ten tokens in blocks of four: what fills the third is no row of the text.
    short = {"input": tiny.tokens(2, 10), "decoder_input": tiny.tokens(2, 9, seed=1)}
    assert set(frame_of(model, [short], rows="all")["n_rows"]["encoder.L0H0":"encoder.L1H3"]) == {
        20
    }


@pytest.mark.slow
def test_query_positions_are_those_of_the_text_in_blocks_too():
    model = zoo.model_of("longt5_local")
    frame = frame_of(model, [PAIR], query_positions=[1, 7])
    assert set(frame["n_rows"]) == {6}
    # Blocks of four: position 7 is the last row of the second.
    whole, parts = (
        frame_of(model, [PAIR], query_positions=chosen, rows="all")
        for chosen in ([6, 7], range(4, 8))
    )
    assert set(whole["n_rows"]["encoder.L0H0":"encoder.L1H3"]) == {6}
    assert set(parts["n_rows"]["encoder.L0H0":"encoder.L1H3"]) == {12}


@pytest.mark.slow
def test_importance_reaches_the_rows_of_blocks():
    model = zoo.model_of("longt5_local")

    def metric(logits):
        return logits[:, -1, 5].sum()

    frame = frame_of(model, [PAIR], metric=metric)
    assert set(frame["n_rows"]["encoder.L0H0":"encoder.L1H3"]) == {36}
    assert frame["tv_argmax"].notna().all()


@pytest.mark.slow
def test_values_of_positions_come_into_rows():
    values = torch.arange(1, 11).view(2, 5)
    assert as_rows(values, (2, 5)).equal(values)
    assert as_rows(values, (2, 2)).tolist() == [[4, 5], [9, 10]]
    blocks = as_rows(values[:, None].expand(2, 3, 5), (4, 3))
    assert blocks[:, 2].tolist() == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [9, 10, 0]]
    assert as_rows(values, (2, 8)).tolist() == [[*row, 0, 0, 0] for row in values.tolist()]
    assert as_rows(values, (3, 5)) is None
    assert as_rows(values, (6, 3)) is None


def test_query_positions_of_rows_that_cannot_be_told_are_refused():
    from sat_lens.data import Batch
    from sat_lens.roles.positions import BatchReader

    batch = Batch(tiny.tokens(2, 6), {}, tokens=tiny.tokens(2, 6))
    reader = BatchReader(batch, torch.tensor([-1]), [0], 64, None)
    site = AttentionSite("blocks.0.attn", "", 0, "self", 1, "scores")
    with pytest.raises(ArgumentError, match="cannot be told"):
        reader.positions(site, torch.zeros(6, 1, 3, 9))


@pytest.mark.slow
def test_a_row_uniform_over_most_keys_is_a_subset_of_more_than_a_few():
    # 14 of 20 keys: .3 away from uniform over all, nothing away from uniform over its own.
    row = torch.full((20,), -60.0)
    row[:14] = 0
    found = sl.attention.distances_to_saturated(row)
    role = role_of(*(float(x) for x in (found.tv_argmax, found.tv_mean, found.tv_nearest, found.m)))
    assert float(found.tv_mean) == pytest.approx(0.3, abs=1e-5)
    assert (role, int(found.m)) == ("subset", 14)
    assert "few" not in DESCRIPTIONS[role]


def looking(model, keys_of_rows):
    """Measure a causal model of which each row of every head looks at a key that is given."""
    length = len(keys_of_rows)

    def transform(scores):
        wanted = torch.nn.functional.one_hot(keys_of_rows, length) * 100.0
        return scores.clamp(max=0) * 0 + wanted

    with sl.replace_attention(model, transform):
        return frame_of(model, tiny.tokens(3, length), rows="all")


@pytest.mark.slow
def test_maxima_far_away_have_no_common_offset():
    model = tiny.native(n_ctx=200)
    rows = torch.arange(200)
    # Seven eighths of the rows look at many places more than 64 away, the rest at the last token.
    places = torch.rand(200, generator=torch.Generator().manual_seed(1)) * (rows - 64)
    far = torch.where((rows < 70) | (rows % 8 == 0), rows - 1, places.long()).clamp(min=0)
    row = looking(model, far).loc["L0H0"]
    previous = float((far[1:] == rows[1:] - 1).float().mean())
    assert (row["role"], row["target"], row["modal_offset"]) == ("argmax", "", -1)
    assert row["modal_share"] == pytest.approx(previous, abs=1e-6)
    assert row["modal_mass"] == pytest.approx(previous, abs=1e-6)
    assert 0.3 < previous < 0.5
    everywhere = looking(model, torch.where(rows < 65, rows - 64, places.long()).clamp(min=0))
    assert everywhere.loc["L0H0", "modal_share"] < 0.5
    assert everywhere.loc["L0H0", "target"] in ("", "first")


@pytest.mark.slow
def test_the_mass_at_the_modal_offset_is_that_of_the_pattern():
    rows = torch.arange(24)
    row = looking(tiny.native(), (rows - 3).clamp(min=0)).loc["L1H2"]
    assert (row["target"], row["modal_offset"]) == ("offset -3", -3)
    assert row["modal_share"] == row["modal_mass"] == pytest.approx(21 / 23)


@pytest.mark.slow
def test_a_learned_sink_is_at_no_offset():
    model = zoo.case("gpt_oss_sink").build()
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(50.0)
    frame = frame_of(model, tiny.tokens(2, 12))
    assert set(frame["role"]) == {"argmax"}
    assert set(frame["target"]) == {""}
    assert frame["modal_offset"].isna().all()
    assert frame["modal_mass"].isna().all()
    assert (frame["modal_share"] == 0).all()
    assert frame[["previous", "self", "next", "first"]].abs().max(axis=None) < 1e-6


@pytest.mark.slow
def test_mass_on_sinks_is_flagged_at_the_threshold():
    rows = torch.arange(12)
    model = tiny.native()
    first = looking(model, torch.zeros_like(rows))
    assert first["sink"].all()
    assert (first["sink_mass"] > 0.99).all()
    assert not looking(model, (rows - 1).clamp(min=0))["sink"].any()
    roles = sl.head_roles(model, tiny.tokens(2, 12), progress=False)
    mass = roles.frame()["sink_mass"]
    limit = float(mass.median())
    flagged = sl.head_roles(
        model, tiny.tokens(2, 12), thresholds=Thresholds(sink=limit), progress=False
    ).frame()["sink"]
    assert flagged.tolist() == (mass >= limit).tolist()
