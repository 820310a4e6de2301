"""What the norms of a model do not show, in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set

from sat_lens.norms.naming import ParameterPlace

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_INNER_NORM = re.compile(
    r"^(q|k|v|qk|kv|query|key|value)_(\w+_)?(layer_?norm|norm|ln)$", re.IGNORECASE
)


def notes_on(
    places: Mapping[str, ParameterPlace],
    told_apart: Set[str],
    integers: Sequence[str],
    modules: Iterable[str] = (),
) -> tuple[str, ...]:
    """Say in words what norms and products leave out.

    Args:
        places: The place of each parameter, by name.
        told_apart: The attention modules whose heads are known.
        integers: The parameters that have no norm.
        modules: Names of the model's modules, where there is a model: not every norm has
            parameters.
    """
    found = []
    if integers:
        found.append(
            "Integer parameters, as quantised weights are, have no norm and are left out: "
            f"{_first(integers)}."
        )
    attention = [name for name, place in places.items() if place.attention]
    if any(places[name].bias and places[name].role for name in attention):
        found.append("Projections have biases, which the products leave out.")
    normed = inner_norms([*places, *modules])
    if normed:
        found.append(
            f"Queries, keys, values or latents are normalised inside attention ({normed[0]} and "
            "others): the scale of what comes before such a norm has no effect."
        )
    if any(places[name].role in ("kv_a", "kv_b") for name in attention):
        found.append("Attention is latent: products are of the factors multiplied out.")
    unknown = [
        p for p in dict.fromkeys(places[n].attention for n in attention) if p not in told_apart
    ]
    if unknown:
        found.append(
            f"Heads could not be told apart in {_first(unknown)}: no known layout, or their number "
            "is not known."
        )
    return tuple(found)


def inner_norms(names: Iterable[str], of: str = "qkv") -> list[str]:
    """Find the norms that stand inside attention, between a projection and what uses it.

    Args:
        names: Names of modules or parameters.
        of: First letters of what is normed: queries, keys, values.

    Example:
        >>> inner_norms(["h.0.attn.q_norm.weight", "h.0.attn_norm.weight", "h.0.attn.v_norm"])
        ['h.0.attn.q_norm.weight', 'h.0.attn.v_norm']
    """
    return [name for name in names if _is_inner_norm(name.split("."), of)]


def _is_inner_norm(parts: Sequence[str], of: str) -> bool:
    at = next((i for i, part in enumerate(parts) if _ATTENTION.search(part)), len(parts))
    return any(_INNER_NORM.match(part) and part[0].lower() in of for part in parts[at + 1 :])


def _first(names: Sequence[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} others' if names[1:] else ''}"
