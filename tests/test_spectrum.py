"""The scaling curve: what must hold at c = 1, what it agrees with, what it refuses."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

import sat_lens as sl
from sat_lens.data import batches, predicts_next
from sat_lens.errors import ArgumentError, DataError, FileFormatError, NonFiniteError
from sat_lens.figures.drawing import measure_groups
from sat_lens.norms import saturation_measures
from sat_lens.results import Provenance, read_result, write_result
from sat_lens.spectrum import DEFAULT_SCALES, ScalingCurve

TEXT = "def area(width, height):\n    return width * height\n"
TEXTS = [TEXT, "import os, sys, re", "x = 1 + 2 + 3"]


def refusal(kind, *words):
    assert issubclass(kind, sl.SatLensError)
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def curve_of(model, data, **kwargs):
    return sl.scaling_curve(model, data, progress=False, **kwargs)


def test_a_scale_of_one_changes_nothing(demo):
    frame = curve_of(
        demo, TEXTS, scales=[1, 4.0], metric=lambda logits: logits[:, 0].norm()
    ).frame()
    row = frame.loc[1.0]
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    assert row["top1"] == 1
    similarities = frame.filter(like="S_").loc[1.0]
    assert len(similarities) == demo.cfg.n_layers
    assert (similarities.dropna() - 1).abs().max() < 1e-6
    assert frame.loc[4.0, "kl"] > 1e-3


def test_scales_keep_their_order(demo):
    scales = [math.inf, 0.0, 1.0, 0.5]
    curve = curve_of(demo, TEXT, scales=scales)
    assert curve.scales == tuple(scales)
    assert curve.frame().index.tolist() == scales
    backwards = curve_of(demo, TEXT, scales=scales[::-1]).frame()
    assert_frame_equal(curve.frame(), backwards[::-1])
    assert curve_of(demo, TEXT).scales == DEFAULT_SCALES


@pytest.mark.parametrize("heads", [None, "L1H0", ["L0H1", "L2H3"]])
def test_each_row_is_a_run_inside_saturate(demo, heads):
    tokens = demo.to_tokens(TEXT)
    metric = sl.metrics.logit_difference(5, 6)
    frame = curve_of(demo, tokens, scales=[0, 3.0, math.inf], heads=heads, metric=metric).frame()
    with torch.no_grad():
        soft = demo(tokens)
        for scale, row in frame.iterrows():
            with sl.saturate(demo, heads, scale):
                logits, loss = demo(tokens), demo(tokens, return_type="loss")
            assert row["loss"] == pytest.approx(float(loss), abs=1e-5)
            assert row["metric"] == pytest.approx(float(metric(logits)), abs=1e-5)
            kl = float(sl.metrics.kl_to_soft(soft)(logits))
            assert row["kl"] == pytest.approx(kl, abs=1e-5)
            same = (soft.argmax(-1) == logits.argmax(-1)).float().mean()
            assert row["top1"] == pytest.approx(float(same))


@pytest.mark.parametrize("heads", [None, "L0H1"])
def test_similarities_are_those_of_the_pair(demo, heads):
    frame = curve_of(demo, TEXT, scales=[0.5, math.inf], heads=heads).frame()
    for scale, row in frame.iterrows():
        with torch.no_grad():
            pair = sl.run_with_saturation_cache(demo, TEXT, heads=heads, scale=scale)
        similarity, layers = pair.similarity("resid_post"), range(demo.cfg.n_layers)
        found = row[[f"S_L{layer}" for layer in layers]].tolist()
        assert found == pytest.approx(similarity.s.tolist(), abs=1e-4, nan_ok=True)
        control = row[[f"cos_random_L{layer}" for layer in layers]].tolist()
        assert control == pytest.approx(similarity.cos_random.tolist(), abs=1e-5)


def test_only_what_heads_can_change_changes(demo):
    frame = curve_of(demo, TEXT, scales=[math.inf], heads="L2H0").frame()
    assert frame.filter(["S_L0", "S_L1"]).isna().all(axis=None)
    all_heads = curve_of(demo, TEXT, scales=[math.inf]).frame()
    assert 0 < frame["kl"].item() < all_heads["kl"].item()


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(1, 3))
def test_batches_of_equal_length_add_up(demo, batch_size):
    tokens = torch.randint(3, 2048, (4, 12), generator=torch.Generator().manual_seed(0))
    metric = sl.metrics.logit_difference(5, 6)
    settings = {"scales": [0.0, math.inf], "metric": metric}
    whole = curve_of(demo, tokens, batch_size=4, **settings).frame()
    parts = curve_of(demo, tokens, batch_size=batch_size, **settings).frame()
    for name in ("loss", "kl", "top1", "metric"):
        assert parts[name].tolist() == pytest.approx(whole[name].tolist(), abs=1e-5)


def test_padding_counts_nothing(demo):
    together = curve_of(demo, [{"input_ids": [0, 90, 280, 492]}, {"input_ids": [0, 745]}])
    apart = (
        curve_of(demo, torch.tensor([[0, 90, 280, 492]])),
        curve_of(demo, torch.tensor([[0, 745]])),
    )
    long, short = (curve.frame() for curve in apart)
    frame = together.frame()
    expected = (4 * long["kl"] + 2 * short["kl"]) / 6
    assert frame["kl"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    expected = (3 * long["loss"] + short["loss"]) / 4
    assert frame["loss"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_mean_is_over_positions_however_they_are_batched(demo):
    rows = [{"input_ids": row} for row in ([0, 90, 280, 492, 11, 7], [0, 745], [0, 9, 4], [5])]
    settings = {"scales": [0.0, 1.0, math.inf], "heads": ["L0H1", "L1H2"]}
    whole = curve_of(demo, rows, batch_size=4, **settings).frame()
    for batch_size in (1, 3):
        parts = curve_of(demo, rows, batch_size=batch_size, **settings).frame()
        assert_frame_equal(parts, whole, rtol=0, atol=2e-5)


def test_encoder_and_decoder_positions_weigh_by_their_own_number():
    model = tiny.pair("bart", "Bart", tiny.BART).build()
    long = {"input": tiny.tokens(1, 9), "decoder_input": tiny.tokens(1, 4, seed=1)}
    short = {"input": tiny.tokens(1, 3, seed=2), "decoder_input": tiny.tokens(1, 8, seed=3)}
    both, first, second = (
        curve_of(model, data, scales=[math.inf]) for data in ([long, short], [long], [short])
    )
    (kl,), (a,), (b,) = (curve.frame()["kl"] for curve in (both, first, second))
    assert kl == pytest.approx((4 * a + 8 * b) / 12, abs=1e-5)
    (loss,), (a,), (b,) = (curve.frame()["loss"] for curve in (both, first, second))
    assert loss == pytest.approx((3 * a + 7 * b) / 10, abs=1e-5)


def test_a_decoders_padding_counts_nothing():
    model = tiny.pair("bart", "Bart", tiny.BART).build()
    tokens, decoder = tiny.tokens(1, 9), tiny.tokens(1, 4, seed=1)
    padded = torch.cat([decoder, tiny.tokens(1, 3, seed=4)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    batch = {"input": tokens, "decoder_input": padded, "decoder_attention_mask": mask}
    plain = {"input": tokens, "decoder_input": decoder}
    found, wanted = (curve_of(model, [b], scales=[0.0, 3.0]).frame() for b in (batch, plain))
    columns = ["loss", "kl", "top1"]
    assert_frame_equal(found[columns], wanted[columns], rtol=0, atol=1e-4)


def test_a_model_that_sees_the_next_token_has_no_loss(caplog):
    bert = tiny.reader("bert", "BertForMaskedLM", "BertConfig", "softmax", settings=tiny.SIZE)
    causal = tiny.reader("gpt2", "GPT2LMHeadModel", "GPT2Config", "scores", settings=tiny.GPT)
    assert "loss" in curve_of(causal.build(), tiny.tokens(), scales=[1.0]).frame()
    assert not caplog.records
    frame = curve_of(bert.build(), [tiny.tokens(), tiny.tokens(seed=5)], scales=[1.0, 4.0]).frame()
    assert "loss" not in frame
    assert frame.notna().all(axis=None)
    assert [r.message for r in caplog.records if "next-token loss" in r.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_an_undefined_similarity_says_why(demo):
    late = [f"L{layer}H{head}" for layer in (2, 3) for head in range(8)]
    curve = curve_of(demo, TEXT, scales=[math.inf], heads=late)
    assert [note.partition(":")[0] for note in curve.notes] == ["S_L0", "S_L1"]
    assert all("undefined" in note and note in repr(curve) for note in curve.notes)


def test_a_single_token_has_no_loss_and_spoils_none(demo):
    alone = curve_of(demo, torch.tensor([[0]]), scales=[1.0, math.inf]).frame()
    assert "loss" not in alone
    assert alone["kl"].tolist() == pytest.approx([0, 0], abs=1e-6)
    rows = [{"input_ids": [0, 90, 280]}, {"input_ids": [5]}]
    for batch_size in (1, 2):
        found = curve_of(demo, rows, scales=[1.0, 4.0], batch_size=batch_size).frame()
        expected = curve_of(demo, torch.tensor([[0, 90, 280]]), scales=[1.0, 4.0]).frame()
        assert found["loss"].tolist() == pytest.approx(expected["loss"].tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("case", "labels"),
    [
        (tiny.native, ["S_L0", "S_L1"]),
        (
            tiny.reader(
                "bert", "BertForMaskedLM", "BertConfig", "softmax", settings=tiny.SIZE
            ).build,
            ["S_L0", "S_L1"],
        ),
    ],
)
def test_other_models_have_a_curve(case, labels):
    frame = curve_of(case(), tiny.tokens(), scales=[0.0, 1.0, math.inf]).frame()
    assert frame.filter(like="S_").columns.tolist() == labels
    assert frame.notna().all(axis=None)
    assert frame.loc[1.0, "kl"] == pytest.approx(0, abs=1e-6)
    assert (frame.loc[[0.0, math.inf], "kl"] > 1e-3).all()


def test_an_encoder_and_a_decoder_have_layers_of_their_own():
    model = tiny.pair("bart", "Bart", tiny.BART).build()
    batch = {"input": tiny.tokens(), "decoder_input": tiny.tokens(length=7, seed=1)}
    frame = curve_of(model, [batch], scales=[1.0, math.inf]).frame()
    stacks = [f"S_{stack}.L{layer}" for stack in ("encoder", "decoder") for layer in (0, 1)]
    assert set(stacks) == set(frame.filter(like="S_").columns)
    controls = [name.replace("S_", "cos_random_") for name in stacks]
    assert frame[controls].notna().all(axis=None)
    assert frame.loc[1.0, stacks].tolist() == pytest.approx([1.0] * 4)


def test_a_curve_comes_back_as_it_was(demo, tmp_path):
    curve = curve_of(demo, TEXT, scales=[0, 1, math.inf], metric=lambda x: x.norm(), data_name="t")
    curve.save(tmp_path / "curve.safetensors")
    found = ScalingCurve.load(tmp_path / "curve.safetensors")
    assert found.frame().equals(curve.frame())
    assert (found.provenance, found.scales, found.complete) == (
        curve.provenance,
        curve.scales,
        True,
    )
    assert str(found.provenance) == "demo, t"


@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        ({"columns/kl": torch.zeros(2)}, {"scales": None}),
        ({"columns/kl": torch.zeros(2)}, {"scales": ["x", 1]}),
        ({"columns/kl": torch.zeros(2)}, {"columns": ["kl"]}),
        ({}, {}),
        ({"columns/kl": torch.zeros(3)}, {}),
        ({"columns/kl": torch.zeros(2)}, {"provenance": {"colour": "red"}}),
    ],
)
def test_a_garbled_file(tmp_path, columns, changes):
    curve = ScalingCurve(Provenance("m"), (0.0, math.inf), {"kl": torch.zeros(2)})
    curve.save(tmp_path / "curve")
    _, meta = read_result(tmp_path / "curve", "scaling curve")
    write_result(tmp_path / "curve", "scaling curve", columns, meta | changes)
    with refusal(FileFormatError, "curve", "lacks or garbles"):
        ScalingCurve.load(tmp_path / "curve")


def test_another_kind_of_file(tmp_path):
    write_result(tmp_path / "curve", "head roles", {}, {})
    with refusal(FileFormatError, "'head roles'", "'scaling curve' was needed"):
        ScalingCurve.load(tmp_path / "curve")


def test_an_interrupt_keeps_what_was_measured(demo):
    def data(n):
        for _ in range(n):
            yield TEXT
        raise KeyboardInterrupt

    settings = {"scales": [1.0, math.inf], "batch_size": 1}
    found = curve_of(demo, data(2), **settings)
    assert not found.complete
    assert found.frame().equals(curve_of(demo, [TEXT] * 2, **settings).frame())
    with pytest.raises(KeyboardInterrupt):
        curve_of(demo, data(0), **settings)


def test_a_curve_can_be_drawn():
    columns = {"kl": torch.tensor([1.0, 0.0]), "S_L0": torch.tensor([0.2, 1.0])}
    curve = ScalingCurve(Provenance("model"), (0.0, 1.0), columns)
    assert len(curve.plot().axes) >= 2


def test_layers_of_all_stacks_share_a_panel_and_so_do_their_controls():
    names = [f"{kind}_{stack}L{layer}" for kind in ("S", "cos_random") for stack in ("", "encoder.")
             for layer in (0, 1)]  # fmt: skip
    groups = measure_groups(["kl", *names, "S_odd"])
    assert [len(group) for group in groups.values()] == [4, 4, 1, 1]
    assert groups["S odd"] == ["S_odd"]


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ([], ["at least one scale"]),
        (2.0, ["in a list", "2.0"]),
        ("12", ["in a list", "12"]),
        ([1.0, -1.0], ["-1"]),
        ([math.nan], ["nan"]),
        (["x"], ["x"]),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_scales_that_are_none(demo, scales, words):
    with refusal(ArgumentError, *words):
        curve_of(demo, TEXT, scales=scales)


@pytest.mark.parametrize(
    ("metric", "kind", "words"),
    [
        (lambda logits: logits[:, -1], ArgumentError, ["scalar", "mean over prompts"]),
        (lambda logits: "high", ArgumentError, ["scalar", "str"]),
        ("loss", ArgumentError, ["function of the logits", "'loss'"]),
        (lambda logits: logits.sum() * math.nan, NonFiniteError, ["nan"]),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_metrics_that_are_none(demo, metric, kind, words):
    with refusal(kind, *words):
        curve_of(demo, TEXT, metric=metric)
    assert curve_of(demo, TEXT, scales=[1.0]).frame()["kl"].item() < 1e-6


def test_no_data(demo):
    with refusal(DataError, "empty"):
        curve_of(demo, [])


@pytest.mark.parametrize(
    ("name", "has_loss", "has_s"),
    [
        ("openai_gpt", True, False),
        pytest.param("deepseek_v4", True, True, marks=pytest.mark.slow),
        ("bert", False, True),
        pytest.param("bert_decoder", True, True, marks=pytest.mark.slow),
        pytest.param("t5", True, True, marks=pytest.mark.slow),
    ],
)
def test_curve_and_measures_ask_the_same_of_a_model(name, has_loss, has_s):
    case = next(case for case in zoo.CASES if case.name == name)
    args, kwargs = case.inputs()
    data = [{"input": args[0], **kwargs}]
    curve = curve_of(case.build().eval(), data, scales=[1.0, math.inf])
    measures = saturation_measures(case.build().eval(), data, min_keys=2)
    assert ("loss" in curve.columns, "loss" in measures) == (has_loss, has_loss)
    assert any(column.startswith("S_") for column in curve.columns) == has_s
    assert math.isnan(measures["S"]) != has_s
    assert has_s or "residual stream" in curve.notes[0]


def test_tokens_that_stand_for_images_are_left_as_they_are():
    case = next(case for case in zoo.CASES if case.name == "llava")
    model, (args, kwargs) = case.build().eval(), case.inputs()
    (batch,) = batches(model, [{"input": args[0], **kwargs}])
    assert predicts_next(model, batch)
