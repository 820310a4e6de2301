"""Axes of a grid on the command line, such as ``1e-4:1e-1:10``."""

from __future__ import annotations

import math

from sat_lens.errors import ArgumentError

AXIS_HELP = "first:last:count in equal ratios, in equal steps if the first is 0; or a,b,c"
MOST = 1000


def read_axis(text: str, option: str) -> list[float]:
    """Read the values of an axis; they are rounded to six digits.

    Args:
        text: ``first:last:count``, log-spaced or, where the first is 0, evenly spaced; or values
            with commas between them.
        option: What the axis is called on the command line.

    Raises:
        ArgumentError: It is written otherwise, or its values could not be spaced so.

    Example:
        >>> read_axis("1e-4:1e-2:3", "--lr"), read_axis("0:1:3", "--wd"), read_axis("0,2", "--wd")
        ([0.0001, 0.001, 0.01], [0.0, 0.5, 1.0], [0.0, 2.0])
    """
    wrong = ArgumentError(
        f"{option} is first:last:count with 0 <= first < last and a count from 2 to {MOST}, such "
        f"as 1e-4:1e-1:10, or numbers with commas between them; {text!r} was given."
    )
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first_text, last_text, count_text = text.split(":")
        first, last, count = float(first_text), float(last_text), int(count_text)
    except ValueError as error:
        raise wrong from error
    if not (0 <= first < last < math.inf and 2 <= count <= MOST):
        raise wrong
    shares = [i / (count - 1) for i in range(count)]
    if first == 0:
        return [_rounded(last * share) for share in shares]
    return [_rounded(first * (last / first) ** share) for share in shares]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
