"""How much sharper or flatter a row would have to be to be saturated.

For a row of scores, ``c_hi`` is the least inverse temperature at which its pattern is within eps
of the limit in total variation, and ``c_lo`` the greatest at which it is within eps of uniform. A
head's own scores do not depend on its own temperature, so both follow from one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS_PER_OCTAVE = 16
LOWEST_OCTAVE = -10
HIGHEST_OCTAVE = 20
N_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE + 1


def scale_of_bin(index: Tensor) -> Tensor:
    """Return the inverse temperature of a bin: 16 bins an octave, from 2^-10 to 2^20."""
    return 2.0 ** (index.double() / BINS_PER_OCTAVE + LOWEST_OCTAVE)


def critical_bins(
    scores: Float[Tensor, "*rows key"], eps: float = 0.1
) -> tuple[Int[Tensor, " *rows"], Int[Tensor, " *rows"]]:
    """Find the bins of ``c_lo`` and ``c_hi`` of each row, by bisection over the bins.

    Both distances are monotone in the inverse temperature, so nine halvings settle each. A row
    that is uniform at every temperature gets the last bin for ``c_lo`` and the first for ``c_hi``.

    Args:
        scores: ``[..., key]``; masked keys hold ``-inf``; each row has a visible key.
        eps: The total variation that counts as reached.

    Example:
        >>> import torch
        >>> from sat_lens.attention.critical import critical_bins, scale_of_bin
        >>> lo, hi = critical_bins(torch.tensor([0.0, 1.0]))
        >>> round(float(scale_of_bin(lo)), 2), round(float(scale_of_bin(hi)), 2)
        (0.4, 2.28)
    """
    gaps = scores - scores.amax(-1, keepdim=True)
    share = 1 / (scores != -torch.inf).sum(-1, keepdim=True).to(scores.dtype)
    winners = (gaps == 0).sum(-1)

    # Twenty passes over the same rows: one buffer for all of them saves most of the time.
    buffer = torch.empty_like(gaps)

    def weights(bins: Tensor) -> Tensor:
        scale = scale_of_bin(bins)[..., None].to(gaps.dtype)
        return torch.mul(gaps, scale, out=buffer).exp_()

    def at_limit(bins: Tensor) -> Bool[Tensor, " *rows"]:
        return 1 - winners / weights(bins).sum(-1) <= eps

    def off_uniform(bins: Tensor) -> Bool[Tensor, " *rows"]:
        pattern = weights(bins)
        pattern /= pattern.sum(-1, keepdim=True)
        return 1 - torch.minimum(pattern, share, out=buffer).sum(-1) > eps

    shape = scores.shape[:-1]
    never_off = ~off_uniform(torch.full(shape, N_BINS - 1, device=scores.device))
    last_uniform = (_first(off_uniform, shape, scores.device) - 1).clamp(min=0)
    return last_uniform + never_off.long(), _first(at_limit, shape, scores.device)


def _first(
    holds: Callable[[Tensor], Tensor], shape: torch.Size, device: torch.device
) -> Int[Tensor, " *rows"]:
    """Find the first bin where a property holds that goes on to hold; the last if it never does."""
    low = torch.zeros(shape, dtype=torch.long, device=device)
    high = torch.full(shape, N_BINS - 1, dtype=torch.long, device=device)
    for _ in range(N_BINS.bit_length()):
        middle = (low + high) // 2
        found = holds(middle)
        high = torch.where(found, middle, high)
        low = torch.where(found, low, torch.minimum(middle + 1, high))
    return high
