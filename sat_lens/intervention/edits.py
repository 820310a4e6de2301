"""Edits of scores: what is attached to one attention module.

An edit receives the scores of all heads of a module, ``[batch, head, query, key]`` in the model's
dtype, and returns the scores of some heads anew in float32, or None to leave all as they are. Any
such function will do; :class:`TransformEdit` puts groups of heads through transforms, at any level.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention import (
    AttentionCall,
    Limit,
    Scale,
    StraightThrough,
    Transform,
    Uniform,
    limit_is_exact,
    limit_kernel,
    transform_scores,
    without_autocast,
)
from sat_lens.attention.fused import LARGE
from sat_lens.attention.transforms import Ties
from sat_lens.sites import AttentionSite


@dataclasses.dataclass(frozen=True)
class NewScores:
    """Scores of some heads: ``scores[:, i]`` belongs to head ``heads[i]``."""

    heads: list[int]
    scores: Float[Tensor, "batch head query key"]


Edit = Callable[[Float[Tensor, "batch head query key"]], NewScores | None]
# For one module: groups of heads, and the transform of each group.
TransformOfHeads = list[tuple[list[int], Transform]]


def put(whole: Tensor, heads: list[int], part: Tensor) -> Tensor:
    """Return ``whole`` with the given heads (its second axis) replaced by those of ``part``."""
    if len(heads) == whole.shape[1]:
        return part
    return whole.index_copy(1, torch.tensor(heads, device=whole.device), part)


def put_back(scores: Tensor, new: NewScores) -> Tensor:
    """Put new scores in the place of the old at a hook point, in the dtype that goes on from there.

    Under autocast any dtype does, and new scores would only be rounded once more.
    """
    autocast = torch.is_autocast_enabled(scores.device.type)
    dtype = torch.promote_types(scores.dtype, torch.float32) if autocast else scores.dtype
    return put(scores.to(dtype), new.heads, new.scores.to(dtype))


def transform_for(scale: float, ties: Ties = "exact") -> Transform:
    """Return the transform that multiplies by ``scale``, with the limits at 0 and infinity."""
    if scale == math.inf:
        return Limit(ties)
    return Uniform() if scale == 0 else Scale(scale)


def bind_transform(
    transform: Transform, site: AttentionSite, heads: tuple[int, ...] = ()
) -> Transform:
    """Tell a transform that draws at random (it has ``.at``) which module and heads it serves."""
    bind = getattr(transform, "at", None)
    return bind(site.path, heads) if callable(bind) else transform


@dataclasses.dataclass(frozen=True)
class TransformEdit:
    """An edit that puts groups of heads through their transforms."""

    groups: TransformOfHeads

    @classmethod
    def at(cls, site: AttentionSite, groups: TransformOfHeads) -> TransformEdit:
        """Make the edit of one module, its transforms bound to their heads."""
        return cls([(heads, bind_transform(new, site, tuple(heads))) for heads, new in groups])

    def __call__(self, scores: Tensor) -> NewScores:
        """Return the new scores of the chosen heads."""
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

    def overwrite(self, scores: Float[Tensor, "batch head query key"]) -> None:
        """Put the new scores in the place of the old, which are in float32."""
        for heads, transform in self.groups:
            new = _transformed(scores, heads, transform, overwrite=True)
            if new is not scores:
                scores.index_copy_(1, torch.tensor(heads, device=scores.device), new)

    @property
    def is_straight_through(self) -> bool:
        """Whether a head is hard and takes the gradient of a soft pattern."""
        return any(isinstance(transform, StraightThrough) for _, transform in self.groups)

    def surrogate(self, scores: Float[Tensor, "batch head query key"]) -> NewScores | None:
        """Return what to add to the pattern: zeros that carry the gradient of a soft pattern.

        None where no transform is straight-through, or nothing has a gradient.
        """
        groups = [(h, new) for h, new in self.groups if isinstance(new, StraightThrough)]
        if not groups or not torch.is_grad_enabled():
            return None
        parts = [_soft_pattern(scores, heads, new.surrogate) for heads, new in groups]
        soft = torch.cat(parts, 1)
        if not soft.requires_grad:
            return None
        return NewScores([head for heads, _ in groups for head in heads], soft - soft.detach())

    def surrogate_factors(self, n_heads: int) -> Float[Tensor, "*batch head"] | None:
        """Return the inverse temperature whose gradient each head takes; None where none does.

        A head that takes its own gets 0, at which scores have no gradient.
        """
        groups: TransformOfHeads = [
            (heads, new.surrogate) for heads, new in self.groups if isinstance(new, StraightThrough)
        ]
        if not groups:
            return None
        others = sorted(set(range(n_heads)) - {head for heads, _ in groups for head in heads})
        return TransformEdit([*groups, (others, Uniform())]).factors(n_heads)

    def factors(self, n_heads: int) -> Float[Tensor, "*batch head"]:
        """Return the inverse temperature of each head; NaN where a transform is more than that."""
        c = torch.ones(n_heads, dtype=torch.float32)
        for heads, transform in self.groups:
            own = _inverse_temperature(transform)
            if isinstance(own, Tensor):
                # For each prompt too, if one of them is.
                batch = torch.broadcast_shapes(c.shape[:-1], own.shape[:-1])
                c = c.to(own).expand(*batch, n_heads).clone()
            c[..., heads] = own
        return c

    def has_shared_rows(self, new: NewScores) -> bool:
        """Whether keys of equal score share rows of these new scores in the exact limit."""
        exact = {
            h for heads, one in self.groups if type(one) is Limit and one == Limit() for h in heads
        }
        limits = [i for i, head in enumerate(new.heads) if head in exact]
        return bool(((new.scores[:, limits] == 0).sum(-1) > 1).any())

    def why_not_fused(self, site: AttentionSite) -> str:
        """Return why a fused kernel cannot do this; empty if it can, or there is no kernel."""
        if site.runs_in is None:
            return ""
        device, dtype = site.runs_in
        c = self.factors(site.n_heads)
        if bool(c.isnan().any()):
            return (
                "ties other than exact ones, and transforms other than a factor, need the scores "
                '(saturate with ties="exact" keeps the fused kernel)'
            )
        has_own_kernel = c.isinf() & (limit_kernel(device) is not None)
        rescaled = c[~has_own_kernel]
        if site.why_not and (c.requires_grad or bool((rescaled != 1).any())):
            return site.why_not
        is_sharp = bool((rescaled > LARGE).any())
        if is_sharp and dtype != torch.float32:
            return (
                f"ties are judged in float32, and the kernel would judge them in {dtype} "
                "(a model in float32 keeps the fused kernel)"
            )
        if not is_sharp and not bool(has_own_kernel.any()):
            return ""
        misses = "its kernel misses the limit (a finite scale up to 1024 keeps it)"
        return "" if limit_is_exact(device, dtype) else misses


@dataclasses.dataclass(frozen=True)
class Observation:
    """An edit that only looks: at scores, and at the calls of a fused kernel."""

    site: AttentionSite
    observer: Callable[[AttentionSite, Tensor], None]
    of_calls: Callable[[AttentionSite, AttentionCall], None] | None

    def __call__(self, scores: Tensor) -> None:
        """Show the scores."""
        with without_autocast(scores.device):
            self.observer(self.site, scores)

    def look(self, call: AttentionCall) -> None:
        """Show a call of a fused kernel before it is made."""
        if self.of_calls is not None:
            with without_autocast(call.query.device):
                self.of_calls(self.site, call)


def _inverse_temperature(transform: Transform) -> float | Tensor:
    if isinstance(transform, StraightThrough):
        return _inverse_temperature(transform.hard)
    if type(transform) is Scale:
        return transform.c if transform.limit is None else _inverse_temperature(transform.limit)
    if type(transform) is Uniform:
        return 0.0
    return math.inf if transform == Limit() else math.nan


def _soft_pattern(scores: Tensor, heads: list[int], scale: Scale) -> Tensor:
    new = _transformed(scores, heads, scale)
    empty = (new == -math.inf).all(-1, keepdim=True)
    # Not by softmax, which an edit of this or another block intercepts.
    rows = new.masked_fill(empty, 0.0).log_softmax(-1).exp()
    return rows.masked_fill(empty, 0.0)


def _transformed(
    scores: Tensor, heads: list[int], transform: Transform, *, overwrite: bool = False
) -> Tensor:
    if isinstance(transform, StraightThrough):
        transform = transform.hard
        # An alias where there is no gradient would not do for what overwrites its argument.
        scores = scores.detach() if scores.requires_grad else scores
    if len(heads) == scores.shape[1]:
        return transform_scores(scores, transform, all_heads=scores, overwrite=overwrite)
    return transform_scores(scores[:, heads], transform, all_heads=scores, overwrite=True)
