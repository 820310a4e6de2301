"""The library's own transforms in place, a block of rows at a time.

The arithmetic of saturation is little; what costs is memory. New tensors of the size of the scores
cost more than the softmax itself, and comparisons into bools are four times as slow as the same
into floats. So this works inside one tensor, on as many rows as stay in the processor's cache, and
masks are kept by subtraction instead of by selection.

When not to use it: for a transform of somebody else's, which may look across rows; where a
gradient is needed; or where keys are masked by a number that is no lower than scores can be. The
engine (:mod:`sat_lens.attention.engine`) sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.attention.distances import nearest_saturated
from sat_lens.attention.masks import EXTREME, LEAST_FINITE_MASK
from sat_lens.attention.transforms import Limit, Scale, Uniform
from sat_lens.errors import NonFiniteError

# Softmax gives this exactly no mass, in float64 too, and no one takes it for a mask: whoever looks
# at changed scores still sees which keys were visible.
NO_MASS = -1000.0
BLOCK_ELEMENTS = 2**18
Blockwise = Limit | Scale | Uniform
# torch.threshold keeps what is above; a mask of exactly 1e30 has to be kept as well.
_JUST_BELOW_EXTREME = float(torch.nextafter(torch.tensor(-EXTREME), torch.tensor(0.0)))


def blocks_of(scores: Float[Tensor, "*rows key"]) -> Iterator[Float[Tensor, "row key"]]:
    """Cut scores into blocks of rows that fit into a processor's cache; views, if contiguous.

    Example:
        >>> [block.shape[0] for block in blocks_of(torch.zeros(3, 1000, 512))]
        [512, 512, 512, 512, 512, 440]
    """
    rows = scores.reshape(-1, scores.shape[-1])
    size = len(rows) if scores.device.type != "cpu" else BLOCK_ELEMENTS // rows.shape[1]
    return iter(rows.split(max(1, size)))


def has_only_extreme_masks(scores: Float[Tensor, "*rows key"]) -> bool:
    """Say whether every score is either an extreme mask or above all finite masks.

    Example:
        >>> has_only_extreme_masks(torch.tensor([0.0, -5.0, -math.inf]))
        True
        >>> has_only_extreme_masks(torch.tensor([0.0, -5.0, -10_000.0]))
        False
    """
    return all(
        float(torch.threshold(block, EXTREME, 0.0).amin()) > LEAST_FINITE_MASK
        for block in blocks_of(scores)
    )


def transform_in_place(scores: Float[Tensor, "*rows key"], transform: Blockwise) -> None:
    """Do to scores what :func:`sat_lens.attention.transform_scores` does, in their own memory.

    Args:
        scores: Contiguous, in float32, with extreme masks only.
        transform: What to do to each row.

    Raises:
        NonFiniteError: The scores hold NaN or +inf. Some rows may have been changed by then.

    Example:
        >>> scores = torch.tensor([[2.0, 2.0, 1.0, -math.inf]])
        >>> transform_in_place(scores, Limit())
        >>> scores.tolist()
        [[-0.0, -0.0, -1000.0, -inf]]
    """
    spare: Tensor | None = None
    for block in blocks_of(scores):
        spare = torch.empty_like(block) if spare is None else spare[: len(block)]
        top = block.amax(-1, keepdim=True)
        if not bool((top < math.inf).all()):
            raise NonFiniteError(
                "The model's own attention scores hold NaN or +inf before saturation, so there is "
                "no limit to take. Check the weights and inputs, or run the model in float32."
            )
        # A row without a visible key has no maximum; any finite number does in its place.
        top.masked_fill_(top <= EXTREME, 0.0)
        depth = torch.threshold_(torch.neg(block, out=spare), _JUST_BELOW_EXTREME, 0.0)
        _apply(block, top, transform)
        # The result lies between NO_MASS and 0, and vanishes beside the depth of a mask.
        block.sub_(depth)


def _apply(
    rows: Float[Tensor, "row key"],
    top: Float[Tensor, "row 1"],
    transform: Blockwise,
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
