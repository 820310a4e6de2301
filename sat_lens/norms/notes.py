"""What the norms of a model do not show, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sat_lens.norms.naming import ParameterPlace


def notes_on(
    places: Mapping[str, ParameterPlace], any_heads: bool, integers: Sequence[str]
) -> tuple[str, ...]:
    """Say in words what norms and products leave out.

    Args:
        places: The place of each parameter, by name.
        any_heads: Whether heads could be told apart.
        integers: The parameters that have no norm.
    """
    found = []
    if integers:
        found.append(
            f"Integer parameters, as quantised weights are, have no norm and are left out: "
            f"{integers[0]}{f' and {len(integers) - 1} others' if integers[1:] else ''}."
        )
    attention = [name for name, place in places.items() if place.attention]
    if any(places[name].bias and places[name].role for name in attention):
        found.append("Projections have biases, which the products leave out.")
    normed = [n for n, p in places.items() if p.component == "layer norm" and _inside_attention(n)]
    if normed:
        found.append(
            f"Queries, keys or latents are normalised inside attention ({normed[0]} and others): "
            "the scale of what comes before has no effect on the scores."
        )
    if any(places[name].role in ("kv_a", "kv_b") for name in attention):
        found.append("Attention is latent: products are of the factors multiplied out.")
    if attention and not any_heads:
        found.append(
            "Heads could not be told apart: no known layout, or their number is not known."
        )
    return tuple(found)


def _inside_attention(name: str) -> bool:
    *_, parent, leaf = ["", *name.split(".")[:-1]]
    return "attn" in parent.lower() and leaf.lower().startswith(("q", "k"))
