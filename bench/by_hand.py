"""What a user of TransformerLens alone would write today: plain hooks, caches and loops.

Neither slowed down nor tuned. Each gives the same numbers as the library, which the tests of this
suite check; what they leave out (padding, other levels, checks) is their own advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from circuitsvis.attention import attention_heads
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import patching

MIN_KEYS = 8


def is_scores(name: str) -> bool:
    """Name filter: attention scores."""
    return name.endswith("hook_attn_scores")


def is_pattern(name: str) -> bool:
    """Name filter: attention patterns."""
    return name.endswith("hook_pattern")


def is_resid_post(name: str) -> bool:
    """Name filter: the residual stream after each block."""
    return name.endswith("hook_resid_post")


def identity(scores: Tensor, hook: Any) -> Tensor:
    """Change nothing."""
    return scores


def scaled(scores: Tensor, hook: Any, c: float = 3.0) -> Tensor:
    """Multiply the scores of visible keys."""
    return torch.where(scores > torch.finfo(scores.dtype).min, c * scores, scores)


def saturated(scores: Tensor, hook: Any) -> Tensor:
    """Keep the keys that attain the row's maximum."""
    return torch.where(scores == scores.amax(-1, keepdim=True), 0.0, -math.inf)


def one_saturated(scores: Tensor, hook: Any) -> Tensor:
    """Saturate the first head."""
    return torch.cat([saturated(scores[:, :1], hook), scores[:, 1:]], 1)


def nearest_saturated(pattern: Tensor, hook: Any) -> Tensor:
    """Put the nearest saturated row in place of each row."""
    ordered, distances = to_saturated(pattern)
    least = ordered.gather(-1, distances.argmin(-1, keepdim=True))
    kept = (pattern >= least).float()
    return kept / kept.sum(-1, keepdim=True)


def to_saturated(pattern: Tensor) -> tuple[Tensor, Tensor]:
    """Order each row, and give its total variation to uniform on its top m keys, for every m."""
    ordered = pattern.sort(-1, descending=True).values
    mass = ordered.cumsum(-1)
    m = torch.arange(1, pattern.shape[-1] + 1)
    above = torch.searchsorted(-ordered, (-1 / m).expand_as(ordered).contiguous())
    excess = torch.nn.functional.pad(mass, (1, 0)).gather(-1, above) - above / m
    return ordered, excess + 1 - mass


def visible_keys(pattern: Tensor) -> Tensor:
    """Number of keys that each row of a causal model sees."""
    return torch.arange(1, pattern.shape[-1] + 1)


def role_statistics(model: Any, tokens: Tensor) -> pd.DataFrame:
    """Cache all patterns; take the distances of each head to argmax, mean and nearest, its offset.

    The critical scales are :func:`critical_scales`.
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=is_pattern)
    rows = {}
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        n = visible_keys(pattern)
        counted = n >= MIN_KEYS
        uniform = (n[None, :] <= n[:, None]) / n[:, None]
        top = pattern.max(-1)
        values = {
            "tv_argmax": 1 - top.values,
            "tv_mean": 1 - torch.minimum(pattern, uniform).sum(-1),
            "tv_nearest": to_saturated(pattern)[1].amin(-1),
            "offset": (n - 1 - top.indices).float(),
        }
        for head in range(model.cfg.n_heads):
            of_head = {name: value[:, head, counted] for name, value in values.items()}
            row = {name: float(value.mean()) for name, value in of_head.items()}
            rows[f"L{layer}H{head}"] = row | {"offset": float(of_head["offset"].mode().values[0])}
    return pd.DataFrame.from_dict(rows, orient="index")


def critical_scales(model: Any, tokens: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """Run the model at every scale; say how far each head is from its argmax there."""
    found = []
    for c in scales:
        with torch.no_grad(), model.hooks(fwd_hooks=[(is_scores, _at(c))]):
            _, cache = model.run_with_cache(tokens, names_filter=is_pattern)
        layers = [cache["pattern", layer] for layer in range(model.cfg.n_layers)]
        found.append(torch.stack([(1 - pattern.amax(-1)).mean((0, 2)) for pattern in layers]))
    return found


def scaling_curve(model: Any, tokens: Tensor, scales: Sequence[float]) -> list[dict[str, float]]:
    """Run the model at every scale; measure loss, divergence and agreement with the soft run."""
    with torch.no_grad():
        soft = model(tokens)
        return [
            _compared(soft, model.run_with_hooks(tokens, fwd_hooks=[(is_scores, _at(c))]), tokens)
            for c in scales
        ]


def _compared(soft: Tensor, logits: Tensor, tokens: Tensor) -> dict[str, float]:
    p, q = soft.log_softmax(-1), logits.log_softmax(-1)
    return {
        "loss": -float(q[:, :-1].gather(-1, tokens[:, 1:, None]).mean()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((soft.argmax(-1) == logits.argmax(-1)).float().mean()),
    }


def _at(c: float) -> Callable[..., Tensor]:
    return saturated if math.isinf(c) else lambda scores, hook: scaled(scores, hook, c)


def paired(model: Any, tokens: Tensor) -> tuple[Any, Any]:
    """Cache the residual stream of a soft and of a saturated run."""
    with torch.no_grad():
        soft = model.run_with_cache(tokens, names_filter=is_resid_post)
        with model.hooks(fwd_hooks=[(is_scores, saturated)]):
            return soft, model.run_with_cache(tokens, names_filter=is_resid_post)


def sweep(
    model: Any, tokens: Tensor, metric: Callable[[Tensor], Tensor], heads: list[tuple[int, int]]
) -> Tensor:
    """Patch the z of one head after the other from the saturated run, as TransformerLens does."""
    with torch.no_grad():
        with model.hooks(fwd_hooks=[(is_scores, saturated)]):
            _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_z"))
        return patching.generic_activation_patch(
            model,
            tokens,
            cache,
            metric,
            patching.layer_head_vector_patch_setter,
            "z",
            index_df=pd.DataFrame(heads, columns=["layer", "head"]),
        )


def norm_growth(folders: Sequence[Path], heads: int) -> pd.DataFrame:
    """Follow the norm, the angle between checkpoints, and the QK and OV products of all heads."""
    rows, before = [], None
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in state.values()))
        row = {"norm": norm, **_products(state, heads)}
        if before is not None:
            inner = sum(float((state[name].double() * before[name]).sum()) for name in state)
            row["rotation"] = math.degrees(math.acos(min(1.0, inner / norm / rows[-1]["norm"])))
        rows.append(row)
        before = state
    return pd.DataFrame(rows)


def _products(state: dict[str, Tensor], heads: int) -> dict[str, float]:
    products = [
        (float((q.T @ k).norm()), float((v.T @ o).norm()))
        for joint, out in _attention_weights(state)
        for q, k, v, o in zip(
            *(part.T.chunk(heads) for part in joint.chunk(3, 1)), out.chunk(heads), strict=True
        )
    ]
    qk, ov = (sum(values) / len(products) for values in zip(*products, strict=True))
    return {"qk_product": qk, "ov_product": ov}


def _attention_weights(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for name, joint in state.items():
        if name.endswith("attn.c_attn.weight"):
            yield joint, state[name.replace("c_attn", "c_proj")]


def pattern_page(path: Path, soft: Any, saturated_cache: Any, tokens: list[str]) -> None:
    """Write circuitsvis's own view of every layer, soft and saturated, one after the other."""
    views = [
        attention_heads(attention=cache["pattern", layer][0], tokens=tokens).local_src
        for layer in range(soft.model.cfg.n_layers)
        for cache in (soft, saturated_cache)
    ]
    path.write_text("".join(views), encoding="utf-8")
