"""Pairs of soft and saturated runs, and the similarity of their activations."""

from __future__ import annotations

import dataclasses
import math
import weakref

import oracle
import pytest
import tiny
import torch
from everyday import everyday, further
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens import ActivationCache, patching

import sat_lens as sl
from sat_lens.attention import Uniform
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.errors import ArgumentError, HeadSelectionError, NonFiniteError

TEXT = "def area(width, height):\n    return width * height"
TEXTS = ["import os", TEXT, "x = 1 + 2"]
COSINES = st.floats(-1, 1)


def refusal(kind, *words):
    assert issubclass(kind, sl.SatLensError)
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def pair_of(model, *inputs, **kwargs):
    with torch.no_grad():
        return sl.run_with_saturation_cache(model, *inputs, **kwargs)


def saturation_of(pattern):
    top = pattern == pattern.amax(-1, keepdim=True)
    return top / top.sum(-1, keepdim=True)


def test_soft_is_a_plain_run_bit_for_bit(demo):
    pair = pair_of(demo, TEXT)
    with torch.no_grad():
        logits, cache = demo.run_with_cache(TEXT)
    assert torch.equal(pair.soft.logits, logits)
    assert pair.soft.cache.keys() == cache.keys()
    assert all(torch.equal(pair.soft.cache[name], cache[name]) for name in cache.keys())  # noqa: SIM118


def test_saturated_is_a_run_inside_saturate(demo):
    pair = pair_of(demo, TEXT, heads=["L0H1", "L2H3"], scale=4.0)
    with torch.no_grad(), sl.saturate(demo, ["L0H1", "L2H3"], 4.0):
        logits, cache = demo.run_with_cache(TEXT)
    assert torch.equal(pair.saturated.logits, logits)
    assert all(torch.equal(pair.saturated.cache[name], cache[name]) for name in cache.keys())  # noqa: SIM118


def test_the_first_layer_saturates_the_soft_scores(demo):
    pair = pair_of(demo, TEXT)
    expected = oracle.rescaled_rows(pair.soft.cache["attn_scores", 0], math.inf)
    assert torch.equal(pair.saturated.cache["pattern", 0].double(), expected)
    assert torch.equal(saturation_of(pair.soft.cache["pattern", 0]).double(), expected)
    assert not torch.equal(pair.saturated.cache["pattern", 0], pair.soft.cache["pattern", 0])


def test_every_layer_of_the_saturated_run_is_saturated(demo):
    cache = pair_of(demo, TEXT).saturated.cache
    for layer in range(demo.cfg.n_layers):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(pattern, saturation_of(pattern))


@pytest.mark.parametrize("heads", ["L1H2", ["L1H2", "L1H5"], (1, 2)])
def test_only_the_chosen_heads_change_in_their_layer(demo, heads):
    pair = pair_of(demo, TEXT, heads=heads)
    soft, saturated = pair.soft.cache, pair.saturated.cache
    assert torch.equal(soft["pattern", 0], saturated["pattern", 0])
    chosen = {2, 5} if isinstance(heads, list) else {2}
    for head in range(demo.cfg.n_heads):
        one, other = soft["pattern", 1][:, head], saturated["pattern", 1][:, head]
        assert torch.equal(one, other) == (head not in chosen)
        if head in chosen:
            assert torch.equal(saturation_of(one), other)


def test_ties_are_passed_on(demo):
    exact, nearest = (pair_of(demo, TEXT, ties=ties) for ties in ("exact", "nearest"))
    assert nearest.provenance.ties == "nearest"
    patterns = [pair.saturated.cache["pattern", 0] for pair in (exact, nearest)]
    assert not torch.equal(*patterns)
    soft = exact.soft.cache["pattern", 0]
    distances = [(soft - pattern).abs().sum(-1) for pattern in patterns]
    assert (distances[1] <= distances[0] + 1e-5).all()


def test_what_is_cached_and_where(demo):
    def wanted(name):
        return name.endswith("hook_z")

    pair = pair_of(demo, TEXT, names_filter=wanted, device="cpu")
    for run in (pair.soft, pair.saturated):
        assert isinstance(run.cache, ActivationCache)
        assert len(run.cache) == demo.cfg.n_layers
        assert all(wanted(name) for name in run.cache.keys())  # noqa: SIM118
    on_meta = pair_of(demo, TEXT, names_filter=wanted, device="meta")
    assert on_meta.saturated.cache["z", 0].device.type == "meta"
    assert on_meta.soft.logits.device.type == "cpu"


def test_the_models_own_arguments_are_passed_on(demo):
    tokens = torch.tensor([[2, 2, 0, 90, 280], [0, 745, 654, 90, 280]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    pair = pair_of(demo, tokens, attention_mask=mask)
    with torch.no_grad():
        assert torch.equal(pair.soft.logits, demo(tokens, attention_mask=mask))
    alone = pair_of(demo, tokens[:1, 2:])
    padded = pair.saturated.logits[:1, 2:]
    torch.testing.assert_close(padded, alone.saturated.logits, rtol=1e-4, atol=1e-4)
    assert not pair.saturated.cache["pattern", 0][0, :, 2:, :2].any()


@pytest.mark.parametrize(
    "build", [tiny.native, further(tiny.pair("bart", "Bart", tiny.BART).build)]
)
def test_other_models_have_pairs_too(build):
    model = build()
    has_decoder = "decoder_blocks" in dict(model.named_children())
    kwargs = {"decoder_input": tiny.tokens(length=7, seed=1)} if has_decoder else {}
    pair = pair_of(model, tiny.tokens(), **kwargs)
    assert torch.isfinite(pair.saturated.logits).all()
    assert not torch.allclose(pair.soft.logits, pair.saturated.logits)
    s = pair.similarity("logits").s
    assert s.isfinite().all()
    assert (s < 1).all()


def test_nothing_is_left_on_the_model(demo):
    before = torch.get_rng_state()
    plain = pair_of(demo, TEXT).soft.logits
    pair = pair_of(demo, TEXT)
    pair.similarity()
    assert torch.equal(pair.soft.logits, plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pair_says_what_it_is(demo):
    assert pair_of(demo, TEXT).provenance.model == "demo"
    assert pair_of(demo, TEXT).provenance.scale == "inf"
    assert pair_of(demo, TEXT, scale={"L0H0": 2.0}).provenance.scale == "per head"


@pytest.mark.parametrize("activation", ["resid_post", "z", "pattern", "attn_out", "logits"])
def test_the_similarity_is_one_where_nothing_is_saturated_away(demo, activation):
    found = pair_of(demo, TEXT, scale=1).similarity(activation)
    assert len(found.s) == (1 if activation == "logits" else demo.cfg.n_layers)
    torch.testing.assert_close(found.cos_saturated, torch.ones(len(found.s)).double())
    has_room = found.cos_random <= 0.99
    assert has_room.any()
    assert ((found.s[has_room] - 1).abs() < 1e-4).all()
    assert found.s[~has_room].isnan().all()


def test_the_similarity_follows_its_definition(demo):
    pair = pair_of(demo, TEXT)
    found = pair.similarity("resid_post", seed=3)
    with torch.no_grad(), sl.replace_attention(demo, sl.transforms.RandomKey(3)):
        random = demo.run_with_cache(TEXT)[1]
    frame = found.frame()
    assert list(frame.columns) == ["S", "S_se", "cos_saturated", "cos_random", "note"]
    for layer, (name, row) in enumerate(frame.iterrows()):
        assert name == f"blocks.{layer}.hook_resid_post"
        soft, hard, control = (
            cache["resid_post", layer] for cache in (pair.soft.cache, pair.saturated.cache, random)
        )
        near = float(torch.cosine_similarity(soft, hard, dim=-1).mean())
        far = float(torch.cosine_similarity(soft, control, dim=-1).mean())
        assert row["cos_saturated"] == pytest.approx(near, abs=1e-5)
        assert row["cos_random"] == pytest.approx(far, abs=1e-5)
        assert row["S"] == pytest.approx((near - far) / (1 - far), abs=1e-4)


def test_random_keys_are_no_more_like_the_soft_run_than_random_keys(demo):
    pair = pair_of(demo, TEXT * 3)
    first, again = pair.similarity(seed=0), pair.similarity(seed=0)
    other = pair.similarity(seed=1)
    assert torch.equal(first.cos_random, again.cos_random)
    assert not torch.equal(first.cos_random, other.cos_random)
    as_if = normalised_similarity(other.cos_random, first.cos_random)
    assert (as_if.abs() < 0.5).all()


def test_the_control_saturates_the_same_heads(demo):
    found = pair_of(demo, TEXT, heads="L2H0").similarity("resid_post")
    assert found.cos_random[:2].tolist() == pytest.approx([1.0, 1.0])
    assert found.s[:2].isnan().all()


def test_a_mapping_of_scales_says_which_heads_get_random_keys(demo):
    by_scale = pair_of(demo, TEXT, scale={"L2H0": 2.0}).similarity("resid_post")
    by_heads = pair_of(demo, TEXT, heads="L2H0", scale=2.0).similarity("resid_post")
    assert torch.equal(by_scale.cos_random, by_heads.cos_random)


def test_a_control_keeps_only_what_is_compared(demo, monkeypatch):
    """Found through what is alive: each control needs the residual stream of four layers."""
    pair, kept = pair_of(demo, TEXT), []
    run = type(demo).run_with_cache

    def watched(*args, **kwargs):
        logits, cache = run(*args, **kwargs)
        kept.append((weakref.ref(logits), cache))
        return logits, cache

    monkeypatch.setattr(type(demo), "run_with_cache", watched)
    for seed in range(3):
        pair.similarity("resid_post", seed=seed)
        pair.similarity("resid_post", seed=seed)
    assert len(kept) == 3
    assert all(logits() is None for logits, _ in kept)
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]
    assert all(list(cache.keys()) == names for _, cache in kept)


@pytest.mark.parametrize("activation", ["resid_post", "z", "pattern", "logits"])
@pytest.mark.parametrize("side", everyday(["left", "right"], "left"))
@pytest.mark.parametrize("given_as", ["texts", "mask"])
def test_padded_positions_are_not_counted(demo, activation, side, given_as):
    tokens = demo.to_tokens(TEXTS, padding_side=side)
    lengths = torch.tensor([demo.to_tokens(text).shape[1] for text in TEXTS])[:, None]
    places = torch.arange(tokens.shape[1])
    real = (places.flip(0) if side == "left" else places) < lengths
    if given_as == "texts":
        pair = pair_of(demo, TEXTS, padding_side=side)
    else:
        pair = pair_of(demo, tokens, attention_mask=real.long())
    assert torch.equal(pair.non_padding, real)
    found = pair.similarity(activation).cos_saturated
    runs = (pair.soft, pair.saturated)
    for i, value in enumerate(found):
        one, other = (r.logits if activation == "logits" else r.cache[activation, i] for r in runs)
        if activation == "pattern":
            one, other = one.transpose(1, 2), other.transpose(1, 2)
        cosines = torch.cosine_similarity(one.double(), other.double(), dim=-1)
        counted = torch.cat([row[keep].flatten() for row, keep in zip(cosines, real, strict=True)])
        assert float(value) == pytest.approx(float(counted.mean()), abs=1e-6)


def test_texts_alone_and_padded_give_the_same_similarity(demo):
    together = pair_of(demo, [TEXTS[0], TEXTS[1]]).similarity().cos_saturated
    alone = [pair_of(demo, text) for text in TEXTS[:2]]
    counts = torch.tensor([pair.soft.logits.shape[1] for pair in alone]).double()
    each = torch.stack([pair.similarity().cos_saturated for pair in alone])
    torch.testing.assert_close(together, counts @ each / counts.sum(), rtol=0, atol=1e-5)


@given(COSINES, st.floats(-1, 0.98))
def test_s_is_zero_at_the_control_and_one_at_identity(changed, random):
    control = torch.tensor(random, dtype=torch.float64)
    assert float(normalised_similarity(control, control)) == 0
    assert float(normalised_similarity(torch.ones_like(control), control)) == pytest.approx(1)
    s = float(normalised_similarity(torch.tensor(changed, dtype=torch.float64), control))
    assert s <= 1 + 1e-9
    assert (s > 0) == (changed > random)


@given(st.floats(0.9901, 1))
def test_s_is_undefined_where_the_control_leaves_no_room(random):
    control = torch.tensor(random, dtype=torch.float64)
    assert math.isnan(float(normalised_similarity(torch.tensor(1.0).double(), control)))


def test_the_mean_cosine_knows_no_length():
    first = tiny.noise(2, 3, 8)
    assert float(mean_cosine(first, 7 * first)) == pytest.approx(1)
    assert float(mean_cosine(first, -first)) == pytest.approx(-1)


def test_an_activation_that_is_not_there(demo):
    with refusal(ArgumentError, "no activation 'nonsense'", "names_filter", "resid_post"):
        pair_of(demo, TEXT).similarity("nonsense")
    pair = pair_of(demo, TEXT, names_filter=lambda name: name.endswith("hook_z"))
    with refusal(ArgumentError, "no activation 'resid_post'", "names_filter"):
        pair.similarity("resid_post")
    assert pair.similarity("z").s.isfinite().any()


@pytest.mark.parametrize("name", ["attn_scores", "hook_attn_scores"])
def test_masked_scores_have_no_cosine(demo, name):
    with refusal(ArgumentError, "mask", 'Compare "pattern"'):
        pair_of(demo, TEXT).similarity(name)


def test_a_name_may_carry_its_hook(demo):
    pair = pair_of(demo, TEXT)
    for name in ("z", "pattern", "resid_post"):
        assert torch.equal(pair.similarity(f"hook_{name}").s, pair.similarity(name).s)


@pytest.mark.parametrize("activation", ["resid_post", "z", "pattern", "logits"])
def test_a_cache_without_batch_axis_gives_the_same_similarity(demo, activation):
    bare = pair_of(demo, TEXT, remove_batch_dim=True)
    assert bare.soft.cache["resid_post", 0].dim() == 2
    found, wanted = (pair.similarity(activation) for pair in (bare, pair_of(demo, TEXT)))
    torch.testing.assert_close(found.cos_saturated, wanted.cos_saturated)
    torch.testing.assert_close(found.cos_random, wanted.cos_random)


def test_padding_is_not_counted_without_batch_axis_either(demo):
    tokens = demo.to_tokens(TEXT)
    padded = torch.cat([tokens, torch.full((1, 9), 2)], dim=1)
    mask = (torch.arange(padded.shape[1]) < tokens.shape[1]).long()[None]
    found = pair_of(demo, padded, attention_mask=mask, remove_batch_dim=True).similarity()
    wanted = pair_of(demo, tokens).similarity()
    torch.testing.assert_close(found.cos_saturated, wanted.cos_saturated, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pos_slice", [2, (1, 4)])
def test_a_slice_of_positions_has_no_similarity(demo, pos_slice):
    pair = pair_of(demo, TEXT, pos_slice=pos_slice)
    for activation in ("resid_post", "pattern"):
        with refusal(ArgumentError, "pos_slice"):
            pair.similarity(activation)
    wanted = pair_of(demo, TEXT).similarity("logits").s
    torch.testing.assert_close(pair.similarity("logits").s, wanted)


@pytest.mark.parametrize("return_type", [None, "loss", "both"])
def test_without_logits_everything_else_can_be_compared(demo, return_type):
    pair = pair_of(demo, TEXT, return_type=return_type)
    wanted = pair_of(demo, TEXT).similarity("z")
    torch.testing.assert_close(pair.similarity("z").s, wanted.s, equal_nan=True)
    with refusal(ArgumentError, "no logits", "return_type"):
        pair.similarity("logits")


@pytest.mark.parametrize("name", ["input", "input_ids", "tokens"])
def test_the_input_may_come_by_name(demo, name):
    tokens = demo.to_tokens(TEXT)
    found = pair_of(demo, **{name: tokens}, attention_mask=torch.ones_like(tokens))
    assert torch.equal(found.saturated.logits, pair_of(demo, tokens).saturated.logits)
    with refusal(ArgumentError, "input", "none was given"):
        pair_of(demo, attention_mask=torch.ones_like(tokens))


def test_encoder_and_decoder_have_their_own_padding():
    model = tiny.pair("bart", "Bart", tiny.BART).build()
    tokens, decoder = tiny.tokens(2, 10), tiny.tokens(2, 7, seed=1)
    masks = [torch.ones(2, 10, dtype=torch.long), torch.ones(2, 7, dtype=torch.long)]
    masks[0][0, 6:], masks[1][0, 5:] = 0, 0
    pair = pair_of(
        model,
        tokens,
        decoder_input=decoder,
        attention_mask=masks[0],
        decoder_attention_mask=masks[1],
    )
    for activation, stack, mask in [
        ("attn_out", "encoder", masks[0]),
        ("attn_out", "decoder", masks[1]),
        ("pattern", "encoder", masks[0]),
        ("pattern", "decoder", masks[1]),
        ("logits", "logits", masks[1]),
    ]:
        found = pair.similarity(activation)
        at = next(i for i, name in enumerate(found.names) if name.startswith(stack))
        runs = (pair.soft, pair.saturated)
        if stack == "logits":
            one, other = (run.logits for run in runs)
        else:
            one, other = (run.cache[found.names[at]] for run in runs)
        if activation == "pattern":
            one, other = one.transpose(1, 2), other.transpose(1, 2)
        cosines = torch.cosine_similarity(one.double(), other.double(), dim=-1)
        wanted = float(cosines[mask.bool()].mean())
        assert float(found.cos_saturated[at]) == pytest.approx(wanted, abs=1e-9)
        assert wanted != pytest.approx(float(cosines.mean()), abs=1e-6)


def test_a_mask_of_other_positions_is_no_reason_to_count_padding():
    first = tiny.noise(2, 5, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with refusal(ArgumentError, "\\[2, 5\\]", "\\[2, 3\\]", "equal length"):
        mean_cosine(first, first, mask)
    assert float(mean_cosine(first, first, torch.ones(2, 3, dtype=torch.bool))) == pytest.approx(1)


def test_an_undefined_similarity_says_why(demo):
    found = pair_of(demo, TEXT, heads="L2H0").similarity("resid_post")
    notes = found.frame()["note"]
    assert notes[:2].str.contains("undefined.*random keys").all()
    assert (notes[found.s.isfinite().numpy()] == "").all()
    assert "undefined" in repr(found)


def test_an_overflow_is_no_similarity(demo):
    pair = pair_of(demo, TEXT)
    pair.saturated.cache["resid_post", 1][0, 0, 0] = math.inf
    with refusal(NonFiniteError, "'resid_post' is not finite", "float32"):
        pair.similarity("resid_post")


def test_what_a_pair_needs(demo):
    with refusal(ArgumentError, "input", "none was given"):
        pair_of(demo)
    with refusal(HeadSelectionError, "L9H0"):
        pair_of(demo, TEXT, heads="L9H0")
    with refusal(ArgumentError, "scale|inverse temperature", "-1"):
        pair_of(demo, TEXT, scale=-1)


@pytest.mark.parametrize("noising", everyday([True, False], True))
def test_the_caches_go_into_transformer_lens_patching(demo, noising):
    tokens = demo.to_tokens(TEXT)
    pair = pair_of(demo, tokens)
    goal = tokens[0, -1]

    def metric(logits):
        return logits[0, -2, goal]

    source = pair.saturated.cache if noising else pair.soft.cache
    with torch.no_grad():
        found = patching.get_act_patch_attn_head_out_all_pos(demo, tokens, source, metric)
    assert found.shape == (demo.cfg.n_layers, demo.cfg.n_heads)
    soft = float(metric(pair.soft.logits))
    if not noising:
        torch.testing.assert_close(found, torch.full_like(found, soft), rtol=1e-4, atol=1e-4)
        return
    for layer, head in [(0, 0), (3, 7)]:

        def put(z, hook, layer=layer, head=head):
            z[:, :, head] = pair.saturated.cache["z", layer][:, :, head]
            return z

        with torch.no_grad():
            logits = demo.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)])
        assert float(found[layer, head]) == pytest.approx(float(metric(logits)), abs=1e-4)
    assert (found - soft).abs().max() > 1e-3


def test_denoising_with_the_soft_cache_inside_saturate(demo):
    tokens = demo.to_tokens("import os, sys")
    pair = pair_of(demo, tokens)
    with torch.no_grad(), sl.saturate(demo):
        found = patching.get_act_patch_resid_pre(
            demo, tokens, pair.soft.cache, lambda logits: logits[0, -1].norm()
        )
    assert found.shape == (demo.cfg.n_layers, tokens.shape[1])
    assert found.isfinite().all()
    untouched = float(pair.saturated.logits[0, -1].norm())
    assert (found - untouched).abs().max() > 1e-3


def test_a_uniform_first_layer_is_the_limit_at_zero(demo):
    pair = pair_of(demo, TEXT, scale=0)
    with torch.no_grad(), sl.replace_attention(demo, Uniform()):
        assert torch.equal(demo(TEXT), pair.saturated.logits)


def test_a_pair_shows_what_it_holds_and_no_tensors(demo):
    pair = pair_of(demo, TEXT)
    first, second = repr(pair).splitlines()
    assert first == "Soft and saturated run of demo, c = inf"
    assert second.startswith(f"{len(pair.soft.cache.keys())} activations in .soft.cache")
    assert "tensor" not in repr(pair)


def test_a_single_token_says_why_it_has_no_similarity(demo):
    found = pair_of(demo, torch.tensor([[5]])).similarity()
    assert found.s.isnan().all()
    assert "each query sees one key" in repr(found)
    assert "..." not in repr(found)
    assert "cosine above 0.99" not in repr(found)
    above = pair_of(demo, TEXT, heads="L2H0").similarity().frame()["note"]
    assert ["no chosen head comes before" in note for note in above] == [True, True, False, False]


@pytest.mark.parametrize("names", ["foo", ["blocks.0.hook_resid_post", "foo"]])
def test_a_names_filter_that_matches_nothing(demo, names):
    with pytest.raises(ArgumentError, match=r"'foo' is no hook point.*model.hook_dict"):
        pair_of(demo, TEXT, names_filter=names)
    both = ["blocks.0.hook_resid_post", "blocks.1.hook_out"]
    assert set(both) <= set(pair_of(demo, TEXT, names_filter=both).soft.cache.keys())


def test_s_has_the_error_of_a_ratio_and_is_marked_where_it_rests_on_little(demo):
    """The oracle is the spread of S over resamples of the positions."""
    pair = pair_of(demo, TEXT)
    found = pair.similarity("resid_post")
    runs = (pair.soft, pair.saturated, pair._random[0, "resid_post"])
    soft, *others = (run.cache["resid_post", 2][0].double() for run in runs)
    near, far = (torch.cosine_similarity(soft, other, dim=-1) for other in others)
    drawn = torch.randint(len(near), (4000, len(near)), generator=torch.Generator().manual_seed(0))
    resampled = (near[drawn] - far[drawn]).mean(1) / (1 - far[drawn]).mean(1)
    assert float(found.s_error[2]) == pytest.approx(float(resampled.std()), rel=0.2)
    cosines = torch.tensor([0.5, 0.95, 0.995, 1.0], dtype=torch.float64)
    frame = dataclasses.replace(
        found, names=list("abcd"), cos_saturated=cosines, cos_random=cosines
    ).frame()
    assert frame["S"].isna().tolist() == frame["S_se"].isna().tolist() == [False, False, True, True]
    words = ["", "rests on little", "undefined", "change nothing"]
    assert all(word in note for word, note in zip(words, frame["note"], strict=True))
    assert frame["note"].iloc[0] == ""
