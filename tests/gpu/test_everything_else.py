"""Saturation, caches, roles and sweeps on a GPU give what the CPU gives in double precision.

Without a GPU the device is the CPU, and what is tested is its single precision.
"""

from __future__ import annotations

import copy
import math

import pandas as pd
import pytest
import torch
from tiny import GPT, of_class, tokens
from transformer_lens.model_bridge import TransformerBridge
from zoo import model_of

import sat_lens as sl
from sat_lens.patching import sweep_heads

FAMILIES = ["gpt2", "llama", "bert", "gptj", "t5", "native"]


def pair_of(name: str, device: torch.device) -> tuple[TransformerBridge, TransformerBridge]:
    """Give a model on the device, and itself in double precision on the CPU."""
    model = model_of(name).eval()
    return copy.deepcopy(model).to(device), copy.deepcopy(model).double()


def inputs_of(name: str, device: torch.device) -> dict[str, torch.Tensor]:
    inputs = {"input": tokens().to(device)}
    return inputs | ({"decoder_input": tokens(length=7).to(device)} if name == "t5" else {})


def near(found: torch.Tensor, exact: torch.Tensor) -> None:
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.cpu().double(), exact.double(), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("scale", [3.0, math.inf])
@pytest.mark.parametrize("name", FAMILIES)
def test_saturation(device, name, scale):
    mine, exact = pair_of(name, device)
    with torch.no_grad():
        soft = exact(**inputs_of(name, torch.device("cpu")))
        with sl.saturate(mine, scale=scale), sl.saturate(exact, scale=scale):
            found = mine(**inputs_of(name, device))
            expected = exact(**inputs_of(name, torch.device("cpu")))
    assert found.device.type == device.type
    assert (expected - soft).abs().max() > 0.01 * soft.abs().max()
    near(found, expected)


def test_both_caches(device):
    mine, exact = pair_of("gpt2", device)
    found = sl.run_with_saturation_cache(mine, tokens().to(device))
    expected = sl.run_with_saturation_cache(exact, tokens())
    for cache in ("soft", "saturated"):
        for point in ("blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"):
            activation = getattr(found, cache).cache[point]
            assert activation.device.type == device.type
            near(activation, getattr(expected, cache).cache[point])


def test_roles(device):
    mine, exact = pair_of("gpt2", device)
    data = tokens(batch=4, length=20)
    frame = sl.head_roles(mine, data.to(device), rows="all", progress=False).frame()
    expected = sl.head_roles(exact, data, rows="all", progress=False).frame()
    pd.testing.assert_frame_equal(frame, expected, check_exact=False, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", [None, "each"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("source", ["local", "run"])
def test_sweeps(device, source, direction, positions):
    model = of_class("GPT2LMHeadModel", "GPT2Config", **GPT | {"n_layer": 3})().eval()
    mine, exact = copy.deepcopy(model).to(device), copy.deepcopy(model).double()
    metric = sl.metrics.logit_difference(7, 9)
    how = {"source": source, "direction": direction, "positions": positions, "progress": False}
    found = sweep_heads(mine, tokens().to(device), metric, **how)
    expected = sweep_heads(exact, tokens(), metric, **how)
    assert found.checks.route == "replay"
    assert found.item_effects.abs().max() > 1e-3
    near(found.item_values, expected.item_values)
