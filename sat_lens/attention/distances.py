"""How far a soft attention row is from saturated ones.

A saturated row is uniform over some keys and zero elsewhere. Total variation to the nearest of
them says how well "the head attends to these m keys equally" describes a row, in units of
probability mass: 0 is exact, and a distance of .1 means that a tenth of the mass sits elsewhere.
Where a row goes as the inverse temperature grows is another matter
(:class:`sat_lens.transforms.Limit`).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class NearestSaturated:
    """The saturated row nearest to each soft row.

    ``m`` is the number of keys it keeps, ``distance`` the total variation, ``least_kept`` the
    lowest score that it keeps (with an axis of length 1 for the keys).
    """

    m: Int[Tensor, " *rows"]
    distance: Float[Tensor, " *rows"]
    least_kept: Float[Tensor, "*rows 1"]


@dataclasses.dataclass(frozen=True)
class RowDistances:
    """Total variation of each soft row to argmax, to uniform and to its nearest saturated row."""

    n_keys: Int[Tensor, " *rows"]
    tv_argmax: Float[Tensor, " *rows"]
    tv_mean: Float[Tensor, " *rows"]
    tv_nearest: Float[Tensor, " *rows"]
    m: Int[Tensor, " *rows"]


def total_variation(
    first: Float[Tensor, "*rows key"], second: Float[Tensor, "*rows key"]
) -> Float[Tensor, " *rows"]:
    """Return the total variation distance of two rows of probabilities, half of their L1 distance.

    Example:
        >>> import torch
        >>> from sat_lens.attention import total_variation
        >>> float(total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])))
        0.5
    """
    return (first - second).abs().sum(-1) / 2


def effective_keys(pattern: Float[Tensor, "*rows key"]) -> Float[Tensor, " *rows"]:
    """Return the effective number of keys: 1 / (sum of squared probabilities).

    The reciprocal of the inverse participation ratio (Bell and Dean, 1970), which ecology knows as
    Hill's number of order 2 (Hill, 1973).

    Example:
        >>> import torch
        >>> from sat_lens.attention import effective_keys
        >>> float(effective_keys(torch.tensor([0.5, 0.5, 0.0])))
        2.0
    """
    return 1 / torch.linalg.vecdot(pattern, pattern)


def nearest_saturated(scores: Float[Tensor, "*rows key"]) -> NearestSaturated:
    """Find, for each row, the uniform row over its top m keys nearest in total variation.

    With sorted probabilities p1 >= p2 >= ... and U_m uniform on the top m,
    TV(p, U_m) = 1 - sum_{i<=m} min(p_i, 1/m), because both rows sum to one. For each m, the keys
    with p_i >= 1/m come first, so two cumulative quantities give all m at once. A cut between
    keys of equal score is left out: which of them it kept would be arbitrary. Among equal
    distances the smallest m is taken.

    Args:
        scores: ``[..., key]``; masked keys hold ``-inf``; each row has a visible key.

    Example:
        >>> import torch
        >>> from sat_lens.attention import nearest_saturated
        >>> found = nearest_saturated(torch.tensor([3.0, 3.0, 0.0, -torch.inf]))
        >>> int(found.m)
        2
    """
    ordered = _descending(scores)
    covered = _mass_covered(ordered.softmax(-1))
    split = torch.zeros_like(covered, dtype=torch.bool)
    split[..., :-1] = ordered[..., :-1] == ordered[..., 1:]
    unusable = split | (ordered == -math.inf)
    best = covered.masked_fill(unusable, -math.inf).max(-1, keepdim=True)
    return NearestSaturated(
        m=best.indices.squeeze(-1) + 1,
        distance=(1 - best.values.squeeze(-1)).clamp(min=0),
        least_kept=ordered.gather(-1, best.indices),
    )


def distances_to_saturated(scores: Float[Tensor, "*rows key"]) -> RowDistances:
    """Measure each row's total variation to argmax, uniform and nearest saturated rows.

    Args:
        scores: ``[..., key]``; masked keys hold ``-inf``; each row has a visible key.

    Example:
        >>> import torch
        >>> from sat_lens.attention import distances_to_saturated
        >>> row = distances_to_saturated(torch.zeros(4))
        >>> float(row.tv_argmax), float(row.tv_mean), int(row.m)
        (0.75, 0.0, 4)
    """
    pattern = scores.softmax(-1)
    visible = scores != -math.inf
    nearest = nearest_saturated(scores)
    return RowDistances(
        n_keys=visible.sum(-1),
        tv_argmax=1 - pattern.amax(-1),
        tv_mean=distance_to_uniform(pattern, visible),
        tv_nearest=nearest.distance,
        m=nearest.m,
    )


def distance_to_uniform(
    pattern: Float[Tensor, "*rows key"], visible: Bool[Tensor, "*rows key"]
) -> Float[Tensor, " *rows"]:
    """Return the total variation of each row to uniform attention over its visible keys."""
    share = 1 / visible.sum(-1, keepdim=True).to(pattern.dtype)
    return (pattern - share).clamp(min=0).sum(-1)


def _descending(scores: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows key"]:
    """Sort each row."""
    # NumPy is ten times as fast, because it does not return where each entry came from.
    in_reach = scores.device.type == "cpu" and not scores.requires_grad
    if not in_reach or scores.dtype not in (torch.float32, torch.float64):
        return scores.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(scores.neg().numpy(), axis=-1)).neg_()


def _mass_covered(ordered: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows key"]:
    """For sorted probabilities, return sum_{i<=m} min(p_i, 1/m) for every m."""
    n_keys = ordered.shape[-1]
    m = torch.arange(1, n_keys + 1, device=ordered.device)
    share = 1 / m.to(ordered.dtype)
    before = torch.nn.functional.pad(ordered.cumsum(-1), (1, 0))
    # A probability p is at least 1/m, and its part capped there, for every m from 1/p on.
    capped_from = torch.fmin(ordered.reciprocal().ceil_(), ordered.new_tensor(n_keys + 1)).long()
    one = torch.ones((), dtype=torch.int32, device=ordered.device).expand(ordered.shape)
    counts = one.new_zeros((*ordered.shape[:-1], n_keys + 2)).scatter_add_(-1, capped_from, one)
    capped = torch.minimum(counts.cumsum(-1)[..., 1:-1], m)
    return capped * share + before[..., 1:] - before.gather(-1, capped)
