"""The causal check of a role: what breaks if a head really did only what its label says?

Each head's pattern is replaced by its argmax, by uniform attention, by its nearest saturated row,
and its output by zero; the damage is how much the metric rises. A label is good if its own ideal
pattern does little damage compared with zeroing the head.

When not to use it: on much data. It takes four forward passes per head and batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.attention import Limit, Transform, Uniform
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.intervention import attached
from sat_lens.roles.importance import Metric, as_z, metric_on, z_point
from sat_lens.sites import AttentionSite

REPLACEMENTS: dict[str, Transform] = {
    "argmax": Limit(),
    "uniform": Uniform(),
    "nearest": Limit("nearest"),
}


def head_damage(
    model: Any, batch: Batch, sites: list[AttentionSite], metric: Metric
) -> dict[str, dict[str, Float[Tensor, "batch head"]]]:
    """Measure the damage of every replacement at every head, for each sequence of a batch.

    Args:
        model: A TransformerLens model.
        batch: The input.
        sites: The attention modules to look at.
        metric: A function of the logits, the lower the better, or ``"loss"``. One that has
            ``.per_prompt`` gives a value per sequence; the value of another counts for all.

    Returns:
        path of the module -> replacement (argmax, uniform, nearest, zero) -> damage.

    Raises:
        ArgumentError: The metric is unknown or gives no number.
        NonFiniteError: The metric is not finite.
        UnsupportedModelError: A module has no place where its z can be set to zero.
    """
    values = _per_prompt(metric, batch)
    with torch.no_grad():
        before = values(batch.run(model))

        def damage(intervention: contextlib.AbstractContextManager[Any]) -> Tensor:
            with intervention:
                return values(batch.run(model)) - before

        found: dict[str, dict[str, Tensor]] = {}
        for site in sites:
            heads = range(site.n_heads)
            found[site.path] = {
                name: torch.stack(
                    [damage(attached(model, sites, {site.path: [([h], new)]})) for h in heads], 1
                )
                for name, new in REPLACEMENTS.items()
            }
            zeroed = [damage(_without_output(model, site, head)) for head in heads]
            found[site.path]["zero"] = torch.stack(zeroed, 1)
    return found


@contextlib.contextmanager
def _without_output(model: Any, site: AttentionSite, head: int) -> Iterator[None]:
    def hook(_module: nn.Module, _args: Any, z: Tensor) -> Tensor:
        changed = as_z(z, site.n_heads).clone()
        changed[:, :, head] = 0
        return changed.reshape(z.shape)

    handle = z_point(model, site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _per_prompt(metric: Metric, batch: Batch) -> Callable[[Any], Tensor]:
    chosen = metric_on(metric, batch)
    function = getattr(chosen, "per_prompt", chosen)

    def values(logits: Any) -> Tensor:
        value = torch.as_tensor(function(logits)).detach().double().cpu()
        if value.numel() not in (1, batch.size):
            raise ArgumentError(f"The metric gave shape {list(value.shape)}; a scalar was needed.")
        if not bool(value.isfinite().all()):
            raise NonFiniteError(f"The metric {metric!r} is not finite.")
        return value.expand(batch.size)

    return values
