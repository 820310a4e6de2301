"""Gradients in the logarithm of the inverse temperature, against differences in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import oracle
import pandas as pd
import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import sat_lens as sl
from sat_lens.attention import AttentionCall, Scale, rescaled_attention, transform_scores
from sat_lens.errors import (
    ArgumentError,
    DataError,
    HeadSelectionError,
    NonFiniteError,
    UnsupportedModelError,
)

# The zoo's gradient check builds each model a second time, in float64.
EVERYDAY = {"gpt2", "llama", "gpt_oss_sink", "t5"}
# It runs early cycles under torch.no_grad.
DETACHED = "hrm_text"
NAMES = [case.name for case in zoo.CASES if case.name != DETACHED]
TOKENS = tiny.tokens()


def projection(logits: Tensor) -> Tensor:
    """A metric that every logit counts in, each with a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return (logits.double() * weights).sum() / logits.numel() ** 0.5


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a model takes to float32: norms, softmaxes, rotations."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        kwargs = kwargs or {}
        if func is torch.full and isinstance(kwargs.get("fill_value", args[-1]), float):
            kwargs = {"dtype": torch.float64, **kwargs}
        if func is torch._grouped_mm:
            return by_group(*args, **kwargs)
        args, kwargs = tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs)
        )
        return func(*args, **kwargs)


def by_group(rows: Tensor, weights: Tensor, offs: Tensor, **_: Any) -> Tensor:
    """The experts' products, for which PyTorch has no kernel in float64."""
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([x @ w for x, w in zip(rows.split(sizes), weights, strict=True)])


def by_differences(metric_at: Any, step: float = 1e-6) -> float:
    """d metric / d log c at c = 1, by a step too small to meet the kink of a ReLU."""
    return (metric_at(math.exp(step)) - metric_at(math.exp(-step))) / (2 * step)


@pytest.mark.parametrize("name", everyday(NAMES, *sorted(EVERYDAY)))
def test_agrees_with_differences_in_float64(name):
    case = zoo.case(name)
    args, kwargs = case.inputs()
    inputs = batch_of(args, kwargs)
    model, exact = zoo.model_of(name), case.build().double()
    exact_inputs = [to_float64(x) for x in args], {k: to_float64(v) for k, v in kwargs.items()}
    if case.is_shown:
        sl.attention_sites(exact, *exact_inputs[0], **exact_inputs[1])
    found = sl.temperature_gradient(model, inputs, projection).frame()["gradient"]
    sites = sl.attention_sites(model)
    size = found.abs().max()

    def difference(labels: list[str]) -> float:
        chosen = {
            site.path: [h for h in range(site.n_heads) if site.label(h) in labels] for site in sites
        }
        chosen = {path: heads for path, heads in chosen.items() if heads}

        def metric_at(c: float) -> float:
            road = oracle.rescaled_softmax(exact, chosen, c, case.n_heads)
            with torch.no_grad(), InFloat64(), road:
                return float(projection(exact(*exact_inputs[0], **exact_inputs[1])))

        return by_differences(metric_at)

    for stack in case.stacks:
        heads = case.heads(stack)
        for labels in (heads, heads[:1], heads[-2:-1]):
            error = abs(found[labels].sum() - difference(labels))
            assert error <= 1e-4 * size, f"{labels}: off by {error}, largest gradient {size}"


def batch_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a case as the data that a function of the library takes."""
    return {"input": args[0], **kwargs}


def to_float64(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_real else value


@functools.cache
def plain(attention: str) -> Any:
    """A Hugging Face model with grouped keys; its weights are those of the zoo's llama."""
    config = transformers.LlamaConfig(**tiny.SIZE, num_key_value_heads=2)
    return tiny.hf_model("LlamaForCausalLM", config, attention)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("per_prompt", [False, True])
def test_the_fused_kernel_gives_the_gradient_that_scores_give(scale, per_prompt):
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    batch = {"input_ids": TOKENS, "attention_mask": mask}
    metric = sl.metrics.logit_difference(answer=5, wrong=6)
    assert {site.level for site in sl.attention_sites(plain("sdpa"))} == {"kernel"}
    found, expected = (
        sl.temperature_gradient(plain(how), batch, metric, scale=scale, per_prompt=per_prompt)
        for how in ("sdpa", "eager")
    )
    assert expected.gradients.shape == ((8, 2) if per_prompt else (8,))
    size = float(expected.gradients.abs().max())
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("name", everyday(["gpt2", "t5", "longt5_local", "bart"], "gpt2"))
def test_prompts_have_gradients_of_their_own(name):
    args, kwargs = zoo.case(name).inputs()
    model, metric = zoo.model_of(name), sl.metrics.logit_difference(answer=5, wrong=6)
    found = sl.temperature_gradient(model, batch_of(args, kwargs), metric, per_prompt=True)
    for i in range(2):
        one = {name: given[i : i + 1] for name, given in batch_of(args, kwargs).items()}
        alone = sl.temperature_gradient(model, one, metric)
        size = float(alone.gradients.abs().max())
        torch.testing.assert_close(found.gradients[:, i], alone.gradients, rtol=0, atol=1e-4 * size)
    mean = sl.temperature_gradient(model, batch_of(args, kwargs), metric)
    torch.testing.assert_close(
        found.gradients.mean(1), mean.gradients, rtol=0, atol=1e-5 * float(found.gradients.max())
    )


def test_only_chosen_heads_and_nothing_stays(demo):
    tokens = torch.arange(24).reshape(2, 12)
    for parameter in demo.parameters():
        assert parameter.grad is None
    with torch.no_grad():
        before = demo(tokens)
        chosen = sl.temperature_gradient(demo, tokens, "loss", ["L1H2", "L0H3"])
    everything = sl.temperature_gradient(demo, tokens, "loss")
    assert chosen.labels == ("L0H3", "L1H2")
    assert chosen.values.shape == (2, 4)
    assert int(chosen.values.isfinite().sum()) == 2
    torch.testing.assert_close(chosen.values[1, 2], everything.values[1, 2])
    assert all(parameter.grad is None for parameter in demo.parameters())
    assert torch.equal(demo(tokens), before)


def test_a_frozen_model_has_gradients_too():
    model = zoo.case("gpt2").build().requires_grad_(False)
    found = sl.temperature_gradient(model, TOKENS, projection)
    expected = sl.temperature_gradient(zoo.model_of("gpt2"), TOKENS, projection)
    torch.testing.assert_close(found.gradients, expected.gradients)


def test_inverse_temperatures_can_be_trained_through_a_block(demo):
    tokens = torch.arange(24).reshape(2, 12)
    loss = sl.metrics.next_token_loss(tokens)
    c = torch.full((4, 8), 1.5, requires_grad=True)
    with sl.saturate(demo, ["L0H1", "L2H3"], scale=c):
        (gradient,) = torch.autograd.grad(loss(demo(tokens)), c)
    expected = sl.temperature_gradient(demo, tokens, "loss", ["L0H1", "L2H3"], scale=1.5)
    assert gradient.count_nonzero() == 2
    torch.testing.assert_close(1.5 * gradient[[0, 2], [1, 3]], expected.gradients)


def test_a_tensor_of_scales_is_what_numbers_are():
    scores = torch.randn(2, 3, 4, 5)
    scores[..., 3:] = -math.inf
    c = torch.tensor([0.0, 0.5, 20.0], requires_grad=True)
    found = transform_scores(scores, Scale(c)).softmax(-1)
    for head, each in enumerate(c.tolist()):
        alone = transform_scores(scores[:, head : head + 1], Scale(each)).softmax(-1)
        torch.testing.assert_close(found[:, head : head + 1], alone)
    (found * torch.randn(found.shape)).sum().backward()
    assert c.grad.isfinite().all()
    by_prompt = transform_scores(scores, Scale(torch.stack([c, 2 * c])))
    torch.testing.assert_close(by_prompt[1], transform_scores(scores, Scale(2 * c))[1])


@pytest.mark.parametrize("c", [[1.0, -1.0], [1.0, math.nan], [1.0, math.inf], [[[1.0]]], []])
def test_scales_that_are_none(c):
    with pytest.raises(ArgumentError, match="finite numbers >= 0"):
        Scale(torch.tensor(c))


def test_a_kernel_takes_scales_by_prompt_and_head():
    call = AttentionCall(*torch.randn(3, 2, 3, 5, 4), is_causal=True)
    c = torch.tensor([[1.0, 2.0, math.inf], [0.5, 1.0, 3.0]])
    found = rescaled_attention(call, c)
    for i, row in enumerate(c):
        torch.testing.assert_close(found[i], rescaled_attention(call, row)[i])


def test_saved_and_drawn(demo, tmp_path):
    tokens, metric = torch.arange(24).reshape(2, 12), sl.metrics.logit_difference(5, 6)
    found = sl.temperature_gradient(demo, tokens, metric, per_prompt=True)
    found.save(tmp_path / "gradient")
    pd.testing.assert_frame_equal(sl.load(tmp_path / "gradient").frame(), found.frame())
    assert list(found.frame().columns) == ["gradient", "gradient_se", "scale"]
    assert "d metric / d log c" in repr(found)
    assert found.plot().axes
    pair = zoo.case("t5").inputs()
    several = sl.temperature_gradient(zoo.model_of("t5"), batch_of(*pair), projection)
    assert set(several.values) == {"encoder", "decoder", "cross"}
    with pytest.raises(ArgumentError, match="one stack"):
        several.plot()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": lambda logits: logits.argmax(-1).double().mean()}, ArgumentError, "gradient"),
        ({"metric": lambda logits: float(logits.detach().sum())}, ArgumentError, "with a gradient"),
        ({"metric": lambda logits: logits.sum() / 0}, NonFiniteError, "divides by"),
        ({"metric": lambda logits: (logits - logits).sum().sqrt()}, NonFiniteError, "L0H0"),
        ({"metric": "accuracy"}, ArgumentError, '"loss" or a function'),
        ({"metric": projection, "per_prompt": True}, ArgumentError, "per_prompt"),
        ({"scale": math.inf}, ArgumentError, "L0H0 c = inf"),
        ({"scale": {"L1H1": 0.0}}, ArgumentError, "L1H1 c = 0"),
        ({"heads": "L9H9"}, HeadSelectionError, "L9H9"),
    ],
)
def test_refusals(demo, options, error, message):
    tokens = torch.arange(24).reshape(2, 12)
    with pytest.raises(error, match=message):
        sl.temperature_gradient(demo, tokens, **{"metric": "loss", **options})


def test_a_hard_pattern_passes_no_gradient(demo):
    tokens = torch.arange(24).reshape(2, 12)
    with sl.saturate(demo, "L1H1"):
        with pytest.raises(UnsupportedModelError, match="L1H1 hard"):
            sl.temperature_gradient(demo, tokens, "loss")
        sl.temperature_gradient(demo, tokens, "loss", "L1H0")
    # What a block around the call leaves soft counts.
    with sl.saturate(demo, "L1H1", 2.0):
        inside = sl.temperature_gradient(demo, tokens, "loss", "L1H1")
    expected = sl.temperature_gradient(demo, tokens, "loss", "L1H1", scale=2.0)
    torch.testing.assert_close(inside.gradients, expected.gradients)


def test_a_model_that_switches_gradients_off_is_refused():
    args, kwargs = zoo.case(DETACHED).inputs()
    model = zoo.model_of(DETACHED)
    with pytest.raises(UnsupportedModelError, match="no_grad"):
        sl.temperature_gradient(model, batch_of(args, kwargs), projection)
    with pytest.raises(UnsupportedModelError, match="no_grad"):
        sl.temperature_gradient(model, batch_of(args, kwargs), projection, "H_blocks.L1H0")


# Fits.


def target(model: Any, tokens: Tensor, scale: Any) -> Any:
    """The divergence from the model at other temperatures, which is least at those."""
    with torch.no_grad(), sl.saturate(model, scale=scale):
        return sl.metrics.kl_to_soft(model(tokens))


@pytest.mark.parametrize("per", everyday(["model", "layer", "head"], "head"))
def test_temperatures_that_are_known_are_found(demo, per):
    tokens = torch.arange(24).reshape(2, 12) + 40
    wanted = {"L0H1": 2.0, "L0H6": 2.0, "L2H3": 0.7}
    if per == "model":
        wanted = dict.fromkeys(wanted, 1.6)
    metric = target(demo, tokens, wanted)
    before = demo(tokens)
    found = sl.tune_temperature(
        demo, [tokens] * 2, metric, per, 80, heads=list(wanted), learning_rate=0.1, progress=False
    )
    assert found.scale == pytest.approx(wanted, rel=0.1)
    assert found.history[-1] < 0.05 * found.history[0]
    assert float(found.after.mean()) < 0.05 * float(found.before.mean())
    shared = {"model": 1, "layer": 2, "head": 3}[per]
    assert len(found.scales.unique()) == shared
    assert torch.equal(demo(tokens), before)
    with sl.saturate(demo, scale=found.scale):
        torch.testing.assert_close(metric.per_prompt(demo(tokens)).detach(), found.after)


def test_a_fused_model_is_tuned_as_an_eager_one():
    found = [
        sl.tune_temperature(plain(how), TOKENS, steps=3, batch_size=1, progress=False)
        for how in ("sdpa", "eager")
    ]
    torch.testing.assert_close(found[0].scales, found[1].scales, rtol=1e-3, atol=0)
    assert found[0].before.shape == (1,)
    assert (found[0].scales != 1).all()


def test_data_are_held_back(demo):
    tokens = torch.arange(7 * 8).reshape(7, 8) + 30
    found = sl.tune_temperature(demo, tokens, steps=1, batch_size=1, heads="L0H0", progress=False)
    # The second and the seventh of seven batches.
    expected = sl.metrics.next_token_loss(tokens[[1, 6]]).per_prompt(demo(tokens[[1, 6]]))
    torch.testing.assert_close(found.before, expected.detach(), rtol=1e-4, atol=1e-4)
    other = sl.tune_temperature(
        demo, tokens[:1], steps=1, heads="L0H0", held_out=tokens[3:5], progress=False
    )
    assert len(other.before) == 2


def test_an_interrupt_keeps_the_fit(demo, monkeypatch):
    steps = iter([None, None])

    def step(self):
        if next(steps, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    tokens = torch.arange(16).reshape(2, 8)
    found = sl.tune_temperature(demo, [tokens] * 2, steps=9, heads="L0H0", progress=False)
    assert not found.complete
    assert len(found.history) == 2
    assert "interrupted" in repr(found)


def test_a_fit_is_saved_and_drawn(demo, tmp_path):
    tokens = torch.arange(16).reshape(2, 8)
    found = sl.tune_temperature(demo, tokens, steps=2, batch_size=1, progress=False)
    found.save(tmp_path / "fit")
    again = sl.load(tmp_path / "fit")
    assert again.scale == found.scale
    assert again.values.shape == (4, 8)
    assert list(found.frame().columns) == ["scale", "log2_scale"]
    assert "held-out" in repr(found)
    assert found.plot().axes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "group"}, ArgumentError, "'head', 'layer', 'model'"),
        ({"steps": 0}, ArgumentError, "steps"),
        ({"batch_size": 8}, DataError, "held_out"),
        ({"metric": lambda logits: logits.detach().sum()}, ArgumentError, "with a gradient"),
        ({"metric": lambda logits: logits.sum() / 0}, NonFiniteError, "divides by"),
        ({"metric": lambda logits: (logits - logits).sum().sqrt()}, NonFiniteError, "log c"),
    ],
)
def test_refusals_of_fits(demo, options, error, message, types_unchecked):
    tokens = torch.arange(16).reshape(2, 8)
    with pytest.raises(error, match=message):
        sl.tune_temperature(
            demo, tokens, **{"steps": 1, "batch_size": 1, "progress": False, **options}
        )
