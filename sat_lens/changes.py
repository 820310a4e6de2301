"""Edits made of transforms: which heads of one attention module are put through which.

When not to use it: from outside the library. :func:`sat_lens.replace_attention` makes them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention import Limit, Scale, Transform, Uniform, transform_scores
from sat_lens.kernels import limit_is_exact, limit_kernel
from sat_lens.kernels.attention import LARGE
from sat_lens.sites import AttentionSite
from sat_lens.sites.door import NewScores

# For one module: groups of heads and the transform of each group.
Groups = list[tuple[list[int], Transform]]


@dataclasses.dataclass(frozen=True)
class Change:
    """An edit that puts groups of heads through their transforms, at any level."""

    groups: Groups

    def __call__(self, scores: Tensor) -> NewScores:
        """Give the new scores of the chosen heads."""
        if len(self.groups) == 1:
            ((heads, transform),) = self.groups
            return NewScores(heads, _transformed(scores, heads, transform))
        parts = {
            head: new[:, i]
            for heads, transform in self.groups
            for new in [_transformed(scores, heads, transform)]
            for i, head in enumerate(heads)
        }
        order = sorted(parts)
        return NewScores(order, torch.stack([parts[head] for head in order], dim=1))

    def overwrite(self, scores: Tensor) -> None:
        """Put the new scores in the place of the old."""
        for heads, transform in self.groups:
            new = _transformed(scores, heads, transform, overwrite=True)
            if new is not scores:
                scores.index_copy_(1, torch.tensor(heads, device=scores.device), new)

    def factors(self, n_heads: int) -> Float[Tensor, " head"]:
        """Give the inverse temperature of each head; NaN where a transform is more than that."""
        c = torch.ones(n_heads)
        for heads, transform in self.groups:
            c[heads] = _inverse_temperature(transform)
        return c


def change_of(site: AttentionSite, groups: Groups) -> Change:
    """Make the edit; a transform that draws at random gets to know which heads it serves."""
    bound = []
    for heads, transform in groups:
        bind = getattr(transform, "at", None)
        own = bind(site.path, tuple(heads)) if callable(bind) else transform
        bound.append((heads, own))
    return Change(bound)


def why_not_fused(model: Any, site: AttentionSite, change: Change) -> str:
    """Say why a fused kernel cannot make this change; empty if it can, or there is no kernel."""
    if site.level != "kernel":
        return ""
    c = change.factors(site.n_heads)
    if bool(c.isnan().any()):
        return "ties other than exact ones, and transforms other than a factor, need the scores"
    weight = next(model.get_submodule(site.path).parameters(), None)
    if weight is None:
        return site.why_not
    has_own_kernel = c.isinf() & (limit_kernel(weight.device) is not None)
    rescaled = c[~has_own_kernel]
    if site.why_not and bool((rescaled != 1).any()):
        return site.why_not
    is_sharp = bool((rescaled > LARGE).any())
    if is_sharp and weight.dtype != torch.float32:
        return f"ties are judged in float32, and the kernel would judge them in {weight.dtype}"
    if not is_sharp and not bool(has_own_kernel.any()):
        return ""
    return "" if limit_is_exact(weight.device, weight.dtype) else "its kernel misses the limit"


def _inverse_temperature(transform: Transform) -> float:
    if type(transform) is Scale:
        return transform.c if transform.limit is None else _inverse_temperature(transform.limit)
    if type(transform) is Uniform:
        return 0.0
    return math.inf if transform == Limit() else math.nan


def _transformed(
    scores: Tensor, heads: list[int], transform: Transform, *, overwrite: bool = False
) -> Tensor:
    if len(heads) == scores.shape[1]:
        return transform_scores(scores, transform, all_heads=scores, overwrite=overwrite)
    return transform_scores(scores[:, heads], transform, all_heads=scores, overwrite=True)
