"""Transforms: functions from scores to scores, whose softmax is the new attention pattern.

A transform takes float32 scores in which masked keys hold ``-inf`` and every row has at least
one visible key; it returns scores of the same shape. These are the library's own; one of your own
is any callable of that form, three lines long. The engine that applies a transform takes care of
masks, dtypes and rows without a visible key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens._checks import check_number, is_number, shown
from sat_lens.attention.distances import nearest_saturated
from sat_lens.errors import ArgumentError

Ties = Literal["exact", "nearest"] | float

_FLOAT32 = torch.finfo(torch.float32)


@runtime_checkable
class Transform(Protocol):
    """A function from scores to scores: ``[batch, head, query, key]`` to the same shape."""

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return the scores whose softmax is the new pattern."""
        ...


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiply scores by an inverse temperature ``c``: 0 is uniform, infinity is the limit.

    Differentiable in the scores for finite ``c``, and in ``c`` where that is a tensor: one finite
    number for each head that the transform gets, ``[head]``, or one for each prompt as well,
    ``[batch, head]``. The row's maximum is subtracted first, so that no product overflows; softmax
    does not see the difference.

    Raises:
        ArgumentError: ``c`` is negative or not a number, or a tensor of another shape, or one that
            is not finite.

    Example:
        >>> import torch
        >>> from sat_lens.attention import Scale
        >>> scores = torch.tensor([1.0, 0.0, -torch.inf])
        >>> torch.allclose(Scale(3.0)(scores).softmax(-1), (3 * scores).softmax(-1))
        True
    """

    c: float | Float[Tensor, "*batch head"]

    def __post_init__(self) -> None:
        if isinstance(self.c, Tensor):
            check_scale_tensor(self.c)
        else:
            check_scale(self.c)

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return ``c`` times the scores, shifted so that each row's maximum is 0."""
        limit = self.limit
        if limit is not None:
            return limit(scores)
        gaps = scores - _row_max(scores)
        if not isinstance(self.c, Tensor):
            return gaps.mul_(self.c)
        # Products with -inf would be NaN for c = 0, and so would the gradient of any c.
        hidden = gaps == -math.inf
        c = self.c.to(scores.device, scores.dtype)
        if c.dim() > 1 and len(c) != len(scores):
            # Queries cut into blocks: those of one prompt stand together on the first axis.
            c = c.repeat_interleave(len(scores) // len(c), 0)
        return (gaps.masked_fill(hidden, 0.0) * c[..., None, None]).masked_fill(hidden, -math.inf)

    @property
    def limit(self) -> Limit | Uniform | None:
        """The limit that a factor outside float32's range means; None inside of it.

        The factor itself would round to 0 or infinity, and its product with -inf or 0 be NaN.
        """
        if isinstance(self.c, Tensor):
            return None
        if self.c < _FLOAT32.tiny:
            return Uniform()
        return Limit() if self.c > _FLOAT32.max else None


@dataclasses.dataclass(frozen=True)
class Limit:
    """The limit of an infinite inverse temperature: uniform over the keys that win the row.

    Merrill et al. (2021), section 3, define saturated attention as this limit. ``ties`` says
    which keys win: ``"exact"``, those equal to the row's maximum in float32; a number d >= 0,
    those within d of it (their difference in float32 is at most d); ``"nearest"``, the top m* keys
    whose uniform row is nearest to the soft row in total variation (then the result is not the
    limit of c, but the saturated row that describes the soft one best).

    Raises:
        ArgumentError: ``ties`` is none of these.

    Example:
        >>> import torch
        >>> from sat_lens.attention import Limit
        >>> Limit()(torch.tensor([2.0, 2.0, 1.0])).softmax(-1)
        tensor([0.5000, 0.5000, 0.0000])
    """

    ties: Ties = "exact"

    def __post_init__(self) -> None:
        check_ties(self.ties)

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return 0 for the keys that win their row and ``-inf`` for all others."""
        fixed = scores.detach()
        if self.ties == "exact":
            wins = fixed >= _row_max(fixed)
        elif self.ties == "nearest":
            wins = fixed >= nearest_saturated(fixed).least_kept
        else:
            # The difference, not the maximum less d: that would be rounded to the scores' own
            # spacing, which is wider than d where scores are large.
            wins = fixed - _row_max(fixed) >= -self.tolerance
        # Two numbers would make a tensor of PyTorch's default dtype.
        return torch.where(wins, fixed.new_zeros(()), -math.inf)

    @property
    def tolerance(self) -> float:
        """How far below the maximum a key may be and still win; as float32 can hold it."""
        return 0.0 if isinstance(self.ties, str) else min(float(self.ties), _FLOAT32.max)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Attend equally to all visible keys: the limit of an inverse temperature of 0.

    Example:
        >>> import torch
        >>> from sat_lens.attention import Uniform
        >>> Uniform()(torch.tensor([2.0, 7.0, -torch.inf])).softmax(-1)
        tensor([0.5000, 0.5000, 0.0000])
    """

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return 0 for every visible key."""
        fixed = scores.detach()
        return torch.where(fixed == -math.inf, -math.inf, fixed.new_zeros(()))


@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """A hard pattern forward, with the gradient of a soft one backward.

    The pattern, and every number that follows from it, is that of ``hard``. Its gradient is that of
    ``softmax(surrogate_scale * scores)``, so that a network can be trained while it is hard
    (Bengio, Leonard and Courville 2013, arXiv 1308.3432, section 3). Only an intervention that
    reaches the softmax itself can do so: :func:`sat_lens.saturate` with
    ``gradient="straight-through"``, or :func:`sat_lens.replace_attention`. Called as a function of
    scores it is ``hard``.

    ``surrogate_scale`` may be a tensor, as in :class:`Scale`, and then has a gradient too.

    Raises:
        ArgumentError: ``surrogate_scale`` is no positive finite number.

    Example:
        >>> import torch
        >>> from sat_lens.attention import StraightThrough
        >>> StraightThrough()(torch.tensor([2.0, 2.0, 1.0])).softmax(-1)
        tensor([0.5000, 0.5000, 0.0000])
    """

    hard: Transform = dataclasses.field(default_factory=Limit)
    surrogate_scale: float | Float[Tensor, "*batch head"] = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.surrogate_scale, Tensor):
            check_scale_tensor(self.surrogate_scale)
        elif not is_number(self.surrogate_scale) or not 0 < self.surrogate_scale < math.inf:
            raise ArgumentError(
                "surrogate_scale, the inverse temperature whose gradient is taken, must be a "
                f"finite number above 0; found {shown(self.surrogate_scale)}."
            )

    def at(self, site: str, heads: tuple[int, ...] = ()) -> StraightThrough:
        """Return the same with ``hard`` bound to one attention module, if it draws at random."""
        bind = getattr(self.hard, "at", None)
        return dataclasses.replace(self, hard=bind(site, heads)) if callable(bind) else self

    @property
    def surrogate(self) -> Scale:
        """The transform of whose softmax the gradient is."""
        return Scale(self.surrogate_scale)

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return what ``hard`` makes of the scores, without a gradient."""
        return self.hard(scores.detach())


@dataclasses.dataclass(frozen=True, eq=False)
class UniformWithoutSinks:
    """Attend equally to all visible keys that are no sinks: a neutral control for saturation.

    In many language models the first token has a residual stream a hundred times as long as others,
    and heads with nothing to do attend to it. Uniform attention carries its values everywhere, so
    that its damage says more of the sink than of the head. A row that sees sinks only stays uniform
    over them.

    Attributes:
        sinks: Which keys are sinks, ``[batch, key]`` or ``[key]``. None: those to which a head
            gives on average more than ``rate`` of a row, over the rows of the batch that see them;
            a key that fewer than 8 rows see is none.
        rate: That share.

    Example:
        >>> import torch
        >>> from sat_lens.attention import UniformWithoutSinks
        >>> transform = UniformWithoutSinks(torch.tensor([True, False, False]))
        >>> transform(torch.tensor([[7.0, 2.0, 1.0]])).softmax(-1).tolist()
        [[0.0, 0.5, 0.5]]
    """

    sinks: Bool[Tensor, "*batch key"] | None = None
    rate: float = 0.3

    def __post_init__(self) -> None:
        """Check the rate."""
        check_number("The rate from which a key is a sink", self.rate, at_least=0, at_most=1)

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return 0 for every visible key that is no sink."""
        fixed = scores.detach()
        visible = fixed != -math.inf
        rest = visible & ~self._sinks(fixed, visible)
        kept = torch.where(rest.any(-1, keepdim=True), rest, visible)
        return torch.where(kept, fixed.new_zeros(()), -math.inf)

    def _sinks(self, scores: Tensor, visible: Tensor) -> Bool[Tensor, "..."]:
        if self.sinks is not None:
            sinks = self.sinks.to(scores.device)
            return sinks if sinks.dim() == 1 or scores.dim() < 3 else sinks[:, None, None]
        # Over the queries, and over the batch where there is one; heads have sinks of their own.
        rows = [axis for axis in (-2, -4) if scores.dim() >= -axis]
        if not rows:
            return torch.zeros_like(visible)
        seen = visible.sum(rows, keepdim=True)
        mass = scores.softmax(-1).nan_to_num().sum(rows, keepdim=True)
        return (mass > self.rate * seen) & (seen >= _LEAST_SEEN)


# Near the end of a text few rows see a key, and one of them can make it look like a sink.
_LEAST_SEEN = 8


@dataclasses.dataclass(frozen=True)
class RandomKey:
    """Attend to one visible key, drawn anew for every head, query and attention module.

    The control for saturation: as hard as the limit, but independent of the scores. The draw is a
    hash of the seed, the site, the head, the query's position counted from the newest key, and the
    key. It therefore leaves torch's random state alone, is equal on every device, does not depend
    on how prompts are batched (all prompts of a batch share the draws), and agrees with and without
    a KV cache. Cross-attention is the exception to the last: its keys do not grow with its queries,
    so that a query's position cannot be known there.

    Example:
        >>> import torch
        >>> from sat_lens.attention import RandomKey
        >>> row = RandomKey(seed=0)(torch.tensor([[0.0, 5.0, -torch.inf]])).softmax(-1)
        >>> sorted(row[0].tolist())
        [0.0, 0.0, 1.0]
    """

    seed: int = 0
    site: str = ""
    heads: tuple[int, ...] = ()

    def at(self, site: str, heads: tuple[int, ...] = ()) -> RandomKey:
        """Return the same transform with the draws of one attention module, or of some heads."""
        return dataclasses.replace(self, site=site, heads=heads)

    def __call__(self, scores: Float[Tensor, "*rows key"], /) -> Float[Tensor, "*rows key"]:
        """Return 0 for the drawn key and ``-inf`` for all others."""
        draws = self._draws(scores).expand(scores.shape)
        visible = scores.detach() != -math.inf
        chosen = draws.masked_fill(~visible, -1).argmax(-1, keepdim=True)
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)

    def _draws(self, scores: Float[Tensor, "*rows key"]) -> Int[Tensor, "..."]:
        n_heads, n_queries, n_keys = (1, 1, *scores.shape)[-3:]
        keys = torch.arange(n_keys, device=scores.device)
        queries = torch.arange(n_keys - n_queries, n_keys, device=scores.device)
        heads = torch.tensor(self.heads or range(n_heads), device=scores.device)
        start = hashlib.sha256(f"{self.seed}/{self.site}".encode()).digest()
        state = heads[:, None, None] + int.from_bytes(start[:7], "big")
        state = _mix(state) + queries[:, None]
        state = _mix(state) + keys
        draws = _mix(state) >> 1 & 0x7FFF_FFFF_FFFF
        return draws.reshape(draws.shape[-scores.dim() :] if scores.dim() < 3 else draws.shape)


def check_scale(c: float) -> None:
    """Raise an ArgumentError unless ``c`` is an inverse temperature: a number >= 0, or infinity."""
    if not is_number(c) or math.isnan(c) or c < 0:
        raise ArgumentError(
            f"The inverse temperature c must be a number >= 0 or math.inf, and {c!r} was given. "
            "Use 0 for uniform attention and math.inf for the saturated limit."
        )


def check_scale_tensor(c: Tensor) -> None:
    """Raise an ArgumentError unless a tensor holds a finite inverse temperature for each head."""
    shaped = c.is_floating_point() and c.dim() in (1, 2) and c.numel() > 0
    if not shaped or not bool((c.isfinite() & (c >= 0)).all()):
        raise ArgumentError(
            "Inverse temperatures in a tensor must be finite numbers >= 0 of a floating dtype, "
            f"[head] or [batch, head]; found {shown(c)}. The limit has no gradient in c: use "
            "Limit() for its heads."
        )


def check_ties(ties: object) -> None:
    """Raise an ArgumentError unless ``ties`` is "exact", "nearest" or a number >= 0."""
    named = isinstance(ties, str) and ties in ("exact", "nearest")
    if named or (is_number(ties) and 0 <= float(ties) < math.inf):
        return
    raise ArgumentError(
        'ties must be "exact", "nearest" or a finite number d >= 0 (keys whose unscaled score is '
        f"within d of the maximum share the row), and {ties!r} was given."
    )


def _row_max(scores: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows 1"]:
    return scores.detach().amax(-1, keepdim=True)


def _mix(state: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Scramble 64-bit integers (the finaliser of splitmix64, Steele et al. 2014)."""
    state = (state ^ (state >> 30 & 0x3_FFFF_FFFF)) * -0x40A7B892E31B1A47
    state = (state ^ (state >> 27 & 0x1F_FFFF_FFFF)) * -0x6B2FB644ECCEEE15
    return state ^ (state >> 31 & 0x1_FFFF_FFFF)
