"""The figures of the paper: verdicts follow from numbers, and numbers from known cases."""

from __future__ import annotations

import html
import importlib
import math

import pandas as pd
import pytest
import tiny
import torch
import transformers
from matplotlib.figure import Figure
from torch import nn

from paper import (
    FIGURES,
    VERDICTS,
    Claim,
    Reproduction,
    direction,
    grid,
    heads,
    reproductions,
    rescaling,
    saturation,
    scaling,
)
from paper import norm_growth as growing
from paper.claims import write_page
from paper.language import LanguageRun, Setting, equal_steps
from paper.network import Shape, new_network, scores_of
from paper.network import saturation as measured_saturation
from sat_lens.errors import ArgumentError
from sat_lens.norms import norm_growth

HOLDS, CORRECTED, FAILS = VERDICTS
STEPS = [0, *(2**k for k in range(11))]


def verdicts(claims):
    return [claim.verdict for claim in claims]


def weights(vector):
    return nn.ModuleDict({"embed_tokens": nn.Embedding.from_pretrained(vector[None])})


def test_a_claim_needs_a_known_verdict_and_its_numbers(types_unchecked):
    assert Claim("It grows.", "holds", "1 to 2").verdict == "holds"
    with pytest.raises(ArgumentError, match="'true'"):
        Claim("It grows.", "true", "1 to 2")
    with pytest.raises(ArgumentError, match="numbers"):
        Claim("It grows.", "holds", " ")


def test_every_figure_has_a_module_and_others_are_refused():
    for module in FIGURES.values():
        assert callable(importlib.import_module(module).reproduce)
    with pytest.raises(ArgumentError, match=r"'nothing'.*norm-growth"):
        next(reproductions(["nothing"]))


@pytest.mark.parametrize(
    ("initial", "power", "expected"),
    [
        (0.0, 0.5, [HOLDS, HOLDS]),
        (40.0, 0.5, [HOLDS, CORRECTED]),
        (40.0, 1.0, [HOLDS, FAILS]),
        (40.0, 0.0, [FAILS, FAILS]),
    ],
    ids=["square root", "square root beside an initial norm", "linear", "no growth"],
)
def test_norms_of_known_laws_get_the_verdicts_that_they_deserve(initial, power, expected):
    # What grows stands at right angles to what was there, so squares add.
    checkpoints = {
        step: weights(torch.tensor([initial, 1.0 * step**power if step else 0.0])) for step in STEPS
    }
    growth = norm_growth(checkpoints, progress=False)
    assert verdicts(growing.judged(growth)) == expected


def path(make):
    steps = sorted({*STEPS, *equal_steps(STEPS[-1])})
    checkpoints = {step: weights(make(step)) for step in steps}
    run = LanguageRun(Setting(), 0, checkpoints, torch.zeros(1, 2, dtype=torch.long))
    growth = norm_growth({step: checkpoints[step] for step in STEPS}, progress=False)
    return direction.judged(
        direction.successive(run),
        growth.frame()[["rotation_per_doubling", "straightness", "random_walk"]],
    )


def test_a_straight_way_far_from_its_start_converges_in_direction():
    start, heading = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    assert verdicts(path(lambda step: start + 0.05 * step * heading)) == [HOLDS, HOLDS, HOLDS]


def test_a_random_walk_looks_alike_at_equal_spaces_and_does_not_converge():
    moves = torch.randn(STEPS[-1] + 1, 2000, generator=torch.Generator().manual_seed(0))
    walk = moves.cumsum(0)
    similar, converges, straight = path(lambda step: walk[step])
    assert (similar.verdict, converges.verdict) == (HOLDS, FAILS)
    # Each doubling turns a random walk by arccos(sqrt(1/2)), 45 degrees.
    assert 43 < float(converges.why.split(" degrees")[0]) < 47
    assert straight.verdict != HOLDS


def saturation_table(cos, control, lean):
    losses = {"loss": [7.0, 6.0, 5.0], "loss_saturated": [7.0, 6.5, 6.0]}
    table = {"cos_saturated": cos, "cos_random": control, "lean": lean} | losses
    table["S"] = [(c - r) / (1 - r) for c, r in zip(cos, control, strict=True)]
    return pd.DataFrame(table, index=pd.Index([0, 1, 2], name="step"))


@pytest.mark.parametrize(
    ("cos", "control", "expected"),
    [
        ([0.3, 0.6, 0.9], [0.3, 0.3, 0.3], [HOLDS, HOLDS]),
        ([0.9, 0.8, 0.7], [0.9, 0.7, 0.2], [CORRECTED, HOLDS]),
        ([0.3, 0.6, 0.9], [0.3, 0.6, 0.9], [FAILS, FAILS]),
    ],
    ids=["both rise", "only beside the control", "any hard attention"],
)
def test_saturation_is_judged_beside_its_control(cos, control, expected):
    claims = saturation.judged(saturation_table(cos, control, [0.0, 0.2, 0.4]))
    assert verdicts(claims) == [*expected, HOLDS]


def scaling_table(trained, random):
    rows = [
        {"grown": grown, "network": network, "c": c, "cos_saturated": near, "cos_random": control}
        for grown in (scaling.ALL, scaling.SCORES)
        for network, (start, control) in (("trained", trained), ("random initialisation", random))
        for c, near in ((1.0, start), (2.0, 0.95), (100.0, 0.999))
    ]
    table = pd.DataFrame(rows)
    room = 1 - table["cos_random"]
    table["S"] = ((table["cos_saturated"] - table["cos_random"]) / room).where(room >= 0.01)
    return table


@pytest.mark.parametrize(
    ("trained", "random", "expected"),
    [
        ((0.9, 0.1), (0.1, 0.1), HOLDS),
        ((0.66, 0.10), (0.957, 0.957), CORRECTED),
        ((0.5, 0.5), (0.5, 0.5), FAILS),
        ((0.999, 0.995), (0.1, 0.1), FAILS),
    ],
    ids=["nearer", "pretrained MiniLM under attention alone", "no nearer", "no room to tell"],
)
def test_trained_against_random(trained, random, expected):
    claims = scaling.judged(scaling_table(trained, random))
    assert verdicts(claims) == [HOLDS, expected, expected]


def grid_table(growth):
    rows = [
        {"lr": lr, "wd": wd, "growth": ratio, "outcome": grids_outcome(ratio)}
        for lr in (0.1, 0.2)
        for wd, ratio in zip((0.0, 0.01, 1.0), growth, strict=True)
    ]
    return pd.DataFrame(rows)


def grids_outcome(ratio):
    if math.isnan(ratio):
        return "diverged"
    return "grows" if ratio > 1.01 else "shrinks" if ratio < 0.99 else "stays"


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        ((1.5, 1.4, 0.5), [HOLDS, HOLDS]),
        ((1.5, 1.0, 0.5), [CORRECTED, HOLDS]),
        ((1.0, 0.9, 0.5), [FAILS, HOLDS]),
        ((1.5, 1.6, 1.7), [HOLDS, FAILS]),
        ((1.5, math.nan, 0.5), [HOLDS, HOLDS]),
        ((math.nan, math.nan, math.nan), [FAILS, FAILS]),
    ],
)
def test_grids_are_judged_by_the_cells_that_did_not_diverge(growth, expected):
    assert verdicts(grid.judged("sgd", grid_table(growth))) == expected


def test_the_right_mask_hides_the_future_exactly_and_the_other_does_not():
    tokens = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
    other = torch.cat([tokens[:, :20], tokens.flip(0)[:, 20:]], 1)
    for mask, hidden in (("infinite", True), ("multiplied", False)):
        model = new_network(Shape(), mask).eval()
        with torch.no_grad():
            same = torch.equal(model(tokens)[:, :20], model(other)[:, :20])
        assert same == hidden
        own, swapped = heads.future_losses(model, tokens)
        assert (own == swapped) == hidden


def negative_scores():
    """One layer, one head, whose visible scores are all negative and all different."""
    model = new_network(Shape(vocabulary=16, context=16, width=8, layers=1, heads=1), "multiplied")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.positions.zero_()
        base = torch.randn(8, generator=draw)
        model.embedding.copy_(base + 0.1 * torch.randn(16, 8, generator=draw))
        attention = model.blocks[0].attention
        attention.q.weight.copy_(torch.eye(8))
        attention.k.weight.copy_(-torch.eye(8))
    return model, torch.randperm(16, generator=draw)[None]


def test_zeros_win_where_all_visible_scores_are_negative():
    model, tokens = negative_scores()
    assert bool((scores_of(model, tokens)[0].tril() <= 0).all())
    table = heads.mask_table(model, "multiplied", tokens).set_index("masked_by")
    # Row q attends to the 15 - q future keys; the last row has none, and attends to one key.
    counts = [15 - q for q in range(7, 15)] + [1]
    assert table.loc[heads.OWN, "positions"] == pytest.approx(sum(counts) / 9)
    assert table.loc[heads.OWN, "future"] == pytest.approx(8 / 9)
    for way in (heads.RIGHT, heads.RIGHT_THROUGHOUT):
        assert table.loc[way, "positions"] == table.loc[way, "single"] == 1
        assert table.loc[way, "future"] == 0


def test_a_network_whose_attention_is_hard_already_is_its_own_saturated_version():
    tokens = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
    model = new_network(Shape())
    with torch.no_grad():
        for block in model.blocks:
            block.attention.q.weight.mul_(1e5)
    found = measured_saturation(model, tokens)
    assert found["S"] == pytest.approx(1, abs=1e-3)
    assert found["lean"] == pytest.approx(1, abs=1e-3)
    assert found["cos_random"] < 0.9


def heads_table(own, repaired):
    parts = [
        (heads.LANGUAGE, heads.OWN, [1.0, 1.0]),
        ("multiplied", heads.OWN, own),
        ("multiplied", heads.RIGHT, repaired),
        ("infinite", heads.OWN, [1.0, 1.0]),
    ]
    fixed = {"head": "L0H0", "visible": 20.0, "role": "soft", "future_soft": 0.5}
    rows = [
        {"trained_with": network, "masked_by": way, "positions": count} | fixed
        for network, way, counts in parts
        for count in counts
    ]
    return pd.DataFrame(rows)


def rescaling_table(raw, minimal):
    table = pd.DataFrame({"raw": raw, "minimal": minimal}, index=pd.Index([0, 8], name="step"))
    table["share"] = 1 - table["minimal"] / table["raw"]
    return table.assign(share_qk=0.1, share_vo=0.1, share_mlp=0.1, share_of_model=0.01)


@pytest.mark.parametrize(
    ("raw", "minimal", "expected"),
    [
        ([10.0, 30.0], [9.0, 29.0], HOLDS),
        ([10.0, 30.0], [10.0, 24.0], CORRECTED),
        ([10.0, 30.0], [10.0, 10.0], FAILS),
        ([10.0, 8.0], [9.0, 7.0], FAILS),
    ],
    ids=["balanced grows as well", "in part", "mere rescaling", "no growth"],
)
def test_growth_is_judged_by_what_balancing_leaves(raw, minimal, expected):
    assert verdicts(rescaling.judged(rescaling_table(raw, minimal))) == [expected]


def test_rescaling_a_pair_is_all_of_the_growth_that_it_makes():
    config = transformers.LlamaConfig(**tiny.SIZE)
    models = {step: tiny.hf_model("LlamaForCausalLM", config) for step in (0, 8)}
    models[8].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        for layer in models[8].model.layers:
            layer.self_attn.v_proj.weight.mul_(8)
            layer.self_attn.o_proj.weight.div_(8)
    run = LanguageRun(Setting(), 0, models, tiny.tokens())
    table = rescaling.measured(run)
    assert table.loc[8, "minimal"] == pytest.approx(table.loc[0, "minimal"])
    assert table.loc[8, "raw"] > 2 * table.loc[0, "raw"]
    assert table.loc[8, "share_qk"] == pytest.approx(table.loc[0, "share_qk"])
    assert verdicts(rescaling.judged(table)) == [FAILS]


@pytest.mark.parametrize(
    ("own", "repaired", "expected"),
    [([1.0, 15.0], [1.0, 1.0], FAILS), ([1.0, 15.0], [1.0, 15.0], HOLDS), ([1.0], [1.0], HOLDS)],
    ids=["made by the mask", "outlive the right mask", "never there"],
)
def test_the_mask_is_named_only_where_it_makes_the_difference(own, repaired, expected):
    losses = {"multiplied": (1.0, 1.0), "infinite": (1.0, 1.0)}
    assert verdicts(heads.judged(heads_table(own, repaired), losses)) == [FAILS, expected, HOLDS]
    losses["multiplied"] = (1.0, 2.0)
    assert heads.judged(heads_table(own, repaired), losses)[2].verdict == FAILS


def test_a_page_escapes_what_it_shows_and_loads_nothing(tmp_path):
    hostile = "<script>alert(1)</script>"
    claim = Claim(hostile, "holds with a correction", f'{hostile}" onload="x')
    figure = Reproduction(
        "norm-growth", hostile, (claim,), pd.DataFrame({"a": [1]}), Figure(), hostile
    )
    page = write_page(tmp_path, [figure], complete=False).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5
    assert "interrupted" in page
    assert "holds with a correction" in page
    assert "default-src 'none'" in html.unescape(page)
    assert 'src="http' not in page


def test_attention_is_what_pytorch_computes():
    shape = Shape(width=12, heads=3)
    attention = new_network(shape).blocks[0].attention
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    heads_apart = [(x @ part.weight.T).unflatten(-1, (3, 4)).transpose(1, 2)
                   for part in (attention.q, attention.k, attention.v)]  # fmt: skip
    mixed = nn.functional.scaled_dot_product_attention(*heads_apart, is_causal=True)
    expected = mixed.transpose(1, 2).flatten(2) @ attention.o.weight.T
    torch.testing.assert_close(attention(x, None), expected)
