"""Straight-through saturation: hard numbers forward, the softmax's gradient backward."""

from __future__ import annotations

import functools
import math
from typing import Any
from unittest import mock

import oracle
import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday
from torch import Tensor

import sat_lens as sl
from sat_lens.attention import Limit, Scale, StraightThrough
from sat_lens.errors import ArgumentError, UnsupportedModelError

TOKENS = tiny.tokens()
FORMS = [
    {"ties": "exact"},
    {"ties": "nearest"},
    {"ties": 0.5},
    {"scale": 0.0},
    {"ties": "exact", "surrogate_scale": 0.3},
]


class HardForward(torch.autograd.Function):
    """By the definition: the hard row, and the Jacobian c (diag(p) - p p') of the soft row p."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, hard: Tensor, soft: Tensor, c: float) -> Tensor:
        ctx.save_for_backward(soft)
        ctx.c = c
        return hard

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (p,) = ctx.saved_tensors
        return ctx.c * p * (gradient - (p * gradient).sum(-1, keepdim=True)), None, None, None


def by_definition(surrogate_scale: float) -> Any:
    plain = oracle.rescaled_rows

    def rows(scores: Tensor, c: float) -> Tensor:
        fixed = scores.detach()
        hard, soft = plain(fixed, c), plain(fixed, surrogate_scale)
        return HardForward.apply(scores.double(), hard, soft, surrogate_scale)

    return mock.patch.object(oracle, "rescaled_rows", rows)


def gradients_of(output: Tensor, model: Any) -> dict[str, Tensor]:
    weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
    generator = torch.Generator().manual_seed(1)
    value = (output * torch.randn(output.shape, generator=generator)).sum()
    found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
    return {name: g for name, g in zip(weights, found, strict=True) if g is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(
            gradient, expected[name], rtol=0, atol=1e-4 * size + 1e-5, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("surrogate_scale", everyday([1.0, 0.3], 1.0))
@pytest.mark.parametrize("scale", everyday([math.inf, 0.0], math.inf))
@pytest.mark.parametrize(
    "name",
    everyday(
        ["gpt2", "llama", "native", "gpt_oss_sink", "opt", "t5", "led", "bert"], "gpt2", "opt"
    ),
)
def test_gradients_are_those_of_the_definition(name, scale, surrogate_scale):
    case, model = zoo.case(name), zoo.model_of(name)
    args, kwargs = case.inputs()
    sites = sl.attention_sites(model)
    heads = {site.path: [0, 2] for site in sites}
    labels = [site.label(head) for site in sites for head in (0, 2)]
    with (
        by_definition(surrogate_scale),
        oracle.rescaled_softmax(model, heads, scale, case.n_heads),
    ):
        expected = gradients_of(model(*args, **kwargs), model)
    with sl.saturate(
        model, labels, scale, gradient="straight-through", surrogate_scale=surrogate_scale
    ):
        found = gradients_of(model(*args, **kwargs), model)
    assert_same_gradients(found, expected)
    with sl.saturate(model, labels, scale):
        cut = gradients_of(model(*args, **kwargs), model)
    assert any(not torch.allclose(cut[name], found[name], rtol=0.01) for name in cut)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", everyday(["gpt2", "opt", "bert", "t5"], "gpt2", "opt"))
def test_no_number_of_the_forward_pass_changes(name, form):
    args, kwargs = zoo.case(name).inputs()
    model = zoo.model_of(name)
    plain = {key: value for key, value in form.items() if key != "surrogate_scale"}
    with sl.saturate(model, **plain):
        expected, before = model.run_with_cache(*args, **kwargs)
    with sl.saturate(model, **form, gradient="straight-through"):
        found, cache = model.run_with_cache(*args, **kwargs)
        with torch.no_grad():
            assert torch.equal(model(*args, **kwargs), expected)
    assert found.requires_grad
    assert torch.equal(found, expected)
    assert all(torch.equal(cache[name], before[name]) for name in before)


@functools.cache
def plain(attention: str) -> Any:
    config = transformers.LlamaConfig(**tiny.SIZE, num_key_value_heads=2)
    return tiny.hf_model("LlamaForCausalLM", config, attention)


@pytest.mark.parametrize("form", everyday(FORMS, FORMS[0]))
def test_the_fused_kernel_gives_the_same(form):
    assert {site.level for site in sl.attention_sites(plain("sdpa"))} == {"kernel"}
    options = {**form, "gradient": "straight-through"}
    plain_options = {name: form[name] for name in ("scale", "ties") if name in form}
    heads = ["L0H1", "L1H2", "L1H3"]
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    outputs = []
    for model in (plain("sdpa"), plain("eager")):
        with sl.saturate(model, heads, **options):
            logits = model(TOKENS, attention_mask=mask).logits[mask.bool()]
            outputs.append(gradients_of(logits, model))
        with sl.saturate(model, heads, **plain_options):
            assert torch.equal(model(TOKENS, attention_mask=mask).logits[mask.bool()], logits)
    assert_same_gradients(*outputs)


def test_some_heads_hard_and_others_scaled():
    model = zoo.model_of("gpt2")
    scale = {"L0H0": math.inf, "L0H1": 2.0, "L1H3": 0.0}
    with sl.saturate(model, scale=scale, gradient="straight-through"):
        found = gradients_of(model(TOKENS), model)
    groups = {"L0H0": StraightThrough(), "L0H1": Scale(2.0), "L1H3": StraightThrough(Scale(0.0))}
    with (
        sl.replace_attention(model, groups["L0H0"], "L0H0"),
        sl.replace_attention(model, groups["L0H1"], "L0H1"),
        sl.replace_attention(model, groups["L1H3"], "L1H3"),
    ):
        expected = gradients_of(model(TOKENS), model)
    assert_same_gradients(found, expected)


def test_a_hard_network_learns(demo):
    """A step along the gradient lowers the loss of the hard network itself."""
    model = zoo.case("gpt2").build()
    loss = sl.metrics.next_token_loss(TOKENS)
    with sl.saturate(model, gradient="straight-through"):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        values = []
        for _ in range(8):
            optimiser.zero_grad()
            value = loss(model(TOKENS))
            value.backward()
            optimiser.step()
            values.append(float(value.detach()))
    assert values[-1] < values[0] - 0.1


def test_the_gradient_in_the_surrogate_temperature(demo):
    tokens = torch.arange(24).reshape(2, 12)
    found = sl.temperature_gradient(demo, tokens, "loss", scale=0.7, hard=Limit("nearest"))
    assert (found.gradients != 0).all()
    with sl.saturate(demo, ties="nearest"):
        hard = sl.metrics.next_token_loss(tokens)(demo(tokens))
    torch.testing.assert_close(found.metric, hard.detach())
    refused = pytest.raises(UnsupportedModelError, match="hard=Limit")
    with sl.saturate(demo, gradient="straight-through"), refused:
        sl.temperature_gradient(demo, tokens, "loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "gumbel"}, "straight-through"),
        ({"gradient": "straight-through", "scale": 2.0}, "every scale is finite"),
        ({"gradient": "straight-through", "surrogate_scale": 0.0}, "above 0"),
        ({"gradient": "straight-through", "surrogate_scale": math.inf}, "above 0"),
    ],
)
def test_refusals(demo, options, message, types_unchecked):
    with pytest.raises(ArgumentError, match=message), sl.saturate(demo, **options):
        pass


def test_a_task_can_be_trained_inside_of_blocks():
    task, seen = sl.tasks.previous_token(32, 8), []

    def around(model, done):
        seen.append(done)
        return sl.saturate(model, gradient="straight-through")

    plain, hard = (sl.tasks.train_on(task, steps=4, around=way) for way in (None, around))
    assert seen == [0.0, 0.25, 0.5, 0.75]
    with torch.no_grad():
        assert not torch.equal(plain(task.tokens), hard(task.tokens))
