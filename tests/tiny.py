"""Tiny random models of many architectures, built with neither network nor tokenizer.

Weights are drawn with a standard deviation of .3 instead of the usual .02: at .02 attention is
so near to uniform that a mistake in its scores would not show.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

torch.set_num_threads(1)

N_HEADS = 4
VOCAB = 96
STD = 0.3
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYER = {"intermediate_size": 64, "num_attention_heads": N_HEADS}
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, **LAYER, **SPECIAL}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": N_HEADS, "n_positions": 64}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": N_HEADS,
    "decoder_start_token_id": 0,
}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": N_HEADS,
    "decoder_attention_heads": N_HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **SPECIAL,
}
NATIVE = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": N_HEADS,
    "n_layers": 2,
    "n_ctx": 64,
    "d_vocab": VOCAB,
    "d_mlp": 64,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "seed": 0,
}
PAIR_STACKS = ("encoder", "decoder", "cross")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture: how to build it, what it reads, and where its attention should be found."""

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    levels: dict[str, str]
    layers: tuple[int, ...] = (0, 1)
    n_heads: int = N_HEADS
    # Whether made-up tokens do not run all of its attention, so that it has to be shown its inputs.
    is_shown: bool = False

    @property
    def stacks(self) -> list[str]:
        """The names of the model's attention stacks."""
        return list(self.levels)

    def heads(self, stack: str) -> list[str]:
        """The labels of all heads of one stack."""
        prefix = f"{stack}." if stack else ""
        return [f"{prefix}L{layer}H{head}" for layer in self.layers for head in range(self.n_heads)]


def tokens(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    """Draw token ids that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def hf_model(architecture: str, config: Any, attn_implementation: str = "eager") -> Any:
    """Build a Hugging Face model with random weights, in eval mode."""
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class._from_config(config, attn_implementation=attn_implementation).eval()
    return randomise(model)


def randomise(model: nn.Module, std: float = STD) -> nn.Module:
    """Draw all matrices anew, so that attention is far from uniform."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, std)
    return model


def bridge(architecture: str, config: Any, attn_implementation: str = "eager") -> Any:
    """Wrap such a model for TransformerLens."""
    model = hf_model(architecture, config, attn_implementation)
    return build_bridge_from_module(model, architecture, hf_config=model.config)


def native(**changes: Any) -> Any:
    """Boot a model that TransformerLens itself implements."""
    return randomise(TransformerBridge.boot_native(TransformerBridgeConfig(**NATIVE | changes)))


def of_class(architecture: str, config: str, **settings: Any) -> Callable[[], Any]:
    """Say how to build a bridge, later: by the names of its two classes, and its settings."""

    def build() -> Any:
        # A model may change the configurations of its parts, which the next one should not see.
        own = copy.deepcopy(settings)
        return bridge(architecture, getattr(transformers, config)(**own))

    return build


def text_inputs() -> Inputs:
    """Token ids for a model of one stack."""
    return (tokens(),), {}


def pair_inputs() -> Inputs:
    """Token ids for an encoder and, fewer of them, for a decoder."""
    return (tokens(),), {"decoder_input": tokens(length=7, seed=1)}


def image_inputs() -> Inputs:
    """Two small images."""
    return (noise(2, 3, 16, 16),), {}


def wave_inputs() -> Inputs:
    """Two short recordings."""
    return (noise(2, 1200),), {"return_type": "logits"}


def spectrogram_inputs() -> Inputs:
    """Two recordings as spectrograms: time, frequency."""
    return (noise(2, 24, 16),), {}


def noise(*shape: int) -> Tensor:
    """Draw from a normal distribution, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def decoder(
    name: str,
    prefix: str,
    level: str = "scores",
    *,
    layers: tuple[int, ...] = (0, 1),
    size: dict[str, Any] = SIZE,
    **settings: Any,
) -> Case:
    """A decoder-only model whose classes are ``<prefix>ForCausalLM`` and ``<prefix>Config``."""
    return reader(name, f"{prefix}ForCausalLM", f"{prefix}Config", level, layers, size | settings)


def reader(
    name: str,
    architecture: str,
    config: str,
    level: str,
    layers: tuple[int, ...] = (0, 1),
    settings: dict[str, Any] = SIZE,
) -> Case:
    """A model of one stack that reads tokens."""
    return Case(name, of_class(architecture, config, **settings), text_inputs, {"": level}, layers)


def pair(name: str, prefix: str, size: dict[str, Any], **settings: Any) -> Case:
    """An encoder-decoder model whose attention Hugging Face's own code computes."""
    build = of_class(f"{prefix}ForConditionalGeneration", f"{prefix}Config", **size, **settings)
    return Case(name, build, pair_inputs, dict.fromkeys(PAIR_STACKS, "softmax"))
