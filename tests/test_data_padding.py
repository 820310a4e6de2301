"""Padding is recognised wherever tokens come in, and nothing that reads it is measured."""

from __future__ import annotations

import copy
import warnings

import pytest
import tiny
import torch
import transformers
from everyday import everyday
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.utilities import get_attention_mask

import sat_lens as sl
from sat_lens.data import batches
from sat_lens.data.padding import unpadded
from sat_lens.errors import ArgumentError, DataError
from sat_lens.intervention import verify_sites
from sat_lens.monitor import AttentionMonitor, attention_health
from sat_lens.norms import homogeneity_curve, saturation_measures

TEXTS = ["import os, sys, re, json\n", "def area(width, height):\n    return width * height\n"]
FOUND = "taken for padding"


class Special:
    """A tokenizer that knows three tokens."""

    def __init__(self, pad=0, bos=1, eos=2):
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad, bos, eos

    def __call__(self, text):
        raise AssertionError("there is no text here")


@pytest.fixture
def one_special_token(demo, monkeypatch):
    """The demo with GPT-2's habit: one token pads, begins and ends texts."""
    tokenizer = copy.deepcopy(demo.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token
    monkeypatch.setattr(demo, "tokenizer", tokenizer)
    assert demo.tokenizer.pad_token_id == demo.tokenizer.bos_token_id
    return demo


def mask_of(model, tokens):
    (batch,) = batches(model, tokens, batch_size=len(tokens))
    return batch.non_padding


# Rows of tokens, of which 0 is the pad token; how many are padding at each row's beginning or end.
TOLD = [
    ("neither", [[5, 6, 7], [5, 6, 7]], None),
    ("neither", [[0, 0, 7], [5, 6, 7]], [2, 0]),
    ("neither", [[0, 0, 7], [0, 6, 7]], [2, 1]),
    ("neither", [[5, 0, 0], [5, 6, 7]], [-2, 0]),
    ("neither", [[5, 0, 7], [5, 6, 7]], None),
    ("neither", [[5, 0, 6, 0], [5, 6, 7, 8]], [-1, 0]),
    ("begins", [[0, 6, 7]], None),
    ("begins", [[0, 0, 0, 7], [0, 5, 6, 7]], [2, 0]),
    ("begins", [[0, 0, 0, 7]], [2]),
    ("begins", [[0, 5, 0, 0], [0, 5, 6, 7]], [-2, 0]),
    ("begins", [[5, 0, 0], [5, 6, 7]], [-2, 0]),
    ("ends", [[5, 6, 0]], None),
    ("ends", [[5, 6, 0, 0], [5, 6, 7, 0]], [-1, 0]),
    ("ends", [[5, 6, 0, 0], [5, 6, 7, 8]], [-2, 0]),
    ("ends", [[0, 0, 7, 8], [5, 6, 7, 8]], [2, 0]),
    ("both", [[0, 5, 0]], None),
    ("both", [[0, 5, 0, 0], [0, 5, 6, 0]], [-1, 0]),
    # Packed text, whose windows begin and end anywhere.
    ("both", [[0, 0, 5, 6], [0, 5, 0, 6]], None),
    ("both", [[5, 0, 6, 7], [0, 5, 6, 7], [5, 6, 7, 0]], None),
    ("both", [[0, 5, 0, 6, 0, 0, 0], [0, 5, 6, 7, 8, 5, 6]], [-3, 0]),
]
WAYS = {
    "neither": (False, False),
    "begins": (True, False),
    "ends": (False, True),
    "both": (True, True),
}


@pytest.mark.parametrize(("way", "rows", "padding"), TOLD)
def test_what_rows_show(way, rows, padding):
    begins, ends = WAYS[way]
    found = unpadded(torch.tensor(rows), 0, begins=begins, ends=ends)
    if padding is None:
        assert found is None
        return
    length = len(rows[0])
    expected = [[n <= i if n >= 0 else i < length + n for i in range(length)] for n in padding]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("way", "rows", "why"),
    [
        ("neither", [[0, 5, 6], [5, 6, 0]], "rows begin in runs"),
        ("neither", [[0, 5, 0], [5, 6, 7]], "rows begin in runs"),
        ("both", [[0, 0, 0, 5, 6], [0, 5, 6, 7, 8], [0, 5, 0, 0, 0]], "rows begin in runs"),
        ("begins", [[0, 0, 6], [5, 6, 7]], "only some rows begin"),
        ("both", [[0, 6, 7], [5, 6, 7]], "only some rows begin"),
        ("ends", [[5, 0, 0, 0], [5, 6, 0, 0]], "every row ends"),
        ("neither", [[0, 0, 0], [5, 6, 7]], "pad token alone"),
    ],
)
def test_what_rows_leave_open(demo, way, rows, why):
    begins, ends = WAYS[way]
    with pytest.raises(DataError, match=f"{why}.*attention_mask=.*ones_like"):
        unpadded(torch.tensor(rows), 0, begins=begins, ends=ends)
    tokenizer = Special(0, 0 if begins else 1, 0 if ends else 2)
    tokens = torch.tensor(rows)
    for call in (
        lambda **mask: sl.head_roles(demo, tokens, tokenizer=tokenizer, min_keys=1, **mask),
        lambda **mask: sl.run_with_saturation_cache(demo, tokens, tokenizer=tokenizer, **mask),
    ):
        with pytest.raises(DataError, match=why):
            call()
        assert call(attention_mask=torch.ones_like(tokens)) is not None


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    side=st.sampled_from(["left", "right"]),
)
def test_one_special_token_is_read_as_transformer_lens_reads_it(demo, lengths, side):
    width = max(lengths)
    rows = []
    for n in lengths:
        text, filling = [0, *range(5, 5 + n)], [0] * (width - n)
        rows.append(filling + text if side == "left" else text + filling)
    tokens = torch.tensor(rows)
    tokenizer = Special(0, 0, 0)
    expected = get_attention_mask(tokenizer, tokens, prepend_bos=True, padding_side=side)
    found = unpadded(tokens, 0, begins=True, ends=True)
    assert (torch.ones_like(tokens) if found is None else found.long()).equal(expected)


def measured(model, data, **given):
    """Everything that takes tokens, as numbers.

    Not those of random keys: they are drawn by position, and padding on the left moves positions.
    """
    quiet = {"progress": False, **given}
    metric = sl.metrics.logit_difference(90, 91, position="last")
    sweep = sl.sweep_heads(model, data, metric, heads=["L0H0", "L2H1"], **quiet)
    search = sl.saturable_heads(model, data, metric, 0.5, heads=["L0H0", "L2H1"], **quiet)
    curve = sl.scaling_curve(model, data, scales=[1.0, 4.0], metric=metric, **quiet)
    row = sl.SaturationTracker(data=data, **given).step(model, 0)
    homogeneity = homogeneity_curve(model, data, scales=[1, 9], **quiet).frame()
    measures = saturation_measures(model, data, **given)
    return {
        "roles": sl.head_roles(model, data, metric=metric, **quiet).frame()["tv_argmax"].tolist(),
        "sweep": sweep.values[~sweep.values.isnan()].tolist(),
        "search": search.values.tolist(),
        "curve": curve.frame()[["loss", "kl", "top1", "metric"]].to_numpy().flatten().tolist(),
        "health": attention_health(model, data, rows=99, **given)["entropy"].tolist(),
        "measures": [v for name, v in measures.items() if name not in ("S", "cos_random")],
        "tracker": [row[name] for name in ("loss", "cos_saturated", "lean")],
        "homogeneity": homogeneity["cos_model"].tolist(),
    }


@pytest.mark.parametrize("side", everyday(["right", "left"], "left"))
@pytest.mark.parametrize("said", everyday([True, False], False))
def test_padded_tokens_give_what_their_texts_give(demo, side, said):
    tokens = demo.to_tokens(TEXTS, padding_side=side)
    mask = tokens != demo.tokenizer.pad_token_id
    expected = measured(demo, TEXTS)
    if said:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = measured(demo, tokens, attention_mask=mask)
    else:
        with pytest.warns(UserWarning, match=f"1 of 2 sequences.*{FOUND}"):
            found = measured(demo, tokens)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=2e-4, nan_ok=True), name


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pair_leaves_padding_out(demo, side):
    tokens = demo.to_tokens(TEXTS, padding_side=side)
    expected = sl.run_with_saturation_cache(demo, TEXTS).similarity()
    with pytest.warns(UserWarning, match=FOUND):
        pair = sl.run_with_saturation_cache(demo, tokens)
    assert pair.non_padding.equal(tokens != demo.tokenizer.pad_token_id)
    found = pair.similarity().cos_saturated
    torch.testing.assert_close(found, expected.cos_saturated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_special_token_on_either_side(one_special_token, side):
    model = one_special_token
    tokens = model.to_tokens(TEXTS, padding_side=side)
    lengths = [len(model.to_tokens(text)[0]) for text in TEXTS]
    with pytest.warns(UserWarning, match=FOUND):
        mask = mask_of(model, tokens)
    assert mask.sum(1).tolist() == lengths
    assert tokens[mask].tolist() == [t for text in TEXTS for t in model.to_tokens(text)[0].tolist()]


def test_tokens_without_padding_are_passed_on_as_they_are(demo):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens in (demo.to_tokens(TEXTS[0]), torch.tensor([[0, 5, 2, 6], [0, 7, 8, 1]])):
            (batch,) = batches(demo, tokens)
            assert batch.kwargs == {}
            assert batch.non_padding is None


def test_batches_of_one_tensor_are_told_together(one_special_token):
    # The second batch alone would leave open whether its rows begin with BOS.
    tokens = torch.tensor([[0, 5, 6, 7], [0, 0, 0, 5], [0, 0, 0, 6]])
    with pytest.warns(UserWarning, match=r"2 of 3 sequences.*\(4 positions"):
        found = list(batches(one_special_token, tokens, batch_size=1))
    assert [batch.non_padding.sum().item() for batch in found] == [4, 2, 2]


def test_rows_that_a_data_set_padded_are_told_by_their_length(demo):
    pad = demo.tokenizer.pad_token_id
    rows = [[0, 5, 6, pad], [0, 5, 6, 7], [0, 5, pad], [0, 5, 6]]
    data = [{"input_ids": row} for row in rows]
    with pytest.warns(UserWarning, match="2 of 4"):
        (batch,) = batches(demo, data)
    assert batch.non_padding.sum(1).tolist() == [3, 4, 2, 3]
    assert batch.kwargs["attention_mask"].equal(batch.non_padding.long())


def read_as_data(model, tokens, decoder):
    (batch,) = batches(model, [{"input": tokens, "decoder_input": decoder}])
    assert batch.kwargs["decoder_attention_mask"].equal(batch.decoder_non_padding.long())
    return batch.non_padding, batch.decoder_non_padding


def read_as_call(model, tokens, decoder):
    pair = sl.run_with_saturation_cache(model, tokens, decoder_input=decoder)
    return pair.non_padding, pair.decoder_non_padding


@pytest.mark.parametrize("read", [read_as_data, read_as_call])
def test_encoder_and_decoder_are_told_apart(read):
    """As in T5, where the decoder begins with the pad token."""
    model = tiny.pair("t5", "T5", tiny.T5).build()
    model.tokenizer = Special()
    assert model.original_model.config.decoder_start_token_id == 0
    tokens, decoder = tiny.tokens(2, 8) + 3, tiny.tokens(2, 6, seed=1) + 3
    tokens, decoder = tokens.clamp(max=90), decoder.clamp(max=90)
    tokens[0, 5:], decoder[:, 0], decoder[1, 4:] = 0, 0, 0
    expected = torch.ones(2, 8), torch.ones(2, 6)
    expected[0][0, 5:], expected[1][1, 4:] = 0, 0
    with pytest.warns(UserWarning, match="2 of 4 sequences"):
        found = read(model, tokens, decoder)
    assert all(mask.equal(wanted.bool()) for mask, wanted in zip(found, expected, strict=True))


@pytest.mark.usefixtures("types_unchecked")
def test_a_mask_that_does_not_fit(demo):
    tokens = torch.tensor([[0, 5, 6], [0, 7, 8]])
    for data, mask, why in [
        (tokens, torch.ones(2, 4), r"\[2, 3\].*Found \[2, 4\]"),
        (tokens, torch.tensor([[1, 1, 1], [0, 0, 0]]), "masks all"),
        (TEXTS, torch.ones(2, 9), "is for a token tensor"),
    ]:
        with pytest.raises(DataError, match=why):
            list(batches(demo, data, attention_mask=mask))


LAST = sl.metrics.logit_difference(90, 91, position="last")


def difference(logits):
    return (logits[:, -1, 90] - logits[:, -1, 91]).mean()


def at_last(logits):
    return difference(logits)


at_last.positions = "last"


@pytest.mark.parametrize("metric", [LAST, at_last], ids=["ours", "own"])
@pytest.mark.parametrize("side", everyday(["right", "left"], "right"))
@pytest.mark.parametrize("method", everyday(["exact", "attribution"], "exact"))
def test_the_last_token_of_each_prompt(demo, metric, side, method):
    texts = [*TEXTS, "x"]
    tokens = demo.to_tokens(texts, padding_side=side)
    mask = tokens != demo.tokenizer.pad_token_id
    options = {"heads": ["L0H0", "L1H5", "L3H2"], "progress": False, "method": method}
    together = sl.sweep_heads(demo, tokens, metric, attention_mask=mask, **options)
    alone = [sl.sweep_heads(demo, text, difference, **options) for text in texts]
    for name in ("soft", "saturated", "item_values"):
        expected = torch.stack([getattr(sweep, name) for sweep in alone]).mean(0)
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-4, atol=1e-4)
    if metric is LAST:
        each = sl.sweep_heads(demo, tokens, metric, attention_mask=mask, reduce=None, **options)
        assert each.soft.tolist() == pytest.approx([float(s.soft) for s in alone], abs=1e-4)


def test_roles_and_curves_read_the_last_token(demo):
    curve = sl.scaling_curve(demo, TEXTS, scales=[1.0], metric=at_last, progress=False)
    with torch.no_grad():
        expected = sum(float(difference(demo(text))) for text in TEXTS) / 2
    assert curve.frame().loc[1.0, "metric"] == pytest.approx(expected, abs=1e-4)
    roles = sl.head_roles(demo, TEXTS, metric=at_last, progress=False)
    alone = [sl.head_roles(demo, [t], metric=difference, progress=False) for t in TEXTS]
    # The mean over two prompts halves all weights alike.
    merged = sl.HeadRoles.merge(alone).frame()
    assert roles.frame()["tv_argmax"].tolist() == pytest.approx(
        merged["tv_argmax"].tolist(), abs=1e-3
    )


def test_divergence_at_the_last_token(demo):
    tokens = demo.to_tokens(TEXTS)
    mask = tokens != demo.tokenizer.pad_token_id
    with torch.no_grad():
        soft = demo(tokens, attention_mask=mask)
        with sl.saturate(demo):
            hard = demo(tokens, attention_mask=mask)
    metric = sl.metrics.kl_to_soft(soft, "last", mask)
    found = metric.per_prompt(sl.metrics.last_logits(hard, mask))
    for i, n in enumerate(mask.sum(1)):
        each = sl.metrics.kl_to_soft(soft[i : i + 1], [int(n) - 1])(hard[i : i + 1])
        assert float(found[i]) == pytest.approx(float(each), abs=1e-6)
    sweep = sl.sweep_heads(demo, tokens, metric, attention_mask=mask, heads="L0H0", progress=False)
    assert float(sweep.saturated) == pytest.approx(float(found.mean()), abs=1e-5)
    with pytest.raises(ArgumentError, match="needs attention_mask="):
        sl.metrics.kl_to_soft(soft, "last")


def test_a_metric_of_the_last_token_wants_one_position(demo):
    with pytest.raises(ArgumentError, match="last_logits"):
        LAST(torch.zeros(2, 3, 99))
    assert LAST(torch.zeros(2, 1, 99)) == 0
    wrong = type("Wrong", (), {"positions": "end", "__call__": lambda _, logits: logits.mean()})()
    with pytest.raises(ArgumentError, match=r"'end'.*\"last\""):
        sl.sweep_heads(demo, TEXTS, wrong, progress=False)


@pytest.mark.parametrize("metric", [difference, torch.mean, None])
def test_a_metric_that_reads_padding_is_refused_everywhere(demo, metric):
    with torch.no_grad():
        answer = demo(TEXTS[0])[0, -1].argmax()

    def accuracy(logits):
        return (logits[:, -1].argmax(-1) == answer).float().mean()

    metric = metric or accuracy
    for call in (
        lambda: sl.sweep_heads(demo, TEXTS, metric, progress=False),
        lambda: sl.saturable_heads(demo, TEXTS, metric, 0.1, progress=False),
        lambda: sl.scaling_curve(demo, TEXTS, scales=[1.0], metric=metric, progress=False),
        lambda: sl.head_roles(demo, TEXTS, metric=metric, progress=False),
        lambda: sl.head_roles(demo, TEXTS, metric=metric, damage=True, progress=False),
    ):
        with pytest.raises(ArgumentError, match=r'reads padding.*positions = "last"'):
            call()
    assert sl.sweep_heads(demo, TEXTS[0], difference, heads="L0H0", progress=False).complete


def test_a_metric_that_leaves_padding_out_is_not_refused(demo):
    (batch,) = batches(demo, TEXTS)

    def masked(logits):
        return (logits[..., 5] * batch.non_padding).sum() / batch.non_padding.sum()

    loss = sl.metrics.next_token_loss(batch.tokens, batch.non_padding)
    for metric in (masked, loss, lambda logits: logits[:, 2].mean()):
        assert sl.sweep_heads(demo, TEXTS, metric, heads="L0H0", progress=False).complete
    with pytest.raises(ArgumentError, match="A loss takes attention_mask="):
        sl.sweep_heads(demo, TEXTS, sl.metrics.next_token_loss(batch.tokens), progress=False)


def test_clean_and_corrupted_are_padded_alike(demo):
    tokens = torch.tensor([[0, 5, 6, 7], [0, 5, 6, 2]])
    options = {"heads": "L0H0", "progress": False, "tokenizer": Special(2, 0, 1)}
    other = tokens[:, [0, 2, 1, 3]]
    with pytest.warns(UserWarning, match=FOUND):
        assert sl.sweep_heads(demo, tokens, at_last, other, **options).complete
    with (
        pytest.warns(UserWarning, match=FOUND),
        pytest.raises(ArgumentError, match="padded at the same positions"),
    ):
        sl.sweep_heads(demo, tokens, at_last, tokens.flip(0), **options)


CALLS = {
    "pair": lambda model, data, **given: sl.run_with_saturation_cache(model, data, **given),
    "roles": lambda model, data, **given: sl.head_roles(model, data, progress=False, **given),
    "curve": lambda model, data, **given: sl.scaling_curve(
        model, data, scales=[1.0], progress=False, **given
    ),
    "sweep": lambda model, data, **given: sl.sweep_heads(
        model, data, LAST, heads="L0H0", progress=False, **given
    ),
    "search": lambda model, data, **given: sl.saturable_heads(
        model, data, LAST, 1.0, heads="L0H0", progress=False, **given
    ),
    "gradient": lambda model, data, **given: sl.temperature_gradient(model, data, LAST, **given),
    "health": attention_health,
    "monitor": lambda model, data, **given: AttentionMonitor(data, **given).step(model, 0),
    "tuning": lambda model, data, **given: sl.tune_temperature(
        model, data, steps=1, held_out=data, progress=False, **given
    ),
    "homogeneity": lambda model, data, **given: homogeneity_curve(
        model, data, scales=[1, 9], progress=False, **given
    ),
    "measures": saturation_measures,
    "tracker": lambda model, data, **given: sl.SaturationTracker(data=data, **given).step(model, 0),
    "sites": lambda model, data: sl.attention_sites(model, data),
    "trial": lambda model, data: verify_sites(model, data),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.usefixtures("types_unchecked")
def test_inputs_are_judged_the_same_everywhere(demo, call, monkeypatch):
    for data, why in [
        (torch.tensor([[0.0, 5.0]]), "whole numbers.*float32"),
        (torch.tensor([[True, False]]), "whole numbers.*bool"),
        ([[0, 5], [0, 6]], "found list"),
        (torch.tensor([[0, 9999]]), "between 0 and 2047; found 9999"),
        (torch.zeros(1, 0).long(), "holds nothing"),
    ]:
        with pytest.raises(DataError, match=why):
            call(demo, data)
    tokenizer = demo.tokenizer
    monkeypatch.setattr(demo, "tokenizer", None)
    with pytest.raises(DataError, match=r"texts and the model has no tokenizer.*tokenizer="):
        call(demo, TEXTS)
    if call not in (CALLS["sites"], CALLS["trial"]):
        assert call(demo, TEXTS, tokenizer=tokenizer) is not None
        assert call(demo, TEXTS, tokenizer=sl.models.DEMO_FOLDER) is not None


@pytest.mark.parametrize("text", ["<pad><pad>import os", "import os<pad>"])
def test_padding_that_is_written_out_is_refused(demo, text):
    for call in (CALLS["pair"], CALLS["roles"], CALLS["sweep"]):
        with pytest.raises(DataError, match=r"padded.*'<pad>' written.*skip_special_tokens"):
            call(demo, [TEXTS[0], text])


def test_one_token_that_begins_texts_may_be_written_out(one_special_token):
    bos = one_special_token.tokenizer.bos_token
    assert list(batches(one_special_token, [f"{bos}import os"]))
    with pytest.raises(DataError, match="written out"):
        list(batches(one_special_token, [f"{bos}{bos}import os"]))


@pytest.mark.parametrize("given_as", ["dict", "mask", "tokens"])
def test_plain_models_do_not_count_padding_in_positions(given_as):
    """GPT-2 numbers positions from the first token, padding or not, unless it is told otherwise."""
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wpe.weight)
    tokens = tiny.tokens(2, 9)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    padded[1, 3] = 0
    mask = (padded != 0).long()
    data = {"dict": [{"input_ids": padded, "attention_mask": mask}]}.get(given_as, padded)
    given = {"mask": {"attention_mask": mask}, "tokens": {"tokenizer": Special()}}.get(given_as, {})
    (batch,) = batches(model, data, **given)
    assert batch.kwargs["position_ids"][0].tolist() == [0, 0, 0, *range(9)]
    with torch.no_grad():
        logits = batch.run(model).logits
        for i, row in enumerate((tokens[:1], tokens[1:, 1:])):
            alone = model(row).logits[0]
            torch.testing.assert_close(logits[i, -len(alone) :], alone, rtol=0, atol=1e-5)
    own = {"input_ids": padded, "attention_mask": mask, "position_ids": mask}
    (batch,) = batches(model, [own])
    assert batch.kwargs["position_ids"] is mask


def test_labels_of_a_training_batch_are_left_out(demo):
    """As a data collator makes them: the model would compute a loss of logits that are left out."""
    pad = demo.tokenizer.pad_token_id
    tokens = torch.tensor([[0, 5, 6, pad, pad], [0, 5, 6, 7, 8]])
    mask = (tokens != pad).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    labels = tokens.masked_fill(tokens == pad, -100)
    found = sl.head_roles(demo, [{**batch, "labels": labels}], min_keys=2, progress=False).frame()
    expected = sl.head_roles(demo, [batch], min_keys=2, progress=False).frame()
    assert found.equals(expected)
    assert found["n_rows"].iloc[0] == 6


def test_a_decoder_reads_the_labels_where_it_is_given_nothing_else():
    model = tiny.pair("t5", "T5", tiny.T5).build()
    tokens, labels = tiny.tokens(2, 8), tiny.tokens(2, 6, seed=1)
    labels[0, 4:] = -100
    (batch,) = batches(model, [{"input": tokens, "labels": labels}])
    assert batch.decoder_tokens[:, 0].tolist() == [0, 0]
    assert batch.decoder_tokens[1, 1:].equal(labels[1, :-1])
    assert batch.decoder_non_padding.tolist() == [[True] * 5 + [False], [True] * 6]
    assert "labels" not in batch.kwargs
    roles = sl.head_roles(model, [{"input": tokens, "labels": labels}], min_keys=2, progress=False)
    assert roles.frame().loc["decoder.L0H0", "n_rows"] == 4 + 5
