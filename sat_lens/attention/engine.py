"""The engine around a transform: masks in, masks out, nothing NaN.

When not to use it: to attach a transform to a model. See :mod:`sat_lens.intervention`.
"""

from __future__ import annotations

import math
from typing import TypeGuard

import torch
import torch.autograd.forward_ad as fwAD
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention.blocks import NO_MASS, Blockwise, has_only_extreme_masks, transform_in_place
from sat_lens.attention.masks import mask_threshold
from sat_lens.attention.transforms import Limit, RandomKey, Scale, Transform, Uniform
from sat_lens.errors import ArgumentError, NonFiniteError

# These return a maximum of 0 in every row and leave masked keys at -inf.
_OWN = (Limit, RandomKey, Scale, Uniform)


def transform_scores(
    scores: Float[Tensor, "batch head query key"],
    transform: Transform,
    *,
    all_heads: Float[Tensor, "batch all_heads query key"] | None = None,
    overwrite: bool = False,
) -> Float[Tensor, "batch head query key"]:
    """Apply a transform to scores as a model has them; the result is float32.

    The scores are taken to float32, masked keys to ``-inf``. Afterwards each row is shifted so
    that its maximum is 0, a visible key without mass holds -1000, masked keys get the model's own
    mask value back, and rows without a visible key are as they were.

    Args:
        scores: Softmax inputs, in any floating dtype.
        transform: What to do to them.
        all_heads: The scores of all heads of the module, where ``scores`` are those of some; they
            help to tell a mask from low scores (:func:`sat_lens.attention.mask_threshold`).
        overwrite: Whether nobody needs the scores any more, so that the result may stand in their
            memory. Otherwise the input is not changed.

    Raises:
        NonFiniteError: The scores hold NaN or +inf before anything was done to them.
        ArgumentError: The transform returned another shape, NaN, +inf, or a row without a key.

    Example:
        >>> import torch
        >>> from sat_lens.attention import Limit, transform_scores
        >>> scores = torch.tensor([[[[1.0, 3.0, torch.finfo(torch.float32).min]]]])
        >>> transform_scores(scores, Limit()).softmax(-1)
        tensor([[[[0., 1., 0.]]]])
    """
    raw = _in_float32(scores)
    if _is_blockwise(transform) and not _is_differentiated(raw) and raw.numel() > 0:
        own = raw.contiguous()
        if has_only_extreme_masks(own):
            if own is scores and not overwrite:
                own = own.clone()
            transform_in_place(own, transform)
            return own
    return _transform_whole(raw, transform, all_heads)


def _transform_whole(
    raw: Float[Tensor, "batch head query key"], transform: Transform, all_heads: Tensor | None
) -> Float[Tensor, "batch head query key"]:
    """Give what any transform makes of scores with any mask, in new tensors."""
    row_max = raw.detach().amax(-1, keepdim=True)
    _check_finite(row_max)
    threshold = mask_threshold(raw, all_heads)
    masked = raw.detach() <= threshold
    dead = row_max <= threshold
    visible = torch.where(masked, -math.inf, raw)
    if bool(dead.any()):
        # A row without a visible key never reaches a transform: it gets zeros in its place.
        visible = torch.where(dead, 0.0, visible)
    new = _row_max_at_zero(_call(transform, visible), masked, transform)
    return torch.where(masked, raw, new.clamp_(min=NO_MASS))


def _is_blockwise(transform: Transform) -> TypeGuard[Blockwise]:
    # A subclass may do what it likes.
    return type(transform) in (Limit, Scale, Uniform)


def _is_differentiated(scores: Tensor) -> bool:
    backward = torch.is_grad_enabled() and scores.requires_grad
    return backward or fwAD.unpack_dual(scores).tangent is not None


def _in_float32(
    scores: Float[Tensor, "batch head query key"],
) -> Float[Tensor, "batch head query key"]:
    raw = scores.float()
    if scores.dtype != torch.float64:
        return raw
    # A mask of float64's lowest number stays finite, so that a row of nothing else is not NaN.
    overflowed = (raw == -math.inf) & (scores != -math.inf)
    return torch.where(overflowed, torch.finfo(torch.float32).min, raw)


def _call(
    transform: Transform, scores: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch head query key"]:
    new = transform(scores)
    if not isinstance(new, Tensor) or new.shape != scores.shape:
        found = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ArgumentError(
            f"A transform must return scores of the shape it was given, {list(scores.shape)}; "
            f"{transform!r} returned {found}."
        )
    return new.float()


def _row_max_at_zero(
    new: Float[Tensor, "batch head query key"], masked: Tensor, transform: Transform
) -> Float[Tensor, "batch head query key"]:
    if type(transform) in _OWN:
        return new
    new = new.masked_fill(masked, -math.inf)
    top = new.amax(-1, keepdim=True)
    usable = top.isfinite() | masked.all(-1, keepdim=True)
    if not bool(usable.all()):
        raise ArgumentError(
            f"{transform!r} returned NaN, +inf, or a row in which no visible key is finite. "
            "Return finite scores for at least one visible key of every row."
        )
    return new - top.masked_fill(~top.isfinite(), 0.0)


def _check_finite(row_max: Float[Tensor, "batch head query 1"]) -> None:
    if bool((row_max.isnan() | (row_max == math.inf)).any()):
        raise NonFiniteError(
            "The model's own attention scores hold NaN or +inf before saturation, so there is no "
            "limit to take. Check the weights and inputs, or run the model in float32."
        )
