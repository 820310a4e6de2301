"""HookedTransformer, HookedEncoder and HookedEncoderDecoder, as TransformerLens 2 and 3 have them.

The yardstick is that of the zoo: the model with softmax itself replaced by a float64 version.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import math
import pkgutil
import subprocess
import sys

import hooked
import oracle
import pytest
import torch
import transformers
from hooked import CASES, CLASSES, N_HEADS, N_LAYERS, case, model_of, tokens
from torch import nn
from transformer_lens import HookedTransformer, patching

import sat_lens as sl
from sat_lens.errors import HeadSelectionError, NotReachedError

QUIET = {"progress": False}
NAMES = [found.name for found in CASES]
SCALES = [3.0, math.inf]


def sites_of(name):
    return sl.attention_sites(model_of(name))


def labels(name):
    return [label for site in sites_of(name) for label in site.labels]


def rescaled(name, scale, chosen=None, model=None):
    """The oracle on the heads of those labels, or on all."""
    paths = {
        site.path: [h for h in range(N_HEADS) if chosen is None or site.label(h) in chosen]
        for site in sites_of(name)
    }
    paths = {path: heads for path, heads in paths.items() if heads}
    return oracle.rescaled_softmax(model or model_of(name), paths, scale, N_HEADS)


@functools.cache
def soft_logits(name):
    with torch.no_grad():
        return case(name).run(model_of(name))


def metric(logits):
    return (logits[..., 7] - logits[..., 0]).mean()


def test_every_module_of_the_library_can_be_imported():
    found = [info.name for info in pkgutil.walk_packages(sl.__path__, "sat_lens.")]
    assert len(found) > 50
    # Without Triton nobody imports what is written in it.
    unused = "__main__" if importlib.util.find_spec("triton") else ("__main__", "hard_kernel")
    for name in found:
        if not name.endswith(unused):
            importlib.import_module(name)


def test_the_library_is_imported_without_transformer_lens():
    code = "import sys, sat_lens.intervention; assert 'transformer_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Where attention is


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_found_where_it_is(name):
    found = [(site.path, site.stack, site.kind) for site in sites_of(name)]
    assert found == list(case(name).places)
    assert [site.layer for site in sites_of(name)] == [
        int(path.split(".")[1]) for path, _, _ in case(name).places
    ]
    assert {(site.n_heads, site.level) for site in sites_of(name)} == {(N_HEADS, "scores")}
    assert all(site.pattern_is_true for site in sites_of(name))
    assert not any(site.discarded for site in sites_of(name))


def test_labels_of_heads_that_do_not_exist():
    with pytest.raises(HeadSelectionError, match=r"L2H0.*L0H0 to L0H3"):
        sl.saturate(model_of("gpt2"), "L2H0").__enter__()
    with pytest.raises(HeadSelectionError, match=r"several stacks.*encoder\.L0H0"):
        sl.saturate(model_of("t5"), "L0H0").__enter__()


# Interventions


def selections(name):
    """All heads, all heads of each stack, and one head alone in each stack."""
    stacks = [case(name).heads(stack) for stack in case(name).stacks]
    alone = [[heads[-N_HEADS + 1]] for heads in stacks]
    everything = [head for heads in stacks for head in heads]
    return [everything, *(stacks if len(stacks) > 1 else []), *alone]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_oracle(name, scale):
    soft = soft_logits(name)
    for chosen in selections(name):
        with torch.no_grad():
            with rescaled(name, scale, chosen):
                expected = case(name).run(model_of(name))
            with sl.saturate(model_of(name), chosen, scale):
                found = case(name).run(model_of(name))
        effect = (expected - soft).abs().max()
        error = (found - expected).abs().max()
        assert effect > 1e-3 * soft.abs().max(), f"no effect of {chosen}"
        assert error <= 1e-4 * effect + 1e-5 * soft.abs().max(), f"wrong on {chosen}"


@pytest.mark.parametrize("name", NAMES)
def test_a_scale_of_one_changes_nothing(name):
    soft = soft_logits(name)
    with torch.no_grad(), sl.saturate(model_of(name), scale=1):
        same = case(name).run(model_of(name))
    torch.testing.assert_close(same, soft, rtol=0, atol=float(1e-5 * soft.abs().max()))


@pytest.mark.parametrize("name", CLASSES)
def test_heads_that_are_not_chosen_are_the_same_to_the_bit(name):
    first = sites_of(name)[0]
    pattern = f"{first.path}.hook_pattern"
    pair = sl.run_with_saturation_cache(
        model_of(name), tokens(), heads=first.label(2), **dict(case(name).kwargs)
    )
    soft, saturated = pair.soft.cache[pattern], pair.saturated.cache[pattern]
    others = [head for head in range(N_HEADS) if head != 2]
    assert torch.equal(soft[:, others], saturated[:, others])
    winners = soft[:, 2] == soft[:, 2].amax(-1, keepdim=True)
    assert torch.equal(saturated[:, 2], winners / winners.sum(-1, keepdim=True))
    assert not torch.equal(soft[:, 2], saturated[:, 2])


@pytest.mark.parametrize("scale", [0.5, *SCALES])
@pytest.mark.parametrize("name", CLASSES)
def test_gradients_are_those_of_the_oracle(name, scale):
    weights = [weight for weight in model_of(name).parameters() if weight.dim() >= 2]

    def gradients(block):
        with block:
            loss = case(name).run(model_of(name)).log_softmax(-1)[..., 7].sum()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    found = gradients(sl.saturate(model_of(name), scale=scale))
    expected = gradients(rescaled(name, scale))
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert largest > 1e-3
    for mine, theirs in zip(found, expected, strict=True):
        zero = torch.zeros(())
        mine, theirs = (zero if gradient is None else gradient for gradient in (mine, theirs))
        torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_moved_to_another_dtype_after_it_was_looked_at(dtype):
    model = case("gpt2").build()
    before = sl.attention_sites(model)
    model.to(dtype)
    with torch.no_grad():
        soft = model(tokens())
        with sl.saturate(model):
            found = model(tokens())
        with rescaled("gpt2", math.inf, model=model):
            expected = model(tokens())
    assert sl.attention_sites(model) == before
    assert torch.equal(found, expected)
    assert not torch.allclose(found, soft)


# Nothing stays


def state(model):
    """All hooks and replaced methods of all modules, by identity."""
    lists = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
    return [
        (
            [[id(value) for value in getattr(module, name).values()] for name in lists],
            [len(getattr(module, name, [])) for name in ("fwd_hooks", "bwd_hooks")],
            {name: id(value) for name, value in vars(module).items() if callable(value)},
            module.training,
        )
        for module in model.modules()
    ]


def stopping(tensor, hook=None):
    raise ZeroDivisionError


@pytest.mark.parametrize("way", ["run", "transform", "later hook"])
@pytest.mark.parametrize("name", CLASSES)
def test_hooks_are_gone_afterwards(name, way):
    model = model_of(name)
    soft, before = soft_logits(name), state(model)
    if way == "run":
        with torch.no_grad(), sl.saturate(model):
            inside = case(name).run(model)
            assert state(model) != before
        assert not torch.allclose(inside, soft)
    elif way == "transform":
        with pytest.raises(ZeroDivisionError), sl.replace_attention(model, stopping):
            case(name).run(model)
    else:
        hook = (f"{sites_of(name)[-1].path}.hook_pattern", stopping)
        with pytest.raises(ZeroDivisionError), sl.saturate(model), model.hooks(fwd_hooks=[hook]):
            case(name).run(model)
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(case(name).run(model), soft)


# Beside TransformerLens's own hooks


@pytest.mark.parametrize("scale", [0.5, *SCALES])
@pytest.mark.parametrize("name", NAMES)
def test_saturation_hooks_do_what_saturate_does(name, scale):
    model, kwargs = model_of(name), dict(case(name).kwargs)
    with torch.no_grad():
        hooks = sl.saturation_hooks(model, labels(name)[1::2], scale)
        found = model.run_with_hooks(tokens(), fwd_hooks=hooks, **kwargs)
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens(), **kwargs)
        with sl.saturate(model, labels(name)[1::2], scale):
            expected, same = model.run_with_cache(tokens(), **kwargs)
    assert torch.equal(found, expected)
    assert not torch.equal(found, soft_logits(name))
    pattern = f"{sites_of(name)[-1].path}.hook_pattern"
    assert torch.equal(cache[pattern], same[pattern])


@pytest.mark.parametrize("name", CLASSES)
def test_a_later_hook_acts_on_the_saturated_values(name):
    model, kwargs = model_of(name), dict(case(name).kwargs)
    pattern = f"{sites_of(name)[-1].path}.hook_pattern"
    seen = []

    def look_and_halve(tensor, hook):
        seen.append(tensor)
        return tensor / 2

    with torch.no_grad(), sl.saturate(model):
        saturated, cache = model.run_with_cache(tokens(), **kwargs)
        halved = model.run_with_hooks(tokens(), fwd_hooks=[(pattern, look_and_halve)], **kwargs)
    assert torch.equal(seen[0], cache[pattern])
    assert not torch.allclose(halved, saturated)


def test_a_hook_removed_inside_the_block_is_no_silent_loss():
    model = case("gpt2").build()
    with torch.no_grad(), sl.saturate(model):
        expected = model(tokens())
        model.reset_hooks()
        assert torch.equal(model(tokens()), expected)
    model = case("gpt2").build()
    with torch.no_grad(), sl.saturate(model):
        model.blocks[0].attn.hook_attn_scores._forward_hooks.clear()
        with pytest.raises(NotReachedError, match="reached 0 times"):
            model(tokens())


def test_runs_that_stop_or_start_inside_the_model():
    model = model_of("gpt2")
    with torch.no_grad():
        with rescaled("gpt2", math.inf):
            logits, cache = model.run_with_cache(tokens())
        middle = cache["resid_pre", 1]
        with sl.saturate(model):
            assert torch.equal(model(tokens(), stop_at_layer=1), middle)
            assert torch.equal(model(middle, start_at_layer=1), logits)


SWEEPS = {
    "head_out": patching.get_act_patch_attn_head_out_all_pos,
    "head_q": patching.get_act_patch_attn_head_q_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_functions_of_transformer_lens(sweep):
    model = model_of("gpt2")

    def swept(block):
        with torch.no_grad(), block:
            _, cache = model.run_with_cache(tokens())
            return SWEEPS[sweep](model, tokens(seed=1), cache, metric)

    found, expected = swept(sl.saturate(model)), swept(rescaled("gpt2", math.inf))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, swept(sl.saturate(model, scale=1)), atol=1e-3)


# Padding and decoding


@pytest.mark.parametrize("scale", [0.0, *SCALES])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "rotary_gqa", "bert", "t5"])
def test_real_tokens_do_not_see_the_padding(name, side, scale):
    ids, real = tokens(), slice(3, 10) if side == "left" else slice(0, 7)
    mask = torch.ones_like(ids)
    mask[0], mask[0, real] = 0, 1
    argument = (
        "attention_mask"
        if isinstance(model_of(name), HookedTransformer)
        else ("one_zero_attention_mask")
    )

    def run(ids, mask):
        kwargs = {key: value[: len(ids)] for key, value in case(name).kwargs}
        return model_of(name)(ids, **{argument: mask}, **kwargs)

    other = ids.clone()
    other[mask == 0] = 9
    with torch.no_grad():
        soft = run(ids, mask)
        with sl.saturate(model_of(name), scale=scale):
            found, same = run(ids, mask), run(other, mask)
        with rescaled(name, scale):
            expected = run(ids, mask)
    atol = float(1e-4 * (expected - soft).abs().max() + 1e-5 * soft.abs().max())
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    shown = slice(None) if name == "t5" else real
    torch.testing.assert_close(found[0, shown], same[0, shown], rtol=0, atol=atol)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ["gpt2", "rotary_gqa"])
def test_decoding_with_a_cache_of_keys(name, scale):
    model = model_of(name)
    cache = hooked.key_value_cache(model, batch=2)
    with torch.no_grad(), sl.saturate(model, scale=scale):
        whole = model(tokens())
        parts = [
            model(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))
            for part in tokens().split([6, 1, 1, 1, 1], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    assert not torch.allclose(whole, soft_logits(name), atol=1e-2)


# Measures


@pytest.mark.parametrize("name", CLASSES)
def test_pairs_and_their_similarity(name):
    pair = sl.run_with_saturation_cache(model_of(name), tokens(), **dict(case(name).kwargs))
    with torch.no_grad(), rescaled(name, math.inf):
        expected = case(name).run(model_of(name))
    torch.testing.assert_close(pair.saturated.logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(pair.soft.logits, soft_logits(name))
    similarity = pair.similarity("resid_post", seed=3)
    frame = similarity.frame()
    assert len(frame) == N_LAYERS * (2 if name == "t5" else 1)
    for position, point in enumerate(similarity.names):
        soft, saturated = (run.cache[point].double() for run in (pair.soft, pair.saturated))
        cosine = float(torch.cosine_similarity(soft, saturated, dim=-1).mean())
        assert frame["cos_saturated"].iloc[position] == pytest.approx(cosine, abs=1e-6)
    assert (frame["cos_random"] < 0.99).all()
    assert torch.equal(pair.similarity("resid_post", seed=3).s, similarity.s)
    assert len(pair.similarity("pattern").names) == len(sites_of(name))


@pytest.mark.parametrize("name", CLASSES)
def test_roles_are_means_over_the_patterns(name):
    roles = sl.head_roles(model_of(name), case(name).data, min_keys=3, **QUIET)
    frame = roles.frame()
    assert frame.index.tolist() == labels(name)
    with torch.no_grad():
        _, cache = model_of(name).run_with_cache(tokens(), **dict(case(name).kwargs))
    for site in sites_of(name):
        pattern = cache[f"{site.path}.hook_pattern"].double()
        visible = (pattern > 0).sum(-1, keepdim=True)
        counted = visible[..., 0] >= 3
        argmax = 1 - pattern.amax(-1)
        uniform = torch.where(pattern > 0, (pattern - 1 / visible).abs(), 0).sum(-1) / 2
        for head, label in enumerate(site.labels):
            rows = counted[:, head]
            row = frame.loc[label]
            assert row["n_rows"] == int(rows.sum())
            assert row["tv_argmax"] == pytest.approx(float(argmax[:, head][rows].mean()), abs=1e-5)
            assert row["tv_mean"] == pytest.approx(float(uniform[:, head][rows].mean()), abs=1e-5)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("name", [*CLASSES, "rotary_gqa"])
def test_sweeps_over_heads_agree_with_the_oracle(name, direction):
    model = model_of(name)
    sweep = sl.sweep_heads(model, case(name).data[0], metric, direction=direction, **QUIET)
    assert len(sweep.items) == len(labels(name))
    for label, value in zip(labels(name), sweep.item_values.tolist(), strict=True):
        chosen = [label] if direction == "noising" else set(labels(name)) - {label}
        with torch.no_grad(), rescaled(name, math.inf, chosen):
            expected = float(metric(case(name).run(model)))
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_patching_between_runs_is_that_of_transformer_lens(fast):
    model, ids = model_of("gpt2"), tokens()
    with torch.no_grad():
        with sl.saturate(model):
            _, saturated = model.run_with_cache(ids)
        expected = patching.get_act_patch_attn_head_out_all_pos(model, ids, saturated, metric)
    found = sl.sweep_heads(model, ids, metric, source="run", fast=fast, **QUIET)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_the_scaling_curve_passes_through_the_runs(name):
    curve = sl.scaling_curve(
        model_of(name), case(name).data, scales=[1.0, math.inf], metric=metric, **QUIET
    )
    with torch.no_grad():
        soft = float(metric(soft_logits(name)))
        with rescaled(name, math.inf):
            saturated = float(metric(case(name).run(model_of(name))))
    assert curve.frame()["metric"].tolist() == pytest.approx([soft, saturated], abs=1e-5)


@pytest.mark.parametrize("name", [*CLASSES, "rotary_gqa"])
def test_norms_of_heads_are_those_of_their_weights(name):
    model = model_of(name)
    norms = sl.parameter_norms(model)
    assert list(norms.labels) == labels(name)
    assert norms.total == pytest.approx(
        math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    )
    place = 0
    for site in sites_of(name):
        module = model.get_submodule(site.path)
        q, k, v, o = (
            getattr(module, weight).detach().double() for weight in ("W_Q", "W_K", "W_V", "W_O")
        )
        for head in range(N_HEADS):
            qk, ov = q[head] @ k[head].T, v[head] @ o[head]
            expected = [float(product.norm()) for product in (qk, ov)]
            assert norms.heads[place, -2:].tolist() == pytest.approx(expected, rel=1e-5)
            place += 1


@pytest.mark.parametrize("name", CLASSES)
def test_scaled_queries_and_keys_multiply_the_scores(name):
    model, kwargs = model_of(name), dict(case(name).kwargs)
    scores = f"{sites_of(name)[0].path}.hook_attn_scores"
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        _, before = model.run_with_cache(tokens(), **kwargs)
        with sl.scaled_parameters(model, 2.0, which="qk"):
            _, inside = model.run_with_cache(tokens(), **kwargs)
    if name != "t5":  # there a bias of relative positions is added to them
        torch.testing.assert_close(inside[scores], 4 * before[scores])
    assert not torch.equal(inside[scores], before[scores])
    assert all(torch.equal(*two) for two in zip(weights, model.parameters(), strict=True))


def test_growth_and_the_tracker_follow_a_training_run():
    model = case("gpt2").build()
    first = case("gpt2").build()
    tracker = sl.SaturationTracker(data=tokens(length=12), every=1, measure_every=1, budget=None)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for step in range(1, 4):
        ids = tokens(length=12, seed=step)
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tracker.step(model, step)
    assert model.training
    frame = tracker.frame()
    assert frame.index.tolist() == [1, 2, 3]
    assert frame["tv_argmax"].nunique() == 3
    growth = sl.norm_growth({0: first, 3: model}, data=tokens(length=12), **QUIET).frame()
    assert growth["norm"].tolist()[-1] == pytest.approx(frame["norm"].iloc[-1])
    assert growth["S"].between(-1, 1).all()


# Texts and pages


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A HookedTransformer that reads texts."""
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    # By file: the class that the demo's own settings name is one of transformers 5.
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(hooked.TOKENIZER),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return hooked.build(HookedTransformer, tokenizer, d_vocab=len(tokenizer))


TEXTS = ["import os, sys", "def f(x):\n    return x + 1"]


def test_texts_are_read(reader):
    roles = sl.head_roles(reader, TEXTS, min_keys=3, **QUIET).frame()
    assert (roles["n_rows"] > 0).all()
    pair = sl.run_with_saturation_cache(reader, TEXTS)
    assert pair.non_padding.tolist() == [
        [place < reader.to_tokens(text).shape[1] for place in range(pair.non_padding.shape[1])]
        for text in TEXTS
    ]
    with torch.no_grad(), sl.saturate(reader):
        assert torch.equal(pair.saturated.logits, reader(TEXTS))


def test_generation_with_and_without_a_cache(reader):
    def generated(use_past_kv_cache):
        return reader.generate(
            reader.to_tokens(TEXTS[0]),
            max_new_tokens=5,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=use_past_kv_cache,
            return_type="tokens",
            verbose=False,
        )

    soft = generated(use_past_kv_cache=True)
    with sl.saturate(reader):
        cached, uncached = generated(use_past_kv_cache=True), generated(use_past_kv_cache=False)
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, soft)


def test_a_report_of_an_older_model(reader, tmp_path):
    roles = sl.head_roles(reader, TEXTS, min_keys=3, **QUIET)
    pair = sl.run_with_saturation_cache(reader, TEXTS[0])
    page = sl.write_report(tmp_path / "report.html", roles=roles, pair=pair).read_text()
    assert "L1H3" in page
    assert importlib.metadata.version("transformer-lens") in page
