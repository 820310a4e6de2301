"""Patterns of a pair of runs, head by head, and their compact form for a page."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.caching import SaturationPair
from sat_lens.errors import ArgumentError
from sat_lens.sites.naming import AttentionSite, places
from sat_lens.viz.text import Tokens, shown

_PATTERN = ".hook_pattern"
_STEPS = 255
_DUST = 1e-6
# A share of a row is rounded in half precision: by this, relative to itself, in bfloat16.
_HALF_STEP = 2.0**-8
_KEYS_PER_ROW = 8


@dataclasses.dataclass(frozen=True)
class Patterns:
    """The soft and the saturated pattern of one attention module, of one text."""

    site: AttentionSite
    soft: Float[Tensor, "head query key"]
    saturated: Float[Tensor, "head query key"]

    @property
    def causal(self) -> bool:
        """Whether no query attends to a later key: seen in the data, not in a setting."""
        n_queries, n_keys = self.soft.shape[-2:]
        above = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
        return n_queries == n_keys and not bool((self.soft[:, above] > 0).any())


def patterns_of(pair: SaturationPair) -> list[Patterns]:
    """Take the patterns out of the caches of a pair, one entry an attention module.

    A module whose cached pattern is none (rows that do not sum to at most 1, or another layout) is
    left out.

    Raises:
        ArgumentError: The caches hold no pattern, or the batch has more than one sequence.
    """
    names = [n for n in pair.soft.cache.keys() if n.endswith(_PATTERN)]  # noqa: SIM118 - no dict
    if not names:
        raise ArgumentError(
            "The caches hold no attention pattern. Let it through: pass names_filter=None, or one "
            'that keeps the names ending in "hook_pattern".'
        )
    found = []
    for place in places([name.removesuffix(_PATTERN) for name in names]):
        soft, saturated = (
            run.cache[place.path + _PATTERN].detach().float().cpu()
            for run in (pair.soft, pair.saturated)
        )
        if soft.dim() != 4 or soft.shape != saturated.shape:
            continue
        if soft.shape[0] != 1:
            raise ArgumentError(
                f"A view shows one text, and the pair holds a batch of {soft.shape[0]}. Run the "
                "pair on one text."
            )
        site = AttentionSite(
            place.path, place.stack, place.layer, place.kind, soft.shape[1], "scores"
        )
        if _is_pattern(soft) and _is_pattern(saturated):
            found.append(Patterns(site, soft[0], saturated[0]))
    return found


def tokens_of(tokens: Tokens | None, patterns: Patterns) -> tuple[list[str], list[str]]:
    """Give the visible tokens of the queries and of the keys of one attention module.

    Raises:
        ArgumentError: There are not as many tokens as positions, or those of a stack are missing.
    """
    n_queries, n_keys = patterns.soft.shape[-2:]
    stack = patterns.site.stack
    queries, keys = ("decoder", "encoder") if patterns.site.kind == "cross" else (stack, stack)
    return _side(tokens, queries, n_queries), _side(tokens, keys, n_keys)


def encode_soft(pattern: Float[Tensor, "query key"], causal: bool) -> str:
    """Write a soft pattern as base64 bytes in steps of 1/255; a causal one without its upper half.

    Example:
        >>> encode_soft(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), causal=True)
        '/4CA'
    """
    steps = (pattern.clamp(0, 1) * _STEPS).round().to(torch.uint8)
    if causal:
        rows, columns = torch.tril_indices(*pattern.shape)
        steps = steps[rows, columns]
    return base64.b64encode(steps.contiguous().numpy().tobytes()).decode()


def encode_saturated(pattern: Float[Tensor, "query key"], causal: bool) -> dict[str, Any]:
    """Write a saturated pattern as the keys of each row, which share the row equally.

    Rows with many keys take less room as one bit a key (``bits``). A pattern that is not
    saturated, from a finite scale, is written like a soft one (``bytes``).

    Example:
        >>> encode_saturated(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), causal=True)
        {'keys': [[0], [0, 1]]}
    """
    support = pattern > _DUST
    counts = support.sum(-1, keepdim=True)
    if not bool(((pattern * counts - support.float()).abs() < _HALF_STEP).all()):
        return {"bytes": encode_soft(pattern, causal)}
    if float(counts.float().mean()) > _KEYS_PER_ROW:
        flat = support.flatten().to(torch.uint8)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
        bits = (padded * (2 ** torch.arange(7, -1, -1)).to(torch.uint8)).sum(-1).to(torch.uint8)
        return {"bits": base64.b64encode(bits.numpy().tobytes()).decode()}
    return {"keys": [row.nonzero().flatten().tolist() for row in support]}


def _side(tokens: Tokens | None, stack: str, count: int) -> list[str]:
    if tokens is None:
        return [str(position) for position in range(count)]
    if isinstance(tokens, Mapping):
        if stack not in tokens:
            raise ArgumentError(
                f"Needed the tokens of the stack {stack!r}; found those of "
                f"{', '.join(map(repr, tokens)) or 'none'}."
            )
        tokens = tokens[stack]
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or len(tokens) != count:
        listed = isinstance(tokens, Sequence) and not isinstance(tokens, str)
        found = f"{len(tokens)}" if listed else f"one {_kind_of(tokens)}"
        where = f" of the {stack}" if stack else ""
        raise ArgumentError(
            f"Needed {count} tokens{where}, one a position of the pair's text; found {found}. Take "
            'token_strings(model, ids), and with several stacks a dict {"encoder": [...], '
            '"decoder": [...]}.'
        )
    return shown(tokens)


def _kind_of(tokens: object) -> str:
    return "string" if isinstance(tokens, str) else type(tokens).__name__


def _is_pattern(pattern: Tensor) -> bool:
    sums = pattern.sum(-1)
    return bool((pattern >= 0).all() and (sums <= 1.01).all() and pattern.isfinite().all())
