"""How saturated a small network is: the library's measures on a network of this room."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sat_lens.attention import Limit, RandomKey, distances_to_saturated
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.paper.network import SmallTransformer, Transform

MIN_KEYS = 8


@torch.no_grad()
def scores_of(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"]
) -> list[Float[Tensor, "batch head query key"]]:
    """Give the scores that each layer's softmax receives, the first layer's first."""
    kept: list[Tensor] = []

    def keep(scores: Tensor) -> Tensor:
        kept.append(scores)
        return scores

    model.residual(tokens, keep)
    return kept


@torch.no_grad()
def saturation(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"], seed: int = 0
) -> dict[str, float]:
    """Measure ``S`` of the final residual stream with its two cosines, and the heads' mean lean.

    Example:
        >>> from sat_lens.paper.network import Shape, new_network
        >>> sorted(saturation(new_network(Shape()), torch.randint(128, (2, 32))))
        ['S', 'cos_random', 'cos_saturated', 'lean']
    """
    soft = model.residual(tokens)
    cos_saturated = mean_cosine(soft, model.residual(tokens, Limit()))
    cos_random = mean_cosine(soft, model.residual(tokens, _random_keys(seed)))
    rows = [distances_to_saturated(scores) for scores in scores_of(model, tokens)]
    counted = [row.n_keys >= MIN_KEYS for row in rows]
    to_argmax, to_mean = (
        torch.cat([getattr(row, name)[c] for row, c in zip(rows, counted, strict=True)]).mean()
        for name in ("tv_argmax", "tv_mean")
    )
    return {
        "cos_saturated": float(cos_saturated),
        "cos_random": float(cos_random),
        "S": float(normalised_similarity(cos_saturated, cos_random)),
        "lean": float(to_mean / (to_argmax + to_mean)),
    }


def _random_keys(seed: int) -> Transform:
    """Draw other keys in every layer; good for one forward pass."""
    layers = itertools.count()
    return lambda scores: RandomKey(seed, f"L{next(layers)}")(scores)
