"""A plain Hugging Face model that runs eager attention while a block lasts.

When not to use it: where a fused kernel can do the same. Eager attention makes the whole matrix of
scores.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from sat_lens.errors import UnsupportedModelError
from sat_lens.sites.discovery import attention_sites
from sat_lens.sites.naming import AttentionSite

_log = logging.getLogger(__name__)
_said: set[str] = set()


@contextlib.contextmanager
def eager_attention(model: Any, why: str) -> Iterator[list[AttentionSite]]:
    """Switch the model to eager attention, and back when the block ends.

    Args:
        model: A Hugging Face model.
        why: What keeps its fused kernel from serving. Each reason is logged once, as a warning.

    Yields:
        The attention modules of the eager model.

    Raises:
        UnsupportedModelError: The model cannot be switched.
    """
    if why not in _said:
        _said.add(why)
        _log.warning("Attention runs eagerly, with its n by n matrix of scores: %s.", why)
    before = _implementations(model)
    try:
        # Models that cannot be switched only log it.
        model.set_attn_implementation("eager")
        sites = attention_sites(model)
        stuck = [site.path for site in sites if site.level == "kernel"]
        if stuck:
            raise UnsupportedModelError(
                f"The fused attention of {stuck[0]} cannot serve, because {why}, and "
                f"{type(model).__name__} cannot be switched to eager attention. Load it with "
                'attn_implementation="eager".'
            )
        yield sites
    finally:
        for config, name in before:
            config._attn_implementation = name


def _implementations(model: Any) -> list[tuple[Any, str]]:
    """List the configurations of the model's parts, each with its kind of attention."""
    configs = {
        id(part.config): part.config
        for part in model.modules()
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    }
    return [(config, config._attn_implementation) for config in configs.values()]
