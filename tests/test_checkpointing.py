"""Activation checkpointing: what backward runs a second time sees what the first run saw.

The oracle is the gradient without checkpointing, which is kept exactly.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
import torch.utils.checkpoint as checkpointing
import transformers
from everyday import everyday
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

import sat_lens as sl
from sat_lens.errors import NotReachedError, UnsupportedModelError
from sat_lens.intervention import observe_attention

TOKENS = tiny.tokens(length=12)
WHAT: dict[str, dict[str, Any]] = {
    "all": {},
    "one head": {"heads": "L1H2"},
    "c = 4": {"scale": 4.0},
    "one head, c = 4": {"heads": "L0H1", "scale": 4.0},
    "ties": {"ties": 0.1},
    "straight through": {"gradient": "straight-through"},
    "by head": {"scale": {"L0H0": 2.0, "L1H3": torch.inf}},
}
CASES = [
    *itertools.product(["sdpa", "eager"], [True, False], ["forward", "both"], WHAT),
]
ENTRIES = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")


def llama(attention: str = "sdpa") -> Any:
    config = transformers.LlamaConfig(**tiny.SIZE)
    return tiny.hf_model("LlamaForCausalLM", config, attention).train()


def enabled(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def loss_of(model: Any) -> Tensor:
    return model(TOKENS, labels=TOKENS, use_cache=False).loss


def gradient(model: Any, around: str = "forward", **what: Any) -> Tensor:
    with sl.saturate(model, **what):
        loss = loss_of(model)
        if around == "both":
            loss.backward()
    if around == "forward":
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def soft_gradient(model: Any) -> Tensor:
    loss_of(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(autouse=True)
def _pytorch_stays_as_it_was():
    before = [getattr(checkpointing, name) for name in ENTRIES]
    yield
    assert [getattr(checkpointing, name) for name in ENTRIES] == before


@pytest.mark.parametrize(
    ("attention", "reentrant", "around", "what"),
    everyday(
        CASES,
        ("sdpa", True, "forward", "c = 4"),
        ("sdpa", False, "forward", "all"),
        ("eager", True, "forward", "one head"),
        ("sdpa", False, "both", "ties"),
    ),
)
def test_gradients_are_those_without_checkpointing(attention, reentrant, around, what):
    expected = gradient(llama(attention), **WHAT[what])
    model = enabled(llama(attention), reentrant)
    assert torch.equal(gradient(model, around, **WHAT[what]), expected)
    assert not torch.allclose(expected, soft_gradient(llama(attention)), rtol=1e-2)
    assert model.config._attn_implementation == attention
    assert all("forward" not in module.__dict__ for module in model.modules())


def sequential(model: Any, reentrant: bool) -> Any:
    """Layers that their user hands to PyTorch's own function."""
    layers = model.model.layers
    for layer in layers:
        inner = layer.forward

        def forward(hidden: Tensor, inner: Any = inner, **kwargs: Any) -> Tensor:
            return checkpointing.checkpoint(
                lambda hidden: inner(hidden, **kwargs), hidden, use_reentrant=reentrant
            )

        layer.forward = forward
    return model


def wrapped(model: Any, reentrant: bool) -> Any:
    """As FSDP's users and accelerate wrap layers."""
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper.checkpoint_wrapper(
            layer,
            checkpoint_impl=list(checkpoint_wrapper.CheckpointImpl)[0 if reentrant else 1],
        )
    return model


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("by", [sequential, wrapped])
def test_other_ways_to_checkpoint(by, reentrant):
    expected = gradient(llama(), scale=4.0)
    model = by(llama(), reentrant)
    # A layer that is wrapped has another name, and the same label.
    assert torch.equal(gradient(model, scale=4.0), expected)


@pytest.mark.parametrize("reentrant", everyday([True, False], True))
def test_a_bridge(reentrant):
    gradients = []
    for on in (False, True):
        config = transformers.LlamaConfig(**tiny.SIZE)
        model = tiny.bridge("LlamaForCausalLM", config).train()
        if on:
            enabled(model.original_model, reentrant)
        with sl.saturate(model, scale=4.0):
            loss = model(TOKENS, return_type="loss")
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # Without a block, too, checkpointing changes a last digit here.
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", everyday([True, False], True))
def test_the_loss_of_a_trainer(reentrant, tmp_path):
    class Saturated(transformers.Trainer):
        def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            with sl.saturate(model, scale=4.0):
                return super().compute_loss(model, *args, **kwargs)

    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    weights = []
    for on in (False, True):
        model = llama()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant} if on else None,
        )
        Saturated(model, arguments, train_dataset=data).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("reentrant", everyday([True, False], True))
def test_soft_and_saturated_runs_before_one_backward(reentrant):
    """Each layer is recomputed twice, once as in either run."""
    gradients = []
    for on in (False, True):
        model = enabled(llama(), reentrant) if on else llama()
        soft = loss_of(model)
        with sl.saturate(model, "L0H1"):
            one = loss_of(model)
        with sl.saturate(model, scale=3.0), sl.saturate(model, "L1H0"):
            two = loss_of(model)
        (soft + 2 * one + 3 * two).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", everyday([True, False], True))
def test_backward_inside_of_other_blocks(reentrant):
    model = enabled(llama(), reentrant)
    with sl.saturate(model):
        loss = loss_of(model)
    with pytest.raises(NotReachedError, match="inside the same blocks"), sl.saturate(model, "L0H0"):
        loss.backward()
    loss = loss_of(model)
    with pytest.raises(NotReachedError, match="Call backward"), sl.saturate(model):
        loss.backward()


def test_gradients_in_the_limit_of_a_fused_kernel():
    """Kernels whose backward takes the pattern from the scores anew gave NaN for the values."""
    fused, eager = (gradient(llama(attention)) for attention in ("sdpa", "eager"))
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-6)


def test_observers_look_once():
    seen: dict[bool, list[Tensor]] = {False: [], True: []}
    for on in seen:
        model = enabled(llama(), True) if on else llama()
        with observe_attention(model, lambda _site, scores, on=on: seen[on].append(scores)):
            loss_of(model).backward()
    assert len(seen[True]) == len(seen[False]) == 2
    assert all(map(torch.equal, seen[True], seen[False]))


class OfAnotherLibrary(torch.autograd.Function):
    """Checkpointing that PyTorch knows nothing of: no function is handed to it."""

    @staticmethod
    def forward(ctx: Any, layer: Any, hidden: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return layer(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.layer(hidden)
        output.backward(gradient)
        return None, hidden.grad


class Foreign(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return OfAnotherLibrary.apply(lambda x: self.layer(x, **kwargs), hidden)


def test_checkpointing_of_another_library_is_refused():
    model = llama()
    model.model.layers[0] = Foreign(model.model.layers[0])
    soft_gradient(model)
    with pytest.raises(UnsupportedModelError, match="inside OfAnotherLibrary"):
        gradient(model)
