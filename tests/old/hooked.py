"""Tiny models of the classes that TransformerLens had before version 4, built offline.

`tests/tiny.py` and `tests/zoo.py` do the same for TransformerBridge, which version 2 lacks. As
there, weights are drawn with a standard deviation of .3, so that attention is far from uniform.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from torch import Tensor
from transformer_lens import (
    HookedEncoder,
    HookedEncoderDecoder,
    HookedTransformer,
    HookedTransformerConfig,
)

import sat_lens.models

torch.set_num_threads(1)

# The tokenizer of the bundled model, which needs no network.
TOKENIZER = sat_lens.models.DEMO_FOLDER / "tokenizer.json"
N_HEADS = 4
N_LAYERS = 2
VOCAB = 96
SIZE = {
    "d_model": 32,
    "d_head": 8,
    "n_heads": N_HEADS,
    "n_layers": N_LAYERS,
    "n_ctx": 64,
    "d_vocab": VOCAB,
    "d_mlp": 64,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "device": "cpu",
    "seed": 0,
}
ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 8}
BERT = {"attention_dir": "bidirectional"}
# As TransformerLens converts a T5. With it the decoder of version 2 sees later tokens as well.
T5 = {
    "attention_dir": "bidirectional",
    "positional_embedding_type": "relative_positional_bias",
    "relative_attention_max_distance": 32,
    "relative_attention_num_buckets": 8,
    "use_attn_scale": False,
    "act_fn": "relu",
    "normalization_type": "RMS",
    "tie_word_embeddings": True,
}

# Path in the model, stack and kind of each attention module.
Place = tuple[str, str, str]
ONE_STACK: list[Place] = [(f"blocks.{layer}.attn", "", "self") for layer in range(N_LAYERS)]
THREE_STACKS: list[Place] = [
    ("encoder.0.attn", "encoder", "self"),
    ("encoder.1.attn", "encoder", "self"),
    ("decoder.0.attn", "decoder", "self"),
    ("decoder.0.cross_attn", "cross", "cross"),
    ("decoder.1.attn", "decoder", "self"),
    ("decoder.1.cross_attn", "cross", "cross"),
]


def tokens(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    """Draw token ids that are no special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (batch, length), generator=generator)


def randomise(model: Any) -> Any:
    """Draw all matrices anew, and put the model into evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
    return model.eval()


def build(model_class: Callable[..., Any], tokenizer: Any = None, **settings: Any) -> Any:
    """Build a model of that class with random weights."""
    return randomise(model_class(HookedTransformerConfig(**SIZE | settings), tokenizer))


@dataclasses.dataclass(frozen=True)
class Case:
    """One model: how to build it, what it reads besides tokens, where its attention is."""

    name: str
    build: Callable[[], Any]
    places: tuple[Place, ...] = tuple(ONE_STACK)
    kwargs: tuple[tuple[str, Tensor], ...] = ()

    def run(self, model: Any, ids: Tensor | None = None) -> Tensor:
        """Run a forward pass."""
        return model(tokens() if ids is None else ids, **dict(self.kwargs))

    @property
    def data(self) -> list[dict[str, Tensor]]:
        """The same input as a batch that the library reads."""
        return [{"input": tokens(), **dict(self.kwargs)}]

    @property
    def stacks(self) -> list[str]:
        """The names of the attention stacks, each once."""
        return list(dict.fromkeys(stack for _, stack, _ in self.places))

    def heads(self, stack: str) -> list[str]:
        """The labels of all heads of a stack."""
        prefix = f"{stack}." if stack else ""
        return [f"{prefix}L{layer}H{head}" for layer in range(N_LAYERS) for head in range(N_HEADS)]


def decoder(name: str, **settings: Any) -> Case:
    """A HookedTransformer."""
    return Case(name, functools.partial(build, HookedTransformer, **settings))


CASES = [
    decoder("gpt2"),
    decoder("rotary_gqa", n_key_value_heads=2, gated_mlp=True, normalization_type="RMS", **ROTARY),
    decoder("alibi", positional_embedding_type="alibi"),
    decoder("local", use_local_attn=True, window_size=4, attn_types=["global", "local"]),
    decoder("soft_cap", attn_scores_soft_cap=0.5),
    decoder("qk_norm", use_qk_norm=True, **ROTARY),
    decoder("shortformer", positional_embedding_type="shortformer"),
    decoder("parallel", parallel_attn_mlp=True),
    decoder("attention_only", attn_only=True, d_mlp=None),
    decoder("split_inputs", use_split_qkv_input=True, use_attn_result=True),
    decoder("bidirectional", attention_dir="bidirectional"),
    Case("bert", functools.partial(build, HookedEncoder, **BERT)),
    Case(
        "t5",
        functools.partial(build, HookedEncoderDecoder, **T5),
        tuple(THREE_STACKS),
        (("decoder_input", tokens(length=7, seed=1)),),
    ),
]
CLASSES = ["gpt2", "bert", "t5"]


@functools.cache
def model_of(name: str) -> Any:
    """The model of a case, built once per session."""
    return case(name).build()


def case(name: str) -> Case:
    """The case of that name."""
    return next(found for found in CASES if found.name == name)


def key_value_cache(model: Any, batch: int) -> Any:
    """Give an empty cache of keys and values; its class has another name in version 3."""
    try:
        from transformer_lens import HookedTransformerKeyValueCache as Cache
    except ImportError:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache as Cache
    return Cache.init_cache(model.cfg, "cpu", batch)
