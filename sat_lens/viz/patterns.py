"""What a view shows: tokens in which nothing is missing, and patterns in a compact form."""

from __future__ import annotations

import base64
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.caching import SaturationPair
from sat_lens.errors import ArgumentError
from sat_lens.roles.result import HeadRoles
from sat_lens.sites import AttentionSite, places
from sat_lens.vocabulary import visible

WORD_JOINER = "\u2060"
Tokens = Sequence[str] | Mapping[str, Sequence[str]]

_PATTERN = ".hook_pattern"
_STEPS = 255
_DUST = 1e-6
# A share of a row is rounded in half precision: by this, relative to itself, in bfloat16.
_HALF_STEP = 2.0**-8
_KEYS_PER_ROW = 8


def token_strings(model: Any, tokens: Tensor | Iterable[int]) -> list[str]:
    """Return one readable text per token id, in which nothing is missing.

    Byte-level pieces become the text that they stand for; a piece that is no text by itself (part
    of a character, an empty one) keeps the tokenizer's name for it. A model without a
    tokenizer gets the ids as texts.

    Args:
        model: A TransformerLens model.
        tokens: Ids, as a tensor ``[position]`` or ``[1, position]``, or a list.

    Raises:
        ArgumentError: The values are not token ids.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.viz import token_strings
        >>> model = sl.load_model("demo")
        >>> token_strings(model, model.tokenizer("def f():")["input_ids"])[:3]
        ['<bos>', 'def', ' f']
    """
    ids = _ids_of(tokens)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return [str(i) for i in ids]
    return [_token_string(tokenizer, i) for i in ids]


def _ids_of(tokens: Tensor | Iterable[int]) -> list[int]:
    values = tokens.flatten().tolist() if isinstance(tokens, Tensor) else tokens
    if isinstance(values, Iterable) and not isinstance(values, str):
        ids = list(values)
        if all(isinstance(i, int) or (isinstance(i, Tensor) and i.numel() == 1) for i in ids):
            return [int(i) for i in ids]
    raise ArgumentError(
        "Needed token ids, such as model.to_tokens(text) or the input_ids of a tokenizer gives; "
        f"found {type(tokens).__name__}."
    )


def _token_string(tokenizer: Any, token: int) -> str:
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("▁"):
        # SentencePiece: decoding a single piece drops the space in front of it.
        return piece.replace("▁", " ")
    text = str(tokenizer.decode([token]))
    return piece if text == "" or "�" in text else text


def inert(tokens: Iterable[str]) -> list[str]:
    """Make tokens visible, and harmless for the circuitsvis components that insert them as HTML.

    ``ColoredTokens``, ``TextNeuronActivations`` and ``TopkTokens`` do, and show the same string as
    text in their tooltips, where an escape would be read as it is. So < and & are followed by an
    invisible word joiner instead: no tag and no character reference can begin with that, and both
    places show the same. The attention components draw on a canvas and get tokens as they are.
    """
    return [re.sub("[<&]", rf"\g<0>{WORD_JOINER}", visible(str(token))) for token in tokens]


@dataclasses.dataclass(frozen=True)
class Patterns:
    """The soft and the saturated pattern of one attention module, of one text."""

    site: AttentionSite
    soft: Float[Tensor, "head query key"]
    saturated: Float[Tensor, "head query key"]

    @functools.cached_property
    def causal(self) -> bool:
        """Whether no query attends to a later key: seen in the data, not in a setting."""
        n_queries, n_keys = self.soft.shape[-2:]
        above = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
        return n_queries == n_keys and not bool((self.soft[:, above] > 0).any())


def check_roles(roles: object) -> None:
    """Raise an ArgumentError unless something is a result of head_roles."""
    if not isinstance(roles, HeadRoles):
        raise ArgumentError(
            "Needed roles, as returned by sat_lens.head_roles(model, data); found "
            f"{type(roles).__name__}."
        )


def patterns_of(pair: SaturationPair) -> list[Patterns]:
    """Return the patterns in the caches of a pair, one entry per attention module.

    A module is left out if what its cache holds is not a pattern (rows that sum to more than 1, or
    another layout).

    Raises:
        ArgumentError: It is not a pair, its caches hold no pattern, or the batch has more than one
            sequence.
    """
    if not isinstance(pair, SaturationPair):
        raise ArgumentError(
            "Needed a pair of runs, as returned by sat_lens.run_with_saturation_cache(model, "
            f"text); found {type(pair).__name__}."
        )
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


def scale_of(pair: SaturationPair) -> str:
    """Return the inverse temperature of the saturated run as a page shows it."""
    return "∞" if pair.provenance.scale == "inf" else pair.provenance.scale


def packed(
    patterns: Patterns, heads: Sequence[int], tokens: Tokens | None, texts: list[list[str]]
) -> dict[str, Any]:
    """Return some heads of one attention module as a page's scripts read them.

    The texts of its queries and keys are added to ``texts``, those of the page so far.
    """
    stack = patterns.site.stack
    stacks = ("decoder", "encoder") if patterns.site.kind == "cross" else (stack, stack)
    counts = patterns.soft.shape[-2:]
    queries, keys = (_tokens_at(tokens, *side) for side in zip(stacks, counts, strict=True))
    for text in (queries, keys):
        if text not in texts:
            texts.append(text)
    causal = patterns.causal
    return {
        "causal": causal,
        "queries": texts.index(queries),
        "keys": texts.index(keys),
        "soft": [encode_soft(patterns.soft[head], causal) for head in heads],
        "saturated": [encode_saturated(patterns.saturated[head], causal) for head in heads],
    }


def encode_soft(pattern: Float[Tensor, "query key"], causal: bool) -> str:
    """Write a soft pattern as base64 bytes in steps of 1/255; of a causal one the lower half."""
    steps = (pattern.clamp(0, 1) * _STEPS).round().to(torch.uint8)
    if causal:
        rows, columns = torch.tril_indices(*pattern.shape)
        steps = steps[rows, columns]
    return base64.b64encode(steps.contiguous().numpy().tobytes()).decode()


def encode_saturated(pattern: Float[Tensor, "query key"], causal: bool) -> dict[str, Any]:
    """Write a saturated pattern as the keys of each row, which share the row equally.

    Rows with many keys take less room as one bit a key (``bits``). A pattern that is not
    saturated, from a finite scale, is written like a soft one (``bytes``).
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


def _tokens_at(tokens: Tokens | None, stack: str, count: int) -> list[str]:
    """Return the visible tokens of a stack, of which there must be ``count``."""
    if tokens is None:
        return [str(position) for position in range(count)]
    if isinstance(tokens, Mapping):
        if stack not in tokens:
            raise ArgumentError(
                f"Needed the tokens of the stack {stack!r}; found those of "
                f"{', '.join(map(repr, tokens)) or 'none'}."
            )
        tokens = tokens[stack]
    listed = isinstance(tokens, Sequence) and not isinstance(tokens, str)
    if not listed or len(tokens) != count:
        kind = "string" if isinstance(tokens, str) else type(tokens).__name__
        found = f"{len(tokens)}" if listed else f"one {kind}"
        where = f" of the {stack}" if stack else ""
        raise ArgumentError(
            f"Needed {count} tokens{where}, one per position of the pair's text; found {found}. "
            'Take token_strings(model, ids), and with several stacks a dict {"encoder": [...], '
            '"decoder": [...]}.'
        )
    return [visible(str(token)) for token in tokens]


def _is_pattern(pattern: Tensor) -> bool:
    sums = pattern.sum(-1)
    return bool((pattern >= 0).all() and (sums <= 1.01).all() and pattern.isfinite().all())
