"""What holds at both levels: nesting, gradients, precision, threads, partial runs, generation."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading

import oracle
import pytest
import tiny
import torch
import zoo
from everyday import everyday
from transformer_lens import patching

import sat_lens as sl
from sat_lens.errors import NotReachedError
from sat_lens.intervention import verify_sites
from sat_lens.sites.discovery import on_made_up_inputs

# At the level `scores`: gpt2, llama, hrm_text. At `softmax`: all others, one for each layout.
BOTH_LEVELS = ["gpt2", "llama", "hrm_text", "gpt_oss_sink", "bert", "xglm", "longt5_local", "led"]
KINDS = everyday(BOTH_LEVELS, "gpt2", "gpt_oss_sink", "led")
GENERATORS = [
    "gpt2",
    "llama",
    "mistral_window",
    "gemma2_soft_cap",
    "bloom",
    "deepseek_v3",
    "qwen3_next",
    "jamba",
    "gpt_oss_sink",
    "opt",
    "xglm",
    "gptj",
    "llama4",
    "hrm_text",
    "native",
]


def run(case, model=None):
    args, kwargs = case.inputs()
    return (model or zoo.model_of(case.name))(*args, **kwargs)


def rescaled(model, scale, n_heads=tiny.N_HEADS):
    everything = {site.path: range(n_heads) for site in sl.attention_sites(model)}
    return oracle.rescaled_softmax(model, everything, scale, n_heads)


def labels(model):
    return [label for site in sl.attention_sites(model) for label in site.labels]


# Nesting


@pytest.mark.parametrize("scale", everyday([3.0, math.inf], math.inf))
@pytest.mark.parametrize("name", KINDS)
def test_nested_blocks_on_different_heads_are_one_block_on_both(name, scale):
    case, model = zoo.case(name), zoo.model_of(name)
    heads = labels(model)
    with torch.no_grad():
        with sl.saturate(model, heads, scale):
            together = run(case)
        with sl.saturate(model, heads[::2], scale), sl.saturate(model, heads[1::2], scale):
            nested = run(case)
        with sl.saturate(model, heads[::2], scale):
            part = run(case)
    assert torch.equal(together, nested)
    assert not torch.allclose(part, nested)


@pytest.mark.parametrize("name", KINDS)
def test_nested_blocks_on_the_same_heads_follow_one_another(name):
    case, model = zoo.case(name), zoo.model_of(name)
    with torch.no_grad():
        soft = run(case)
        with sl.saturate(model, scale=6):
            six = run(case)
        with sl.saturate(model, scale=2), sl.saturate(model, scale=3):
            nested = run(case)
    atol = float(1e-4 * (six - soft).abs().max() + 1e-5 * soft.abs().max())
    torch.testing.assert_close(nested, six, rtol=0, atol=atol)


# Gradients


# Not hrm_text: its layers run six times over, which amplifies what rounding leaves.
@pytest.mark.parametrize("scale", [0.5, 3.0, math.inf])
@pytest.mark.parametrize(
    "name", everyday([name for name in BOTH_LEVELS if name != "hrm_text"], "gpt2", "bert")
)
def test_gradients_are_those_of_the_oracle(name, scale):
    case, model = zoo.case(name), zoo.model_of(name)
    weights = [weight for weight in model.parameters() if weight.dim() >= 2]
    found, expected = (
        torch.autograd.grad(objective(case, block), weights, allow_unused=True)
        for block in (sl.saturate(model, scale=scale), rescaled(model, scale))
    )
    largest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert largest > 1e-3
    for mine, theirs in zip(found, expected, strict=True):
        zero = torch.zeros(())
        mine, theirs = (zero if gradient is None else gradient for gradient in (mine, theirs))
        torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=0, atol=1e-4 * largest)


def objective(case, block):
    with block:
        return run(case).log_softmax(-1)[..., 7].sum()


def test_scores_get_gradients_at_a_finite_scale_and_none_in_the_limit():
    model = zoo.model_of("bert")
    query = model.get_submodule("blocks.1.attn.q").original_component.weight
    for scale, sign in ((3.0, 1), (math.inf, 0)):
        loss = objective(zoo.case("bert"), sl.saturate(model, scale=scale))
        (gradient,) = torch.autograd.grad(loss, query, allow_unused=True)
        size = 0.0 if gradient is None else float(gradient.abs().max())
        assert (size > 1e-4) == bool(sign)


@pytest.mark.parametrize("name", KINDS)
def test_inference_mode(name):
    case, model = zoo.case(name), zoo.case(name).build()
    with torch.inference_mode(), sl.saturate(model):
        found = run(case, model)
    with torch.no_grad(), rescaled(model, math.inf):
        expected = run(case, model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# Precision


MOVES = [
    *itertools.product(["gpt2", "llama", "bert", "opt", "t5", "led"], [torch.float64]),
    # XGLM's own code does not run in float64.
    *itertools.product(["gpt2", "llama", "bert", "xglm", "t5"], [torch.bfloat16, torch.float16]),
]


@pytest.mark.parametrize(
    ("name", "dtype"), everyday(MOVES, ("gpt2", torch.bfloat16), ("t5", torch.float64))
)
def test_a_model_moved_to_another_dtype_after_it_was_looked_at(name, dtype):
    case, model = zoo.case(name), zoo.case(name).build()
    sl.attention_sites(model)
    model.to(dtype)
    with torch.no_grad():
        soft = run(case, model)
        with sl.saturate(model):
            found = run(case, model)
        with rescaled(model, math.inf):
            expected = run(case, model)
        with sl.saturate(model, scale=3):
            finite = run(case, model)
    assert sl.attention_sites(model) == sl.attention_sites(case.build().to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert not torch.allclose(found, soft)
    assert finite.isfinite().all()
    assert not torch.equal(finite, soft)


@pytest.mark.parametrize(
    "name", everyday(["gpt2", "llama", "bert", "xglm", "t5", "gpt_oss_sink"], "gpt2")
)
def test_a_model_moved_to_another_dtype_inside_the_block(name):
    case, model, other = zoo.case(name), zoo.case(name).build(), zoo.case(name).build()
    other.to(torch.bfloat16)
    with torch.no_grad():
        with rescaled(other, math.inf):
            expected = run(case, other)
        with sl.saturate(model):
            run(case, model)
            model.to(torch.bfloat16)
            found = run(case, model)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("dtype", everyday([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("name", everyday(["gpt2", "llama", "gemma2_soft_cap", "bloom"], "gpt2"))
def test_a_finite_scale_in_half_precision(name, dtype, scale):
    """Scaled scores go back in the model's dtype, which costs no more than that of the pattern."""
    model = tiny.randomise(zoo.case(name).build(), std=0.1).to(dtype)
    tokens, pattern = tiny.tokens(length=40), "blocks.0.attn.hook_pattern"
    with torch.no_grad():
        with sl.saturate(model, scale=scale):
            _, found = model.run_with_cache(tokens)
        with rescaled(model, scale):
            _, expected = model.run_with_cache(tokens)
    error = (found[pattern].float() - expected[pattern].float()).abs().max()
    assert error <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", everyday([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize("name", everyday(["gpt2", "llama"], "gpt2"))
def test_ties_in_half_precision_are_ties_of_the_scores(name, dtype):
    """A pattern in half precision has far more equal entries than its scores have."""
    model = tiny.randomise(zoo.case(name).build(), std=0.02).to(dtype)
    tokens = tiny.tokens(length=40)
    with torch.no_grad():
        _, soft = model.run_with_cache(tokens)
        with sl.saturate(model):
            _, hard = model.run_with_cache(tokens)
    scores, pattern = soft["attn_scores", 0].float(), soft["pattern", 0]
    winners = scores == scores.amax(-1, keepdim=True)
    expected = winners / winners.sum(-1, keepdim=True)
    assert torch.equal(hard["pattern", 0], expected.to(pattern.dtype))
    assert (pattern == pattern.amax(-1, keepdim=True)).sum() > winners.sum()


# Partial runs


# Not bert: there TransformerLens runs on to the logits.
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "native"])
def test_runs_that_stop_or_start_inside_the_model(name):
    case, model = zoo.case(name), zoo.model_of(name)
    (tokens,), _ = case.inputs()
    with torch.no_grad():
        with rescaled(model, math.inf):
            logits, cache = model.run_with_cache(tokens)
        middle = cache["blocks.1.hook_in"]
        with sl.saturate(model):
            assert torch.equal(model(tokens, stop_at_layer=1), middle)
            assert torch.equal(model(middle, start_at_layer=1), logits)
            _, lower = model.run_with_cache(tokens, stop_at_layer=1)
            assert torch.equal(model(tokens), logits)
    assert torch.equal(lower["blocks.0.attn.hook_pattern"], cache["blocks.0.attn.hook_pattern"])
    assert not any(key.startswith("blocks.1.attn") for key in lower)


def test_heads_above_the_stop_are_no_error():
    model, tokens = zoo.model_of("llama"), tiny.tokens()
    with torch.no_grad():
        soft = model(tokens, stop_at_layer=1)
        with sl.saturate(model, "L1H0"):
            assert torch.equal(model(tokens, stop_at_layer=1), soft)


# Generation


def greedily(model, tokens, n_new):
    for _ in range(n_new):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, -n_new:]


def generated(model, tokens, n_new, use_past_kv_cache):
    return model.generate(
        tokens,
        max_new_tokens=n_new,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=use_past_kv_cache,
        return_type="tokens",
        verbose=False,
    )[:, -n_new:]


@pytest.mark.parametrize("name", everyday(GENERATORS, "gpt2", "qwen3_next", "opt"))
def test_generation_with_and_without_a_cache_is_that_of_the_oracle(name):
    model, tokens = zoo.model_of(name), tiny.tokens(batch=3, length=6)
    with torch.no_grad():
        soft = generated(model, tokens, 5, use_past_kv_cache=True)
        with sl.saturate(model):
            cached, uncached = (generated(model, tokens, 5, use) for use in (True, False))
        with rescaled(model, math.inf):
            expected = greedily(model, tokens, 5)
    assert torch.equal(cached, expected)
    assert torch.equal(uncached, expected)
    assert not torch.equal(cached, soft)


@pytest.mark.parametrize("name", everyday(["t5", "t5gemma", "bart", "led", "switch"], "t5"))
def test_generation_by_encoder_decoders(name):
    model, tokens = zoo.model_of(name), tiny.tokens(batch=3, length=6)
    with torch.no_grad():
        soft = generated(model, tokens, 5, use_past_kv_cache=True)
        with sl.saturate(model):
            cached, uncached = (generated(model, tokens, 5, use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert not torch.equal(cached, soft)


# Threads


@pytest.mark.parametrize("name", everyday(["llama", "bert"], "llama"))
def test_two_threads_with_two_models(name):
    case = zoo.case(name)
    models = [case.build(), case.build()]
    blocks = [lambda: sl.saturate(models[0]), contextlib.nullcontext]
    results = [[], []]
    start = threading.Barrier(2)

    def work(index):
        start.wait(timeout=60)
        for _ in range(20):
            with torch.no_grad(), blocks[index]():
                results[index].append(run(case, models[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    with torch.no_grad():
        expected = []
        for model, block in zip(models, blocks, strict=True):
            with block():
                expected.append(run(case, model))
    assert not torch.allclose(*expected)
    for found, one in zip(results, expected, strict=True):
        assert len(found) == 20
        assert all(torch.equal(logits, one) for logits in found)


# TransformerLens's own patching

SWEEPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "attn_out": patching.get_act_patch_attn_out,
    "head_out": patching.get_act_patch_attn_head_out_all_pos,
    "head_out_by_pos": patching.get_act_patch_attn_head_out_by_pos,
    "head_v": patching.get_act_patch_attn_head_v_all_pos,
    "head_q": patching.get_act_patch_attn_head_q_all_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
}


def swept(model, sweep, block):
    clean, corrupted = tiny.tokens(length=6), tiny.tokens(length=6, seed=1)

    def metric(logits):
        return logits[:, -1, 5].mean()

    with torch.no_grad(), block:
        _, cache = model.run_with_cache(clean)
        return SWEEPS[sweep](model, corrupted, cache, metric)


@pytest.mark.filterwarnings("ignore:A hook on:UserWarning")
@pytest.mark.parametrize("sweep", everyday(SWEEPS, "head_out", "pattern"))
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_patching_functions_of_transformer_lens(name, sweep):
    model = zoo.model_of(name)
    if (name, sweep) == ("bert", "pattern"):
        with pytest.raises(NotReachedError, match=r"blocks\.0\.attn\.hook_pattern"):
            swept(model, sweep, sl.saturate(model))
        return
    found = swept(model, sweep, sl.saturate(model))
    expected = swept(model, sweep, rescaled(model, math.inf))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, swept(model, sweep, contextlib.nullcontext()))


@pytest.mark.parametrize(
    "sweep", everyday(["resid_pre", "attn_out", "head_out", "head_v", "head_q"], "head_out")
)
@pytest.mark.parametrize("name", everyday(["gpt2", "bert"], "gpt2"))
def test_patching_functions_of_transformer_lens_with_the_caches_of_a_pair(name, sweep):
    model, prompt = zoo.model_of(name), tiny.tokens(length=6)
    pair = sl.run_with_saturation_cache(model, prompt)

    def metric(logits):
        return logits[:, -1, 5].mean()

    with torch.no_grad():
        _, soft = model.run_with_cache(prompt)
        with rescaled(model, math.inf):
            _, saturated = model.run_with_cache(prompt)
            denoised = SWEEPS[sweep](model, prompt, soft, metric)
        noised = SWEEPS[sweep](model, prompt, saturated, metric)
        found = SWEEPS[sweep](model, prompt, pair.saturated.cache, metric)
        with sl.saturate(model):
            found_inside = SWEEPS[sweep](model, prompt, pair.soft.cache, metric)
    torch.testing.assert_close(found, noised, rtol=0, atol=1e-5)
    torch.testing.assert_close(found_inside, denoised, rtol=0, atol=1e-5)
    assert not torch.allclose(found, metric(pair.soft.logits), atol=1e-3)
    assert not torch.allclose(found_inside, metric(pair.saturated.logits), atol=1e-3)


# Levels


def test_scores_that_change_between_their_hook_and_the_softmax(monkeypatch):
    model = zoo.case("gpt2").build()
    module = model.get_submodule("blocks.0.attn")
    original = module._softmax_dropout_pattern

    def with_a_bias(scores, *args, **kwargs):
        return original(scores + 3 * torch.eye(scores.shape[-1]), *args, **kwargs)

    monkeypatch.setattr(module, "_softmax_dropout_pattern", with_a_bias)
    assert [site.level for site in sl.attention_sites(model)] == ["softmax", "scores"]
    with torch.no_grad():
        soft = model(tiny.tokens())
        with sl.saturate(model):
            found = model(tiny.tokens())
        with rescaled(model, math.inf):
            expected = model(tiny.tokens())
    assert torch.equal(found, expected)
    assert not torch.allclose(found, soft)


# Trials of every module


@pytest.mark.parametrize("kind", KINDS)
def test_modules_tried_together_change_what_they_change_alone(kind):
    model = zoo.model_of(kind)
    trials = verify_sites(model)
    assert [trial.site for trial in trials] == sl.attention_sites(model)

    def run(args, kwargs):
        return args, kwargs, logits_of(model(*args, **kwargs)).detach()

    args, kwargs, soft = on_made_up_inputs(model, run)
    for trial in trials:
        with sl.replace_attention(model, sl.transforms.RandomKey(), heads=trial.site.labels):
            alone = float((run(args, kwargs)[-1] - soft).abs().max())
        assert trial.change == pytest.approx(alone, rel=1e-3, abs=1e-6)
        assert trial.ok == (alone > 0)


def logits_of(output):
    found = getattr(output, "logits", output)
    return found if isinstance(found, torch.Tensor) else found[0]


def test_all_modules_are_tried_in_two_passes_and_one_without_effect_is_found(demo):
    passes = []
    sl.attention_sites(demo)
    counting = demo.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        assert [trial.ok for trial in verify_sites(demo)] == [True] * 4
        assert len(passes) == 2
        with demo.hooks([("blocks.2.attn.hook_out", lambda value, hook: value * 0)]):
            trials = verify_sites(demo)
        assert [trial.ok for trial in trials] == [True, True, False, True]
        assert trials[2].change == 0
    finally:
        counting.remove()
