"""The engine around a transform: masks in, masks out, nothing NaN.

Any transform can be applied in new tensors (:func:`_in_new_tensors`). The library's own are applied
inside one tensor instead, on as many rows at a time as stay in the processor's cache: the
arithmetic of saturation is little, and new tensors of the size of the scores cost more than the
softmax itself. To attach a transform to a model, see :mod:`sat_lens.intervention`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
import torch
import torch.autograd.forward_ad as fwAD
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens._checks import shown
from sat_lens.attention.distances import nearest_saturated
from sat_lens.attention.masks import EXTREME, LEAST_FINITE_MASK, mask_threshold
from sat_lens.attention.transforms import Limit, RandomKey, Scale, Transform, Uniform
from sat_lens.errors import ArgumentError, NonFiniteError

# Softmax gives this exactly no mass, in float64 too, and it is too small to be taken for a mask:
# whoever looks at changed scores still sees which keys were visible.
NO_MASS = -1000.0
BLOCK_ELEMENTS = 2**18
Blockwise = Limit | Scale | Uniform
# These return a maximum of 0 in every row and leave masked keys at -inf.
_OWN = (Limit, RandomKey, Scale, Uniform)
# torch.threshold keeps what is above; a mask of exactly 1e30 has to be kept as well.
_JUST_BELOW_EXTREME = float(np.nextafter(np.float32(-EXTREME), np.float32(0)))


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
    return _in_new_tensors(raw, transform, all_heads)


def _is_blockwise(transform: Transform) -> TypeGuard[Blockwise]:
    # The exact type: a subclass may look across rows. A tensor of scales tells rows apart by head.
    own = type(transform) in (Limit, Scale, Uniform)
    return own and not isinstance(getattr(transform, "c", None), Tensor)


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


def _check_finite(row_max: Float[Tensor, "*rows 1"]) -> None:
    # NaN is not below infinity either.
    if not bool((row_max < math.inf).all()):
        raise NonFiniteError(
            "The model's own attention scores hold NaN or +inf before saturation, so there is no "
            "limit to take. Check the weights and inputs, or run the model in float32."
        )


# Any transform, any mask, with gradients.


def _in_new_tensors(
    raw: Float[Tensor, "batch head query key"], transform: Transform, all_heads: Tensor | None
) -> Float[Tensor, "batch head query key"]:
    row_max = raw.detach().amax(-1, keepdim=True)
    _check_finite(row_max)
    threshold = mask_threshold(raw, all_heads)
    masked = raw.detach() <= threshold
    fully_masked = row_max <= threshold
    visible = torch.where(masked, -math.inf, raw)
    if bool(fully_masked.any()):
        # A row without a visible key never reaches a transform: it gets zeros in its place.
        visible = torch.where(fully_masked, 0.0, visible)
    new = _row_max_at_zero(_call(transform, visible), masked, transform)
    return torch.where(masked, raw, new.clamp_(min=NO_MASS))


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
    if type(transform) not in _OWN and _looks_like_a_pattern(new.detach()):
        warnings.warn(
            f"{shown(transform)} returned rows that sum to 1 and are nowhere negative, as patterns "
            "are. A transform returns scores, of which softmax makes the pattern; return "
            "pattern.log() in its place.",
            stacklevel=2,
        )
    return new.float()


def _looks_like_a_pattern(new: Tensor) -> bool:
    if new.numel() == 0 or new.shape[-1] == 1:
        return False
    # Nearly always a single row can tell that it is none.
    for rows in (new.flatten(0, -2)[-1:], new):
        if bool((rows < 0).any()) or bool(((rows.float().sum(-1) - 1).abs() > 1e-2).any()):
            return False
    return True


def _row_max_at_zero(
    new: Float[Tensor, "batch head query key"],
    masked: Bool[Tensor, "batch head query key"],
    transform: Transform,
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


# The library's own transforms, in the memory of the scores. Comparisons into bools are four times
# as slow as the same into floats, so masks are kept by subtraction instead of by selection.


def has_only_extreme_masks(scores: Float[Tensor, "*rows key"]) -> bool:
    """Whether every score is either an extreme mask or above all finite masks."""
    return all(
        float(torch.threshold(block, EXTREME, 0.0).amin()) > LEAST_FINITE_MASK
        for block in blocks_of(scores)
    )


def blocks_of(scores: Float[Tensor, "*rows key"]) -> Iterator[Float[Tensor, "row key"]]:
    """Cut scores into blocks of rows that fit into a processor's cache; views, if contiguous."""
    rows = scores.reshape(-1, scores.shape[-1])
    size = len(rows) if scores.device.type != "cpu" else BLOCK_ELEMENTS // rows.shape[1]
    return iter(rows.split(max(1, size)))


def transform_in_place(scores: Float[Tensor, "*rows key"], transform: Blockwise) -> None:
    """Overwrite contiguous float32 scores that have extreme masks only."""
    buffer: Tensor | None = None
    for block in blocks_of(scores):
        buffer = torch.empty_like(block) if buffer is None else buffer[: len(block)]
        top = block.amax(-1, keepdim=True)
        _check_finite(top)
        # A row without a visible key has no maximum; any finite number does in its place.
        top.masked_fill_(top <= EXTREME, 0.0)
        # How far below 0 each mask is; 0 at visible keys.
        depth = torch.threshold_(torch.neg(block, out=buffer), _JUST_BELOW_EXTREME, 0.0)
        _apply(block, top, transform)
        # What _apply left lies between NO_MASS and 0, and vanishes beside the depth of a mask.
        block.sub_(depth)


def _apply(
    rows: Float[Tensor, "row key"], top: Float[Tensor, "row 1"], transform: Blockwise
) -> None:
    """Overwrite each row with numbers from NO_MASS to 0, whatever masked keys hold."""
    if isinstance(transform, Scale) and transform.limit is not None:
        transform = transform.limit
    if isinstance(transform, Uniform):
        rows.zero_()
    elif isinstance(transform, Scale):
        rows.sub_(top).mul_(transform.c).clamp_(min=NO_MASS)
    elif transform.ties == "exact":
        rows.lt_(top).mul_(NO_MASS)
    elif transform.ties == "nearest":
        rows.lt_(_least_kept(rows)).mul_(NO_MASS)
    else:
        rows.sub_(top).lt_(-transform.tolerance).mul_(NO_MASS)


def _least_kept(rows: Float[Tensor, "row key"]) -> Float[Tensor, "row 1"]:
    hidden = rows.masked_fill(rows <= EXTREME, -math.inf)
    hidden.masked_fill_(hidden.amax(-1, keepdim=True) == -math.inf, 0.0)
    return nearest_saturated(hidden).least_kept
