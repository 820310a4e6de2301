"""Inner products between checkpoints, tensor by tensor, and what they say of the path.

A rising cosine between checkpoints at a fixed distance in steps is no evidence that the direction
of the parameters converges: a random walk has it as well. So rotation is given for each doubling
of steps, and the straightness of the path beside that of a random walk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from sat_lens.errors import ArgumentError
from sat_lens.norms.parameters import CHUNK, wide
from sat_lens.norms.sources import Parameters


@dataclasses.dataclass
class Products:
    """Sums over all parameters, for a checkpoint, the one before it, and the first."""

    square: float = 0.0
    square_before: float = 0.0
    with_before: float = 0.0
    moved: float = 0.0
    moved_before: float = 0.0
    moved_with_before: float = 0.0
    step: float = 0.0
    step_with_before: float = 0.0

    @property
    def angle(self) -> float:
        """The angle to the checkpoint before, in degrees."""
        return math.degrees(math.acos(_cosine(self.with_before, self.square, self.square_before)))

    @property
    def straightness(self) -> float:
        """The cosine between the two ways from the first checkpoint."""
        return _cosine(self.moved_with_before, self.moved, self.moved_before)

    @property
    def alignment(self) -> float:
        """The cosine between the last step and the parameters that it was taken from."""
        return _cosine(self.step_with_before, self.step, self.square_before)


def products(now: Parameters, before: Parameters, first: Parameters | None) -> Products:
    """Run over the tensors of two or three checkpoints side by side.

    Differences are taken before they are squared: the first steps move little, and would drown in
    the rounding of the difference of two large sums.
    """
    found = Products()
    for name in now.shapes:
        tensors = [source.read(name) for source in (now, before, first) if source is not None]
        for pieces in zip(*(tensor.flatten().split(CHUNK) for tensor in tensors), strict=True):
            _add(found, [wide(piece).cpu() for piece in pieces])
    return found


def _add(sums: Products, pieces: Sequence[torch.Tensor]) -> None:
    now, before, *first = pieces
    step = now - before
    sums.square += float(now @ now)
    sums.square_before += float(before @ before)
    sums.with_before += float(now @ before)
    sums.step += float(step @ step)
    sums.step_with_before += float(step @ before)
    if first:
        moved, moved_before = now - first[0], before - first[0]
        sums.moved += float(moved @ moved)
        sums.moved_before += float(moved_before @ moved_before)
        sums.moved_with_before += float(moved @ moved_before)


def half_way(steps: Sequence[int], index: int) -> int | None:
    """Find the checkpoint nearest to half the step, among those before it and after step 0.

    Example:
        >>> half_way([0, 16, 23, 32], 3)
        1
    """
    earlier = [i for i in range(index) if steps[i] > 0]
    if not earlier:
        return None
    return min(earlier, key=lambda i: abs(math.log2(steps[index] / steps[i]) - 1))


def check_same_model(first: Parameters, other: Parameters) -> None:
    """Refuse checkpoints of different architectures.

    Raises:
        ArgumentError: The parameters' names or shapes differ; the message names one.
    """
    for name in first.shapes.keys() | other.shapes.keys():
        shapes = first.shapes.get(name), other.shapes.get(name)
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"{first.name} and {other.name} are of different architectures: {name} is "
                f"{_shown(shapes[0])} in the one and {_shown(shapes[1])} in the other. Give "
                "checkpoints of one training run, saved in one way."
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"


def _cosine(inner: float, square: float, other_square: float) -> float:
    """Give the cosine of two vectors, NaN where one of them is zero."""
    if square * other_square == 0:
        return math.nan
    return max(-1.0, min(1.0, inner / math.sqrt(square * other_square)))
