"""How many positions there are to patch one by one: of queries, or of keys for k and v."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sat_lens.data import Batch
from sat_lens.errors import UnsupportedModelError
from sat_lens.intervention import Edit, attach_edits
from sat_lens.patching.activations import Component
from sat_lens.patching.items import Item
from sat_lens.patching.runs import Setting


def lengths_of(
    setting: Setting,
    batch: Batch,
    items: list[Item],
    component: Component,
    taken: Mapping[str, Tensor],
) -> dict[str, int]:
    """Count the positions of every attention module in which the items have heads.

    Args:
        setting: The model.
        batch: What it is run on.
        items: The heads or groups.
        component: What is patched: k and v have the positions of keys, all else those of queries.
        taken: That component in a run, by path; empty if it is computed in place.

    Raises:
        UnsupportedModelError: A module cuts its queries into blocks, or its activations do not
            have the axes batch and position in front.
    """
    counts = _n_queries(setting, batch, items)
    if component == "pattern":
        return counts
    for path, activation in taken.items():
        n_prompts, n_positions = activation.shape[:2]
        if component in ("k", "v"):
            counts[path] = n_positions
        if (n_prompts, n_positions) != (batch.size, counts[path]):
            raise UnsupportedModelError(
                f"Needed the {component} of {path} as [batch, position, ...], with {batch.size} "
                f"prompts, and found shape {list(activation.shape)}: single positions cannot be "
                'told apart there. Use positions=None, component="pattern", or source="local".'
            )
    return counts


def _n_queries(setting: Setting, batch: Batch, items: list[Item]) -> dict[str, int]:
    sites = setting.sites_of(items)
    counts: dict[str, int] = {}
    for site in sites:
        if "block" in site.layout:
            raise UnsupportedModelError(
                f"{site.path} cuts its queries into blocks, so that single query positions cannot "
                "be told apart. Use positions=None."
            )

    def watching(path: str) -> Edit:
        def edit(scores: Tensor) -> None:
            counts[path] = scores.shape[2]

        return edit

    with attach_edits(setting.model, sites, {site.path: watching(site.path) for site in sites}):
        batch.run(setting.model)
    return counts
