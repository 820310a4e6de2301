"""Random models of the measured shapes. Queries and keys are enlarged: at the usual small
initialisation attention is uniform, and a uniform row is neither sorted nor searched as others are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from bench.sizes import Shape, Tokens

SHARPER = 4.0
N_CONTEXT = 4096


def gpt2(shape: Shape, attention: str = "eager") -> nn.Module:
    """A GPT-2 of this shape, as transformers has it."""
    config = transformers.GPT2Config(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        vocab_size=shape.vocab,
        n_positions=N_CONTEXT,
    )
    model = _made("GPT2LMHeadModel", config, attention)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : 2 * shape.width] *= SHARPER
    return model


def gptj(shape: Shape) -> nn.Module:
    """A GPT-J, whose attention TransformerLens leaves to transformers."""
    config = transformers.GPTJConfig(
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.width,
        vocab_size=shape.vocab,
        n_positions=N_CONTEXT,
        rotary_dim=shape.width // shape.heads // 2 * 2,
    )
    return _sharpened(_made("GPTJForCausalLM", config), "q_proj", "k_proj")


def bert(shape: Shape) -> nn.Module:
    """A BERT, whose attention TransformerLens leaves to transformers."""
    config = transformers.BertConfig(
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        vocab_size=shape.vocab,
        max_position_embeddings=N_CONTEXT,
    )
    return _sharpened(_made("BertForMaskedLM", config), "query", "key")


def bridge(model: Any) -> Any:
    """Wrap a model for TransformerLens."""
    name = type(model).__name__
    return build_bridge_from_module(model, name, hf_config=copy.deepcopy(model.config))


def tokens(shape: Shape, size: Tokens) -> Tensor:
    """Draw token ids, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, shape.vocab, (size.prompts, size.context), generator=generator)


def forward(model: Any, x: Tensor, hooks: Sequence[Any] = ()) -> Callable[[], None]:
    """Say how to run a forward pass, with TransformerLens hooks if there are any."""
    is_plain = isinstance(model, transformers.PreTrainedModel)

    def run() -> None:
        with torch.no_grad():
            if hooks:
                model.run_with_hooks(x, fwd_hooks=list(hooks))
            else:
                model(x, **({"use_cache": False} if is_plain else {}))

    return run


def forget_patterns(model: Any) -> None:
    """Drop the patterns that a bridge keeps after a forward pass, which nobody reads."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if getattr(module, "_pattern", None) is not None:
            module._pattern = None


def _made(architecture: str, config: Any, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, architecture)._from_config(config, attn_implementation=attention)
    return made.eval()


def _sharpened(model: Any, *names: str) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(f"{wanted}.weight" for wanted in names)):
                parameter *= SHARPER
    return model
