"""The rule that turns measured numbers into the name of a role.

The thresholds of roles were chosen on two models (a small language model and a sentence encoder),
those of ``saturable_exact`` and ``saturable_nearest`` on SmolLM2-135M, where all heads so marked
can be saturated together for about .1 nat a token. They are judgement, not law, and arguments
wherever a label is made. A label describes the shape of the attention and nothing else: an
untrained model, whose attention is flat, labels every head ``mean``, and a ``mean`` label alone is
no evidence that a head counts.

When not to use it: to compare two heads that fall into the same role. Compare the numbers.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from sat_lens._checks import check_number
from sat_lens.vocabulary import ROLES

# The pattern that a role claims to describe.
IDEAL = {
    "argmax": "argmax",
    "argmax-lean": "argmax",
    "subset": "nearest",
    "soft": "nearest",
    "mean-lean": "uniform",
    "mean": "uniform",
}


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where one role ends and the next begins; total variation and shares lie in [0, 1]."""

    near: float = 0.25
    argmax_lean: float = 0.60
    mean_lean: float = 0.45
    target: float = 0.50
    sink: float = 0.30
    saturable_exact: float = 0.27
    saturable_nearest: float = 0.24

    def __post_init__(self) -> None:
        """Check that every threshold is a number in [0, 1]."""
        for name, value in dataclasses.asdict(self).items():
            check_number(f"The threshold {name}", value, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class Targets:
    """Where a head looks: mean mass by kind of key, and where its rows have their maximum.

    The names are those of the field: ``first`` is the first token, ``induction`` a key that
    follows an earlier occurrence of the query's token, ``duplicate`` such an occurrence itself.
    """

    mass: dict[str, float]
    modal_offset: float
    modal_share: float
    first_share: float


def lean(tv_argmax: float, tv_mean: float) -> float:
    """Place a head between uniform (0) and argmax (1): tv_mean / (tv_argmax + tv_mean).

    A row with a single visible key is both; it gives .5. What was not measured stays NaN.

    Example:
        >>> from sat_lens.roles.rule import lean
        >>> lean(0.0, 0.9), lean(0.9, 0.0)
        (1.0, 0.0)
    """
    total = tv_argmax + tv_mean
    return tv_mean / total if total != 0 else 0.5


def role_of(
    tv_argmax: float,
    tv_mean: float,
    tv_nearest: float,
    median_m: float,
    thresholds: Thresholds | None = None,
) -> str:
    """Name the role of a head from its mean distances to saturated rows; "" if there are none.

    Example:
        >>> from sat_lens.roles.rule import role_of
        >>> role_of(0.1, 0.8, 0.1, 1), role_of(0.7, 0.6, 0.1, 3), role_of(0.5, 0.5, 0.4, 2)
        ('argmax', 'subset', 'soft')
    """
    if math.isnan(tv_argmax):
        return ""
    numbers = torch.tensor([tv_argmax, tv_mean, tv_nearest, median_m], dtype=torch.float64)
    return ROLES[int(roles_of(thresholds or Thresholds(), *numbers))]


def roles_of(
    thresholds: Thresholds,
    tv_argmax: Float[Tensor, "*any"],
    tv_mean: Float[Tensor, "*any"],
    tv_nearest: Float[Tensor, "*any"],
    m: Num[Tensor, "*any"],
) -> Int[Tensor, "*any"]:
    """Apply the rule to many heads or rows at once, and return places in ``ROLES``."""
    leaning = tv_mean / (tv_argmax + tv_mean)
    role = torch.full(m.shape, ROLES.index("soft"), device=m.device)
    # A later line takes precedence over those before.
    role[leaning <= thresholds.mean_lean] = ROLES.index("mean-lean")
    role[leaning >= thresholds.argmax_lean] = ROLES.index("argmax-lean")
    role[(tv_nearest <= thresholds.near) & (m > 1)] = ROLES.index("subset")
    role[tv_mean <= thresholds.near] = ROLES.index("mean")
    role[tv_argmax <= thresholds.near] = ROLES.index("argmax")
    return role


def targets_of(
    leaning: float, targets: Targets, thresholds: Thresholds | None = None
) -> tuple[str, str]:
    """Name where a head looks, and where else; "" for nowhere in particular.

    The masses on induction and duplicate keys are means over the rows that have such a key, all
    others over all rows. A head that gives more to an induction key where there is one than to the
    first token in general has the target induction, and the first token as its second. Else sinks
    (first and special tokens) come before offsets, because a sink is also at some offset, and all
    of them before far offsets, which repeated text turns into the same. Where a row has its maximum
    counts on the argmax side only: the maximum of a flat row means nothing. A head on the mean side
    has a sink at most: among few kinds of tokens, much of a flat row falls on duplicates.

    Args:
        leaning: The head's :func:`lean`.
        targets: Where its mass and its maxima are.
        thresholds: Where one role ends and the next begins.

    Example:
        >>> from sat_lens.roles.rule import Targets, targets_of
        >>> looks = Targets({"first": 0.6, "induction": 0.7}, -1, 0.3, 0.6)
        >>> targets_of(0.9, looks), targets_of(0.2, looks)
        (('induction', 'first'), ('first', ''))
    """
    t = thresholds or Thresholds()
    sharp, flat = leaning >= t.argmax_lean, leaning <= t.mean_lean
    found = {name: mass for name, mass in targets.mass.items() if mass >= t.target}
    if sharp and targets.first_share >= t.target:
        found.setdefault("first", targets.first_share)
    if sharp and targets.modal_share >= t.target:
        found.setdefault(offset_name(int(targets.modal_offset)), targets.modal_share)
    places = ("first", "special") if flat else ("first", "special", "previous", "self", "next")
    general = [name for name in places if name in found]
    if general[:1] == ["first"]:
        # The first token is often a special one.
        general = [name for name in general if name != "special"]
    related = [] if flat else [name for name in ("induction", "duplicate") if name in found]
    far = [] if flat else [name for name in found if name.startswith("offset")]
    if related and (not general or found[related[0]] > found[general[0]]):
        ordered = [*related, *general, *far]
    else:
        ordered = [*general, *related, *far]
    return (*ordered, "", "")[0], (*ordered, "", "")[1]


def offset_name(offset: int) -> str:
    """Name the place of a key relative to the query.

    Example:
        >>> from sat_lens.roles.rule import offset_name
        >>> offset_name(-1), offset_name(-3)
        ('previous', 'offset -3')
    """
    return {-1: "previous", 0: "self", 1: "next"}.get(offset, f"offset {offset:+d}")
