"""What surrounds a run, autocast say, changes no number and nothing that is remembered."""

from __future__ import annotations

import contextlib
import math

import pandas as pd
import pytest
import torch
from everyday import everyday

import sat_lens as sl
from sat_lens.attention import (
    AttentionCall,
    distances_to_saturated,
    limit_is_exact,
    rescaled_attention,
)
from sat_lens.attention.critical import critical_bins
from sat_lens.errors import ArgumentError, UnsupportedModelError

TOKENS = torch.tensor([[5, 9, 200, 31, 9, 200, 77, 5, 12, 40]])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "a wide default": lambda: default_dtype(torch.float64),
    "a narrow default": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
}
surroundings = pytest.mark.parametrize("around", SURROUNDINGS.values(), ids=SURROUNDINGS)
one_surrounding = pytest.mark.parametrize(
    "around",
    everyday(SURROUNDINGS.values(), SURROUNDINGS["inference mode"]),
    ids=SURROUNDINGS,
)
INTERVENTIONS = {
    "limit": lambda model: sl.saturate(model),
    "limit of a layer": lambda model: sl.saturate(model, "L1"),
    "tolerance": lambda model: sl.saturate(model, ties=0.3),
    "nearest": lambda model: sl.saturate(model, ties="nearest"),
    "c = 0.1": lambda model: sl.saturate(model, scale=0.1),
    "uniform": lambda model: sl.saturate(model, scale=0),
    "random key": lambda model: sl.replace_attention(model, sl.transforms.RandomKey()),
    "one's own": lambda model: sl.replace_attention(model, lambda scores: 1.7 * scores),
}
interventions = pytest.mark.parametrize("intervention", INTERVENTIONS.values(), ids=INTERVENTIONS)


def logits(model, intervention):
    with torch.no_grad(), intervention(model):
        return model(TOKENS)


@surroundings
@interventions
def test_the_same_logits_whatever_surrounds_the_run(demo, around, intervention):
    expected = logits(demo, intervention)
    with around():
        assert torch.equal(logits(demo, intervention), expected)
        hooks = sl.saturation_hooks(demo)
        by_hooks = demo.run_with_hooks(TOKENS, fwd_hooks=hooks)
    assert torch.equal(by_hooks.detach(), logits(demo, sl.saturate))


@one_surrounding
def test_the_same_measurements_whatever_surrounds_them(demo, around):
    def measured():
        roles = sl.head_roles(demo, TOKENS.repeat(2, 3), progress=False).frame()
        metric = sl.metrics.logit_difference(5, 9)
        swept = sl.sweep_heads(demo, TOKENS, metric, heads=["L0", "L3"], progress=False)
        curve = sl.scaling_curve(demo, TOKENS, scales=[0.5, math.inf], progress=False).frame()
        pair = sl.run_with_saturation_cache(demo, TOKENS)
        return roles, swept.frame(), curve, pair.similarity("resid_post").frame()

    expected = measured()
    with around():
        found = measured()
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, other, check_dtype=False, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, math.inf])
def test_under_autocast_the_pattern_is_that_of_the_scores_that_arrive(demo, scale):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, soft = demo.run_with_cache(TOKENS)
        # Layer by layer, so that both runs have the same scores there.
        for layer in range(demo.cfg.n_layers):
            with sl.saturate(demo, f"L{layer}", scale):
                _, cache = demo.run_with_cache(TOKENS)
            scores = soft["attn_scores", layer]
            assert scores.dtype == torch.bfloat16
            transform = {0.0: sl.transforms.Uniform(), math.inf: sl.transforms.Limit()}.get(
                scale, sl.transforms.Scale(scale)
            )
            hidden = torch.ones(10, 10).triu(1).bool()
            exact = transform(scores.double().masked_fill(hidden, -math.inf)).softmax(-1)
            assert torch.allclose(cache["pattern", layer].double(), exact, atol=1e-6)


def test_statistics_under_autocast_are_in_float32(demo):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, cache = demo.run_with_cache(TOKENS)
        table = sl.head_roles(demo, TOKENS, min_keys=1, progress=False).frame()
    for layer in range(demo.cfg.n_layers):
        hidden = torch.ones(10, 10).triu(1).bool()
        scores = cache["attn_scores", layer][0].float().masked_fill(hidden, -math.inf)
        first = scores.softmax(-1)[..., 0].mean(-1)
        found = table[table.index.str.startswith(f"L{layer}H")]["first"]
        assert torch.allclose(torch.tensor(found.to_list()).float(), first, atol=1e-6)


@pytest.mark.parametrize("c", [0.3, 3.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_kernel_is_as_exact_under_autocast(c, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = (3 * torch.randn(3, 1, 4, 64, 32, generator=generator)).bfloat16()
    call = AttentionCall(*inputs.to(dtype))
    outside = rescaled_attention(AttentionCall(*inputs), torch.full((4,), c))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rescaled_attention(call, torch.full((4,), c)), outside)
        rows = call.scores(torch.tensor([[0, 5]]))
    assert torch.equal(rows, call.scores(torch.tensor([[0, 5]])))


@pytest.mark.parametrize(
    "around", [lambda: torch.autocast("cpu", torch.bfloat16), *SURROUNDINGS.values()]
)
def test_what_is_learnt_in_passing_does_not_depend_on_it(around):
    limit_is_exact.cache_clear()
    with around():
        assert limit_is_exact(torch.device("cpu"), torch.float32)


def test_sites_are_looked_at_again_outside_of_autocast(demo):
    fresh = sl.load_model("demo")
    outside = sl.attention_sites(demo)
    with torch.autocast("cpu", torch.bfloat16):
        sl.attention_sites(fresh)
    assert sl.attention_sites(fresh) == outside


def test_distances_and_critical_scales_do_not_depend_on_the_default():
    scores = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    expected = distances_to_saturated(scores), critical_bins(scores)
    with default_dtype(torch.bfloat16):
        found = distances_to_saturated(scores), critical_bins(scores)
    for name, value in vars(expected[0]).items():
        assert torch.equal(getattr(found[0], name), value), name
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize(
    "run",
    [
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_functional_transforms_are_refused(demo, run):
    embedded = torch.randn(2, 5, demo.cfg.d_model)

    def forward(x):
        return demo.blocks[0].attn(hidden_states=x.reshape(-1, 5, demo.cfg.d_model))[0]

    with sl.saturate(demo), pytest.raises(UnsupportedModelError, match=r"torch\.func"):
        run(forward, embedded)


NEED_GRADIENTS = {
    "importance of rows": lambda model, metric: sl.head_roles(
        model, TOKENS, metric=metric, progress=False
    ),
    "attribution": lambda model, metric: sl.sweep_heads(
        model, TOKENS, metric, method="attribution", progress=False
    ),
    "temperature_gradient": lambda model, metric: sl.temperature_gradient(model, TOKENS, metric),
}


@pytest.mark.parametrize("run", NEED_GRADIENTS.values(), ids=NEED_GRADIENTS)
def test_what_needs_gradients_says_so_in_inference_mode(demo, run):
    metric = sl.metrics.logit_difference(5, 9)
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"Use torch\.no_grad"):
        run(demo, metric)
    with torch.no_grad():
        assert run(demo, metric) is not None
