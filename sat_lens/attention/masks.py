"""Which keys of a row of scores are masked.

Models mark a masked key in different ways: ``-inf``, the lowest number of the dtype (possibly
divided by the square root of the head size), or a finite number such as -10,000 added to the
score. Whoever scales scores has to know, because a finite mask multiplied by a small number no
longer masks. Patterns do not tell: a probability of zero may be a score that underflowed.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# No score of a working network reaches this; masks made from float32's or bfloat16's lowest
# number do, also after a division by the square root of any head size.
EXTREME = -1e30
# The smallest masks of public models are -10,000, plus or minus a score, and float16's lowest
# number divided by the square root of a head size (-4,094 at 256).
LEAST_FINITE_MASK = -2e3
# Models that mark one mask by an extreme number mark another, if at all, by this (CTRL).
BESIDE_EXTREME = -1e4
# Added to a score, float16's lowest number is rounded to -inf here and there.
BESIDE_INFINITY = torch.finfo(torch.float16).min
# A finite mask stands apart from the scores by at least this factor; a wide range of scores,
# such as a network with enlarged weights has, does not leave such a gap.
GAP = 4.0


def mask_threshold(
    scores: Float[Tensor, "*rows key"],
    all_heads: Float[Tensor, "batch head query key"] | None = None,
) -> float:
    """Find the number at or below which a score means a masked key.

    Args:
        scores: float32 softmax inputs as the model has them.
        all_heads: The scores of all heads of the module, where ``scores`` are those of some. A
            mask is the same for all of them; a score that is low in one head only is no mask.

    Returns:
        A threshold; ``-inf`` if no finite number marks a mask. Finite masks above -1e30 are told
        from low scores by the gap between them and all other scores of the tensor. Beside ``-inf``
        they also have to be float16's lowest number, and beside other masks below -1e30 they have
        to be -10,000, give or take a score.

    Example:
        >>> import torch
        >>> from sat_lens.attention import mask_threshold
        >>> mask_threshold(torch.tensor([1.0, -2.0, torch.finfo(torch.float32).min]))
        -1e+30
        >>> mask_threshold(torch.tensor([1.0, -2.0, -10_000.0]))
        -10000.0
        >>> mask_threshold(torch.tensor([1.0, -2.0, -700.0]))
        -inf
    """
    if scores.numel() == 0:
        return -math.inf
    fixed = scores.detach()
    lowest = float(fixed.amin())
    extreme = lowest <= EXTREME
    expected = None
    if extreme:
        expected = BESIDE_INFINITY if lowest == -math.inf else BESIDE_EXTREME
        lowest = float(torch.where(fixed > EXTREME, fixed, 0.0).amin())
    finite = -math.inf
    if lowest <= LEAST_FINITE_MASK:
        finite = _finite_mask(fixed, all_heads, expected)
    return max(finite, EXTREME if extreme else -math.inf)


def lowest_bias(dtype: torch.dtype) -> float:
    """Return the number at or below which a bias added to scores is a mask."""
    return max(EXTREME, torch.finfo(dtype).min)


def _finite_mask(
    scores: Float[Tensor, "*rows key"], all_heads: Tensor | None, expected: float | None
) -> float:
    """Return the highest finite mask, or -inf if nothing stands apart from the other scores.

    Where a number is expected, masks are that number, give or take a score.
    """
    low = scores <= LEAST_FINITE_MASK
    if all_heads is not None:
        low = low & (all_heads.detach() <= LEAST_FINITE_MASK).all(1, keepdim=True)
    low = low & (scores > EXTREME)
    others = scores[~low & (scores > EXTREME)]
    if others.numel() == 0 or not bool(low.any()):
        return -math.inf
    highest, largest = float(scores[low].amax()), float(others.abs().amax())
    if expected is not None:
        away = float((scores[low] - expected).abs().amax())
        # One part in a hundred is what half precision makes of a number.
        if away > largest + abs(expected) / 100:
            return -math.inf
    return highest if -highest >= GAP * largest else -math.inf
