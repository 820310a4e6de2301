"""A transformer language model small enough that a hundred of them train at once, and its text.

Pre-norm layers, learned positions, ReLU, no biases. The mask is an argument, because the figure
``heads`` is about masks. It is no TransformerLens model, so two of the library's measures are
applied to it here (:func:`saturation`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sat_lens._checks import check_count
from sat_lens.attention import Limit, RandomKey, Transform, distances_to_saturated
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.errors import ArgumentError, DataError

Mask = Literal["multiplied", "infinite"]
# Rows with fewer visible keys are not measured.
MIN_KEYS = 8
# How much text is read, at most.
CHARACTERS = 2_000_000


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a small transformer.

    Raises:
        ArgumentError: A size below 1, or a width that the heads cannot share.
    """

    vocabulary: int = 128
    context: int = 32
    width: int = 32
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            check_count(name, size)
        if self.width % self.heads:
            raise ArgumentError(
                f"The width must be a multiple of the number of heads; found {self.width} and "
                f"{self.heads}."
            )


class Attention(nn.Module):
    """Causal self-attention whose scores can be put through a transform before the softmax."""

    def __init__(self, shape: Shape, mask: Mask) -> None:
        super().__init__()
        self.heads, self.mask = shape.heads, mask
        self.q, self.k, self.v, self.o = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(
        self, x: Float[Tensor, "batch query width"], transform: Transform | None
    ) -> Float[Tensor, "batch query width"]:
        """Attend; ``transform`` receives the masked scores, and the softmax its result."""
        q, k, v = (
            rearrange(part(x), "b n (h d) -> b h n d", h=self.heads)
            for part in (self.q, self.k, self.v)
        )
        scores = masked(q @ k.mT / math.sqrt(q.shape[-1]), self.mask)
        pattern = (scores if transform is None else transform(scores)).softmax(-1)
        return self.o(rearrange(pattern @ v, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention and a feed-forward layer, each applied to the normalised residual stream."""

    def __init__(self, shape: Shape, mask: Mask) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(shape.width, bias=False) for _ in range(2))
        self.attention = Attention(shape, mask)
        self.inner = nn.Linear(shape.width, 4 * shape.width, bias=False)
        self.outer = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch position width"], transform: Transform | None
    ) -> Float[Tensor, "batch position width"]:
        """Return the residual stream after both layers."""
        x = x + self.attention(self.norm1(x), transform)
        return x + self.outer(self.inner(self.norm2(x)).relu())


class SmallTransformer(nn.Module):
    """A causal language model.

    Args:
        shape: Its size.
        mask: ``"infinite"`` sets the scores of future keys to -inf; ``"multiplied"`` multiplies
            them by zero, which does not hide the future.

    Example:
        >>> model = SmallTransformer(Shape(vocabulary=5, width=8))
        >>> model(torch.tensor([[0, 3, 4]])).shape
        torch.Size([1, 3, 5])
    """

    def __init__(self, shape: Shape, mask: Mask = "infinite") -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocabulary, shape.width) / shape.width**0.5)
        self.positions = nn.Parameter(torch.randn(shape.context, shape.width) / shape.width**0.5)
        self.blocks = nn.ModuleList(Block(shape, mask) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.unembedding = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(
        self, tokens: Int[Tensor, "batch position"], transform: Transform | None = None
    ) -> Float[Tensor, "batch position vocabulary"]:
        """Return the logits of the next token."""
        return self.unembedding(self.norm(self.residual(tokens, transform)))

    def residual(
        self, tokens: Int[Tensor, "batch position"], transform: Transform | None = None
    ) -> Float[Tensor, "batch position width"]:
        """Return the residual stream after the last layer."""
        x = self.embedding[tokens] + self.positions[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x, transform)
        return x


def new_network(shape: Shape, mask: Mask = "infinite", seed: int = 0) -> SmallTransformer:
    """Return an untrained model; PyTorch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallTransformer(shape, mask)


def masked(
    scores: Float[Tensor, "*rows query key"], mask: Mask
) -> Float[Tensor, "*rows query key"]:
    """Mask the scores of future keys, with -inf or with the zeros of a multiplied mask.

    Example:
        >>> masked(torch.ones(2, 2), "multiplied").tolist(), masked(torch.ones(2, 2), "infinite")[0]
        ([[1.0, 0.0], [1.0, 1.0]], tensor([1., -inf]))
    """
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~past, 0.0 if mask == "multiplied" else -math.inf)


def next_token_cross_entropy(
    logits: Float[Tensor, "batch position vocabulary"], tokens: Int[Tensor, "batch position"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of the next token, in nats; works under ``torch.func``."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def characters(texts: Iterable[str], limit: int = CHARACTERS) -> Int[Tensor, " character"]:
    """Encode texts by character; characters beyond ASCII become question marks.

    Raises:
        DataError: The texts have no characters.

    Example:
        >>> characters(["ab", "é"], limit=10).tolist()
        [97, 98, 63]
    """
    pieces, found = [], 0
    for text in texts:
        pieces.append(text.encode("ascii", "replace")[: limit - found])
        found += len(pieces[-1])
        if found == limit:
            break
    if not found:
        raise DataError("Needed texts with at least one character; found none.")
    return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8).long()


def windows(
    stream: Int[Tensor, " token"], context: int, batch: int, seed: int
) -> Int[Tensor, "batch context"]:
    """Return random windows of a stream; the draw depends on the seed alone.

    Raises:
        DataError: The stream is shorter than one window.
    """
    if len(stream) < context:
        raise DataError(f"A window needs {context} tokens; the text has {len(stream)}.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - context + 1, (batch, 1), generator=generator)
    return stream[starts + torch.arange(context)].long()


@torch.no_grad()
def scores_of(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"]
) -> list[Float[Tensor, "batch head query key"]]:
    """Return the scores that each layer's softmax receives, the first layer's first."""
    kept: list[Tensor] = []

    def keep(scores: Tensor) -> Tensor:
        kept.append(scores)
        return scores

    model.residual(tokens, keep)
    return kept


@torch.no_grad()
def saturation(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"], seed: int = 0
) -> dict[str, float]:
    """Measure ``S`` of the final residual stream with its two cosines, and the heads' mean lean.

    Example:
        >>> sorted(saturation(new_network(Shape()), torch.randint(128, (2, 32))))
        ['S', 'cos_random', 'cos_saturated', 'lean']
    """
    soft = model.residual(tokens)
    cos_saturated = mean_cosine(soft, model.residual(tokens, Limit()))
    cos_random = mean_cosine(soft, model.residual(tokens, _random_keys(seed)))
    rows = [distances_to_saturated(scores) for scores in scores_of(model, tokens)]
    counted = [row.n_keys >= MIN_KEYS for row in rows]
    to_argmax, to_mean = (
        torch.cat([getattr(row, name)[c] for row, c in zip(rows, counted, strict=True)]).mean()
        for name in ("tv_argmax", "tv_mean")
    )
    return {
        "cos_saturated": float(cos_saturated),
        "cos_random": float(cos_random),
        "S": float(normalised_similarity(cos_saturated, cos_random)),
        "lean": float(to_mean / (to_argmax + to_mean)),
    }


def _random_keys(seed: int) -> Transform:
    """Return a transform to random keys, different ones in every layer, for one forward pass."""
    layers = itertools.count()
    return lambda scores: RandomKey(seed, f"L{next(layers)}")(scores)


def log_spaced_steps(last: int, halves_from: int | None = None) -> list[int]:
    """Return step 0, the powers of two, and the last step.

    Args:
        last: The last step.
        halves_from: From which power of two on the steps half way to the next one, in logarithms,
            are in the list as well; None is never.

    Example:
        >>> log_spaced_steps(10), log_spaced_steps(50, halves_from=16)
        ([0, 1, 2, 4, 8, 10], [0, 1, 2, 4, 8, 16, 23, 32, 45, 50])
    """
    powers = [2**k for k in range(last.bit_length())]
    halves = [] if halves_from is None else [round(p * 2**0.5) for p in powers if p >= halves_from]
    return sorted({0, last, *(step for step in [*powers, *halves] if step < last)})
