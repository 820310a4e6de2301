"""Attention by key token through training: where its mass goes, and when it stops narrowing.

Keys are grouped by token, as in Tian et al. 2023, arXiv 2305.16380: the mass on a key token is
summed over all its positions in the row. A key token is distinct for a query token if the next
token is nearly certain in the rows in which it is visible, and common if it is not.

When not to use it: to see which position a head attends to; use :func:`sat_lens.head_roles`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens.errors import ArgumentError, DataError
from sat_lens.norms.checkpoints import list_checkpoints
from sat_lens.norms.measures import lens_model, undisturbed
from sat_lens.results import Provenance, Result, check_columns, column_frame
from sat_lens.sites import attention_sites
from sat_lens.vocabulary import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_KEYS = 8
# Narrowing is slow below this share of the fastest narrowing, per doubling of steps.
SLOW = 0.25
# Pairs of query and key token must occur in this many rows to count for commonness.
MIN_ROWS = 32


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Narrowing(Result, kind="narrowing"):
    """Attention by key token through training, as :func:`attention_narrowing` measures it.

    Attributes:
        provenance: The checkpoints and the data.
        steps: The step of each checkpoint.
        queries: The query tokens, the most frequent first.
        masses: Mean attention mass on each key token, by checkpoint and query token.
        uniform: The same masses under uniform attention.
        columns: One value per checkpoint; see :meth:`frame`.
        names: The text of each token by its number; empty where no tokenizer was given.
    """

    steps: tuple[int, ...]
    queries: tuple[int, ...]
    masses: Float[Tensor, "step query token"]
    uniform: Float[Tensor, "query token"]
    columns: dict[str, Tensor]
    names: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """Return one row per checkpoint, indexed by step.

        Columns: ``entropy`` of the mass over key tokens, in nats, mean over heads and over rows
        with at least 8 visible keys; ``entropy_uniform``, that of uniform attention; ``narrowing``,
        the fall of the entropy per doubling of steps since the previous checkpoint; ``moved``, the
        total variation between the masses at this checkpoint and the previous one, mean over the
        query tokens, per doubling; ``commonness``, the rank correlation, over pairs of query and
        key token, between the key's mass relative to uniform attention and the entropy of the next
        token given both. It is below 0 where attention prefers distinct tokens.
        """
        return column_frame(self.columns, "step", self.steps)

    @property
    def boundary(self) -> int | None:
        """The phase boundary: the first step after the fastest narrowing at which it is slow.

        Slow is less than a quarter of the fastest, per doubling of steps. None where narrowing
        never becomes slow, or where the entropy never falls. It may become faster again later.
        """
        return phase_boundary(self.steps, self.columns["entropy"].tolist())

    def keys(self, query: int, largest: int = 10) -> pd.DataFrame:
        """Return the mass on the key tokens that a query token attends to most at the end.

        Args:
            query: A query token, one of ``queries``.
            largest: How many key tokens.

        Returns:
            One row per checkpoint and one column per key token; the last row, ``"uniform"``, is
            that of uniform attention.

        Raises:
            ArgumentError: The query token was not measured.
        """
        if query not in self.queries:
            raise ArgumentError(f"Query tokens are {list(self.queries)}; found {query}.")
        row = self.queries.index(query)
        top = self.masses[-1, row].topk(largest).indices
        rows = torch.cat([self.masses[:, row, top], self.uniform[row, top][None]])
        index = pd.Index([*self.steps, "uniform"], name="step")
        return pd.DataFrame(rows.tolist(), index=index, columns=top.tolist())

    def plot(self, title: str | None = None) -> Figure:
        """Draw the entropy, its changes, and the masses of the most frequent query token."""
        figure, (entropy, speed, keys) = figures.panels(
            3, title or f"Narrowing: {self.provenance}", across=3, size=(3.6, 3.3)
        )
        table = self.frame()
        named = {"entropy": "attention", "entropy_uniform": "uniform"}
        figures.lines(entropy, table, named, x="step", y="nats", dashed=["entropy_uniform"])
        figures.headline(entropy, "entropy over key tokens")
        if self.boundary:
            entropy.axvline(self.boundary, color="#999999", lw=0.8, ls=":")
        named = {"narrowing": "entropy lost (nats)", "moved": "mass moved (share)"}
        figures.lines(speed, table, named, x="step")
        figures.headline(speed, "per doubling of steps")
        shown = self.keys(self.queries[0], 6).drop(index="uniform")
        words = {str(token): self.name(int(token)) for token in shown.columns}
        figures.lines(keys, shown.rename(columns=str), words, x="step", legend=False)
        keys.set_ylim(0, 1.35 * float(shown.to_numpy().max()))
        keys.legend(frameon=False, fontsize=7, ncol=3, loc="upper left")
        figures.headline(keys, f"mass on keys, query {self.name(self.queries[0])}")
        return figure

    def name(self, token: int) -> str:
        """Return a token as printable text, or its number where no tokenizer was given."""
        return visible(self.names[token] if self.names else f"token {token}")

    def _check(self) -> None:
        check_columns(self.columns, len(self.steps))


def attention_narrowing(
    checkpoints: Any,
    tokens: Int[Tensor, "sequence position"],
    *,
    layer: int = 0,
    n_queries: int = 8,
    as_model: Callable[[Any], Any] = lens_model,
    tokenizer: Any = None,
    progress: bool = True,
    data_name: str = "",
) -> Narrowing:
    """Follow the attention of one layer, by key token, through training.

    Args:
        checkpoints: As for :func:`sat_lens.norm_growth`: a directory, a list of paths, or a mapping
            from steps to paths or models.
        tokens: Sequences without padding to measure on, the same for every checkpoint.
        layer: Which block's attention; its heads are averaged.
        n_queries: How many query tokens to keep masses for: the most frequent ones.
        as_model: Makes a TransformerLens model of a checkpoint's path or model.
        tokenizer: Decodes the tokens for the figure; None shows their numbers.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        DataError: The tokens are not a matrix, or the sequences are not longer than 8.
        ArgumentError: There is no attention in that layer, or there are fewer than two checkpoints.

    Example:
        >>> import torch
        >>> import sat_lens as sl
        >>> from sat_lens.norms import attention_narrowing
        >>> model = sl.load_model("demo")
        >>> tokens = torch.arange(3, 23).repeat(2, 1)
        >>> found = attention_narrowing({0: model, 1: model}, tokens, progress=False)
        >>> found.frame()["moved"].tolist()
        [nan, 0.0]
    """
    if tokens.dim() != 2 or tokens.shape[1] <= MIN_KEYS:
        raise DataError(
            f"Needed sequences [sequence, position] longer than {MIN_KEYS}; found "
            f"{list(tokens.shape)}."
        )
    found = list_checkpoints(checkpoints)
    reader = _Reader(tokens, n_queries)
    bar = tqdm(found, desc="narrowing", unit="checkpoint", disable=not progress)
    rows = [reader.entropy_and_masses(_pattern(as_model(c.located), tokens, layer)) for c in bar]
    uniform_entropy, uniform = reader.entropy_and_masses(reader.uniform_pattern())
    steps = tuple(checkpoint.step for checkpoint in found)
    masses = torch.stack([mass for _, mass in rows])
    entropy = torch.tensor([value for value, _ in rows])
    moved = (masses[1:] - masses[:-1]).abs().sum(-1).mean(-1) / 2
    unknown = torch.tensor([math.nan], dtype=torch.float64)
    gaps = torch.tensor(doublings(steps))
    columns = {
        "entropy": entropy,
        "entropy_uniform": torch.full_like(entropy, uniform_entropy),
        "narrowing": torch.cat([unknown, -entropy.diff() / gaps]),
        "moved": torch.cat([unknown, moved / gaps]),
        "commonness": torch.tensor([reader.commonness(mass, uniform) for mass in masses]),
    }
    provenance = Provenance(f"{len(steps)} checkpoints, layer {layer}", data_name)
    ids = range(reader.vocabulary if tokenizer is not None else 0)
    names = tuple(tokenizer.decode([token]) for token in ids)
    return Narrowing(provenance, steps, reader.queries, masses, uniform, columns, names)


def doublings(steps: Sequence[int]) -> list[float]:
    """Return the number of doublings between successive steps; step 0 counts as half a step."""
    logs = [math.log2(step or 0.5) for step in steps]
    return [after - before for before, after in itertools.pairwise(logs)]


def phase_boundary(steps: Sequence[int], entropy: Sequence[float]) -> int | None:
    """Return the first step after the fastest narrowing at which narrowing is slow, or None."""
    falls = [a - b for a, b in itertools.pairwise(entropy)]
    speeds = [fall / gap for fall, gap in zip(falls, doublings(steps), strict=True)]
    fastest = max(speeds)
    if fastest <= 0:
        return None
    after = range(speeds.index(fastest) + 1, len(speeds))
    return next((steps[i] for i in after if speeds[i] < SLOW * fastest), None)


class _Reader:
    """Sums attention over the positions of each key token, on the same sequences every time."""

    def __init__(self, tokens: Int[Tensor, "sequence position"], n_queries: int) -> None:
        self.tokens, self.vocabulary = tokens, int(tokens.max()) + 1
        counted = tokens[:, MIN_KEYS - 1 : -1]
        counts = torch.bincount(counted.flatten(), minlength=self.vocabulary)
        chosen = counts.topk(min(n_queries, int((counts > 0).sum()))).indices
        self.queries = tuple(chosen.tolist())
        self.rows, self.next_entropy = self._next_tokens()

    def uniform_pattern(self) -> Float[Tensor, "sequence head query key"]:
        """Return uniform attention over the visible keys."""
        n = self.tokens.shape[1]
        past = torch.ones(n, n, dtype=torch.float64).tril()
        return (past / past.sum(1, keepdim=True)).expand(len(self.tokens), 1, n, n)

    def entropy_and_masses(
        self, pattern: Float[Tensor, "sequence head query key"]
    ) -> tuple[float, Float[Tensor, "chosen token"]]:
        """Return the mean entropy over key tokens, and the mean masses by query token."""
        entropy, n = 0.0, self.tokens.shape[1]
        sums = torch.zeros(len(self.queries), self.vocabulary, dtype=torch.float64)
        counts = torch.zeros(len(self.queries), dtype=torch.float64)
        for sequence, rows in zip(self.tokens, pattern.double(), strict=True):
            mass = torch.zeros(*rows.shape[:2], self.vocabulary, dtype=torch.float64)
            mass.index_add_(2, sequence, rows)
            mass = mass[:, MIN_KEYS - 1 : n - 1]
            entropy += float(torch.special.entr(mass).sum(-1).mean())
            counted = sequence[MIN_KEYS - 1 : n - 1]
            for i, query in enumerate(self.queries):
                sums[i] += mass[:, counted == query].mean(0).sum(0)
                counts[i] += (counted == query).sum()
        return entropy / len(self.tokens), sums / counts[:, None]

    def commonness(self, mass: Tensor, uniform: Tensor) -> float:
        """Return the column ``commonness`` of :meth:`Narrowing.frame`."""
        used = self.rows >= MIN_ROWS
        if int(used.sum()) < 3:
            return math.nan
        gain = pd.Series((mass / uniform)[used].tolist())
        entropy = pd.Series(self.next_entropy[used].tolist())
        return float(gain.rank().corr(entropy.rank()))

    def _next_tokens(self) -> tuple[Tensor, Tensor]:
        """Return, by query and key token, the number of rows and the next token's entropy in them.

        The entropy has the correction of Miller (1955) for few rows, (K - 1) / 2N.
        """
        counts: Counter[tuple[int, int, int]] = Counter()
        places = {query: i for i, query in enumerate(self.queries)}
        for sequence in self.tokens.tolist():
            for position in range(MIN_KEYS - 1, len(sequence) - 1):
                i = places.get(sequence[position])
                if i is not None:
                    following = sequence[position + 1]
                    counts.update((i, key, following) for key in set(sequence[: position + 1]))
        shape = (len(self.queries), self.vocabulary)
        where = torch.tensor([(i, key) for i, key, _ in counts]).T
        number = torch.tensor(list(counts.values()), dtype=torch.float64)
        rows, different, logs = (
            torch.zeros(shape, dtype=torch.float64).index_put_(tuple(where), part, accumulate=True)
            for part in (number, torch.ones_like(number), number * number.log())
        )
        return rows, rows.log() - logs / rows + (different - 1) / (2 * rows)


def _pattern(model: Any, tokens: Tensor, layer: int) -> Float[Tensor, "sequence head query key"]:
    sites = [site for site in attention_sites(model) if site.layer == layer]
    if not sites:
        raise ArgumentError(f"There is no attention in layer {layer}.")
    name = f"{sites[0].path}.hook_pattern"
    with undisturbed(model):
        _, cache = model.run_with_cache(tokens, names_filter=lambda point: point == name)
    return cache[name]
