"""Plain Hugging Face models: fused attention against the bridge of the same weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from everyday import everyday
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sat_lens as sl
from sat_lens.attention import (
    AttentionCall,
    Limit,
    RandomKey,
    limit_is_exact,
    rescaled_attention,
)
from sat_lens.attention import (
    fused as fused_attention,
)
from sat_lens.errors import ArgumentError, NotReachedError, UnsupportedModelError
from sat_lens.roles import statistics
from sat_lens.sites import discovery

CPU = torch.device("cpu")
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", tiny.GPT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", tiny.SIZE | {"num_key_value_heads": 2}),
    "bert": ("BertForMaskedLM", "BertConfig", tiny.SIZE),
    "bart": ("BartForConditionalGeneration", "BartConfig", tiny.BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", tiny.T5),
}
DECODERS = ["gpt2", "llama"]
TOKENS = tiny.tokens()
DECODED = tiny.tokens(length=7, seed=1)


def build(name: str, attention: str = "sdpa") -> Any:
    architecture, config, size = MODELS[name]
    settings = getattr(transformers, config)(**copy.deepcopy(size))
    return tiny.hf_model(architecture, settings, attention)


plain = functools.cache(build)


@functools.cache
def eager_twin(name: str) -> Any:
    return build(name, "eager")


@functools.cache
def bridge(name: str) -> Any:
    architecture, config, size = MODELS[name]
    return tiny.bridge(architecture, getattr(transformers, config)(**copy.deepcopy(size)))


def logits(model: Any, **options: Any) -> Tensor:
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_input_ids"] = DECODED
    with torch.no_grad():
        return model(TOKENS, **options).logits


def bridge_logits(name: str, **options: Any) -> Tensor:
    if name in ("bart", "t5"):
        options["decoder_input"] = DECODED
    with torch.no_grad():
        return bridge(name)(TOKENS, **options)


@contextlib.contextmanager
def no_softmax() -> Iterator[None]:
    """Fail if the matrix of scores is made."""
    with mock.patch.object(F, "softmax", side_effect=AssertionError("attention ran eagerly")):
        yield


@pytest.mark.parametrize("name", everyday(["gpt2", "llama", "bert", "bart"], "gpt2", "bart"))
@pytest.mark.parametrize("scale", everyday([0.0, 0.5, 3.0, math.inf], 3.0, math.inf))
def test_agrees_with_the_bridge(name: str, scale: float) -> None:
    model = plain(name)
    assert {site.level for site in sl.attention_sites(model)} == {"kernel"}
    everything = [label for site in sl.attention_sites(model) for label in site.labels]
    soft = logits(model)
    for heads in (None, everything[-3], everything[1::2]):
        with sl.saturate(bridge(name), heads, scale):
            expected = bridge_logits(name)
        with sl.saturate(model, heads, scale), no_softmax():
            found = logits(model)
        # Rounding grows with the scores that it is applied to.
        atol = 1e-5 * float(soft.abs().max().clamp(min=1))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        assert not torch.allclose(found, soft, atol=1e-3)
    assert torch.equal(logits(model), soft)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scale", [0.0, 3.0, math.inf])
def test_padding(name: str, side: str, scale: float) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
    model, real = plain(name), mask.bool()
    with sl.saturate(eager_twin(name), scale=scale):
        expected = logits(eager_twin(name), attention_mask=mask)
    with sl.saturate(model, scale=scale), no_softmax():
        found = logits(model, attention_mask=mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", everyday(DECODERS, "llama"))
@pytest.mark.parametrize("padded", everyday([False, True], True))
@pytest.mark.parametrize(("heads", "scale"), [(None, math.inf), ("L1H2", math.inf), (None, 3.0)])
def test_generation_does_not_depend_on_the_cache(
    name: str, padded: bool, heads: Any, scale: float
) -> None:
    model, mask = plain(name), torch.ones_like(TOKENS)
    mask[0, :3] = 0 if padded else 1

    def generated(use_cache: bool) -> Tensor:
        return model.generate(
            TOKENS,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=0,
        )

    soft = generated(use_cache=True)
    with sl.saturate(model, heads, scale), no_softmax():
        found = generated(use_cache=True)
        assert torch.equal(found, generated(use_cache=False))
    assert not torch.equal(found, soft)
    assert torch.equal(generated(use_cache=True), soft)


@pytest.mark.parametrize("name", everyday(DECODERS, "llama"))
def test_nested_blocks(name: str) -> None:
    model = plain(name)
    heads = [label for site in sl.attention_sites(model) for label in site.labels]
    with sl.saturate(model):
        limit = logits(model)
    with sl.saturate(model, heads[::2]), sl.saturate(model, heads[1::2]):
        torch.testing.assert_close(logits(model), limit, rtol=0, atol=1e-5)
    with sl.saturate(model), sl.saturate(model, scale=3.0), sl.saturate(model):
        torch.testing.assert_close(logits(model), limit, rtol=0, atol=1e-5)
    # The inner block needs scores, so that both run eagerly.
    with sl.saturate(model, heads[::2]), sl.saturate(model, heads[1::2], ties=0.0):
        torch.testing.assert_close(logits(model), limit, rtol=0, atol=1e-5)


def test_gradients_of_a_finite_scale() -> None:
    gradients = []
    for model, block in ((plain("gpt2"), plain("gpt2")), (bridge("gpt2"), bridge("gpt2"))):
        with sl.saturate(block, scale=2.0):
            out = model(TOKENS)
        embedding = next(p for n, p in model.named_parameters() if "wte" in n or "embed" in n)
        (gradient,) = torch.autograd.grad(getattr(out, "logits", out)[:, -1, 5].sum(), embedding)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5 * float(gradients[0].abs().max()))


# Where the kernel cannot serve, eager attention does


FALLBACKS = {
    "nearest": ("llama", lambda m: sl.saturate(m, ties="nearest")),
    "tolerance": ("llama", lambda m: sl.saturate(m, ties=0.1)),
    "own transform": ("llama", lambda m: sl.replace_attention(m, lambda scores: -scores)),
    "random key": ("bert", lambda m: sl.replace_attention(m, Limit(0.5), "L0H1")),
    "bias": ("t5", lambda m: sl.saturate(m)),
}


@pytest.mark.parametrize("case", everyday(FALLBACKS, "nearest", "bias"))
def test_eager_attention_serves_instead(case: str, caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(discovery, "_logged", set())
    name, block = FALLBACKS[case]
    model = plain(name)
    soft = logits(model)
    with block(bridge(name)):
        expected = bridge_logits(name)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with block(model):
                found = logits(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert [record.getMessage().count("eager") for record in caplog.records] == [1]
    assert "give shorter texts, or fewer at once" in caplog.text
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), soft)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_finite_scale_in_half_precision_is_that_of_the_same_numbers_in_float32(
    dtype: torch.dtype,
) -> None:
    half = torch.randn(3, 1, 2, 30, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.zeros(30, 30, dtype=dtype)
    mask.masked_fill_(torch.ones(30, 30).triu(1).bool(), torch.finfo(dtype).min)
    c = torch.tensor([3.0, 0.3])
    found = rescaled_attention(AttentionCall(*half, attn_mask=mask), c)
    query, key, value = half.float()
    scores = (c[:, None, None] * (query @ key.mT) * 8**-0.5).masked_fill(mask != 0, -math.inf)
    expected = scores.softmax(-1) @ value
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)


def test_half_precision_ties_are_left_to_the_eager_path(caplog: Any) -> None:
    model = build("llama").to(torch.bfloat16)
    with sl.saturate(model, scale=3.0), no_softmax():
        logits(model)
    with sl.saturate(model):
        assert model.config._attn_implementation == "eager"
        assert logits(model).isfinite().all()
    assert model.config._attn_implementation == "sdpa"


def test_a_kernel_that_misses_the_limit_does_not_serve(caplog: Any, monkeypatch: Any) -> None:
    exact = AttentionCall.run

    def rounded(call: AttentionCall) -> Tensor:
        """Blur the scores as little as a kernel may that was made for scales near 1."""
        noise = torch.linspace(0, 1e-3, call.key.shape[-2])[:, None].to(call.key)
        return exact(dataclasses.replace(call, key=call.key + noise))

    monkeypatch.setattr(discovery, "_logged", set())
    monkeypatch.setattr(AttentionCall, "run", rounded)
    limit_is_exact.cache_clear()
    model = plain("llama")
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with sl.saturate(model):
                    found = logits(model)
    finally:
        limit_is_exact.cache_clear()
    with sl.saturate(bridge("llama")):
        torch.testing.assert_close(found, bridge_logits("llama"), rtol=0, atol=1e-5)
    assert sum("misses the saturated limit" in r.getMessage() for r in caplog.records) == 1


def test_the_self_test_holds_here() -> None:
    assert limit_is_exact(CPU, torch.float32)
    assert limit_is_exact(CPU, torch.float64)


# The kernel's arithmetic


@pytest.mark.parametrize("size", [2.0**-40, 2.0**-10, 1.0, 2.0**13, 2.0**40])
@pytest.mark.parametrize("causal", [False, True])
def test_the_limit_for_scores_of_any_size(size: float, causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (
        torch.randint(-2, 3, (1, 2, 40, 8), generator=generator).float() for _ in range(2)
    )
    value = torch.randn(1, 2, 40, 8, generator=generator)
    call = AttentionCall(query * size, key, value, is_causal=causal)
    visible = torch.ones(40, 40, dtype=torch.bool)
    found = rescaled_attention(call, torch.full((2,), math.inf))
    wins = fused_attention.by_definition(
        query.double(), key.double(), value.double(), visible.tril() if causal else visible
    )
    torch.testing.assert_close(found.double(), wins, rtol=0, atol=1e-6)


def test_a_finite_mask_hides_and_rows_without_a_key_stay() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), lowest)
    mask[0] = lowest
    call = AttentionCall(query, key, value, attn_mask=mask)
    found = rescaled_attention(call, torch.tensor([math.inf, math.inf]))
    assert torch.equal(found[:, :, 0], call.run()[:, :, 0])
    torch.testing.assert_close(
        found[:, :, 1:], fused_attention.by_definition(query, key, value, mask == 0)[:, :, 1:]
    )


def test_a_bias_is_refused() -> None:
    query, key, value = torch.randn(3, 1, 2, 6, 4)
    call = AttentionCall(query, key, value, attn_mask=torch.randn(6, 6))
    with pytest.raises(UnsupportedModelError, match="bias"):
        rescaled_attention(call, torch.tensor([math.inf, math.inf]))
    with pytest.raises(UnsupportedModelError, match="3 heads"):
        rescaled_attention(AttentionCall(query, key, value), torch.ones(3))


# Long texts


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            # A mask that is expanded takes no memory.
            if isinstance(tensor, Tensor) and 0 not in tensor.stride():
                self.numel = max(self.numel, tensor.numel())
        return made


@functools.cache
def reader_of_long_texts(attention: str) -> Any:
    config = transformers.GPT2Config(**(tiny.GPT | tiny.SPECIAL | {"n_positions": 1024}))
    return tiny.hf_model("GPT2LMHeadModel", config, attention)


@pytest.mark.parametrize("scale", everyday([3.0, math.inf], math.inf))
def test_no_matrix_of_scores_is_made(scale: float) -> None:
    long, sizes = tiny.tokens(1, 1024), {}
    for attention in ("sdpa", "eager"):
        model = reader_of_long_texts(attention)
        with torch.no_grad(), sl.saturate(model, scale=scale), Largest() as largest:
            loss = model(long, labels=long, use_cache=False).loss
        sizes[attention] = largest.numel
        assert loss.isfinite()
    assert sizes["eager"] >= 1024**2 > 4 * sizes["sdpa"]


@pytest.mark.slow
def test_roles_of_long_texts_need_no_matrix_either(monkeypatch: Any) -> None:
    monkeypatch.setattr(statistics, "FUSED_BLOCK_ELEMENTS", 2**16)
    model, long = reader_of_long_texts("sdpa"), tiny.tokens(1, 1024)
    with Largest() as largest:
        found = sl.head_roles(model, long, progress=False)
    expected = sl.head_roles(reader_of_long_texts("eager"), long, progress=False)
    assert 2 * largest.numel < 1024**2
    assert_same_roles(found, expected)


@pytest.mark.parametrize("name", everyday(["gpt2", "llama", "bert"], "llama"))
@pytest.mark.parametrize("block", everyday([1, 700, 2**22], 700))
def test_roles_are_those_of_the_bridge(name: str, block: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(statistics, "FUSED_BLOCK_ELEMENTS", block)
    mask = torch.ones(3, 24, dtype=torch.long)
    mask[0, -5:] = 0
    data = [{"input_ids": tiny.tokens(3, 24), "attention_mask": mask}]
    with no_softmax():
        # Statistics take softmax as a method of tensors.
        found = sl.head_roles(plain(name), data, progress=False)
    as_lens = [{"input": data[0]["input_ids"], "attention_mask": mask}]
    assert_same_roles(found, sl.head_roles(bridge(name), as_lens, progress=False))


def assert_same_roles(found: Any, expected: Any) -> None:
    one, other = found.frame(), expected.frame()
    for column in ("role", "target", "n_rows"):
        assert list(one[column]) == list(other[column])
    numbers = one.select_dtypes("number").columns
    pd.testing.assert_frame_equal(one[numbers], other[numbers], rtol=0, atol=1e-4)


def test_weighted_roles_need_transformer_lens() -> None:
    with pytest.raises(ArgumentError, match="boot_transformers"):
        sl.head_roles(plain("llama"), TOKENS, metric="loss")


# Refusals


def test_a_head_that_is_not_reached_is_an_error(monkeypatch: Any) -> None:
    model = build("llama")
    sl.attention_sites(model)
    attention = model.model.layers[1].self_attn
    monkeypatch.setattr(
        type(attention), "forward", lambda self, hidden_states, **_: (hidden_states, None)
    )
    with sl.saturate(model), pytest.raises(NotReachedError, match="0 times"):
        logits(model)


def test_what_has_no_attention_or_is_no_model_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="softmax attention"):
        sl.attention_sites(tiny.hf_model("MambaForCausalLM", config))
    with pytest.raises(ArgumentError, match="Linear"):
        sl.attention_sites(torch.nn.Linear(2, 2))


def test_training_mode_with_dropout() -> None:
    with (
        pytest.raises(UnsupportedModelError, match="training mode"),
        sl.saturate(build("gpt2").train()),
    ):
        pytest.fail("the block was entered")


METRIC = sl.metrics.logit_difference(5, 6)
NEEDS_HOOKS = {
    "hooks": lambda model: sl.saturation_hooks(model),
    "pair": lambda model: sl.run_with_saturation_cache(model, TOKENS),
    "curve": lambda model: sl.scaling_curve(model, TOKENS, scales=[1.0, 2.0]),
    "sweep": lambda model: sl.sweep_heads(model, TOKENS, METRIC),
    "search": lambda model: sl.saturable_heads(model, TOKENS, METRIC, tolerance=0.1),
}


@pytest.mark.parametrize("call", NEEDS_HOOKS)
def test_what_needs_hooks_asks_for_transformer_lens(call: str) -> None:
    with pytest.raises(ArgumentError, match="boot_transformers"):
        NEEDS_HOOKS[call](plain("llama"))


def test_an_eager_model_is_touched_at_its_softmax() -> None:
    model = build("bert", "eager")
    assert {site.level for site in sl.attention_sites(model)} == {"softmax"}
    with sl.replace_attention(bridge("bert"), Limit("nearest")):
        expected = bridge_logits("bert")
    with sl.replace_attention(model, Limit("nearest")):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_random_key_is_drawn_through_the_eager_path() -> None:
    model = plain("gpt2")
    soft = logits(model)
    with sl.replace_attention(model, RandomKey(3)):
        assert not torch.allclose(logits(model), soft)
    assert torch.equal(logits(model), soft)
