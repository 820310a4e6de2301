"""What a head's attention does to a metric: weights of query rows, and damage by replacement.

The importance of row q is |<dL/dz_q, z_q - mean z>|: to first order, what the metric would change
by if the head gave its mean output there instead of its own (mean over the counted rows of the
same sequence). It is attribution patching (Nanda 2023; Syed, Rager and Conmy, "Attribution Patching
Outperforms Automated Circuit Discovery", 2023) of mean ablation. One backward pass gives it for all
heads and rows. Use it as a weight; it is a first-order estimate and no effect size.

Damage is the causal check of a role: what happens to the metric if a head really did only what its
label says? Each head's pattern is replaced by its argmax, by uniform attention with and without
sinks, by its nearest saturated row, and its output by zero. That takes five forward passes per head
and batch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens._checks import gradients_for
from sat_lens.attention import Limit, Transform, Uniform, UniformWithoutSinks
from sat_lens.caching.activations import of_heads, replaced
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError
from sat_lens.intervention import attach_transforms
from sat_lens.metrics import Metric, call_metric, check_reads_no_padding, metric_of, read_metric
from sat_lens.roles.positions import text_rows
from sat_lens.roles.sums import DAMAGES
from sat_lens.sites import AttentionSite


def row_importance(
    model: Any, batch: Batch, sites: list[AttentionSite], metric: Metric | str
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Return the importance of every query row, by the path of the attention module.

    Args:
        model: A TransformerLens model.
        batch: The input.
        sites: The attention modules to look at.
        metric: A function of the logits that gives a scalar, or ``"loss"``, the next-token loss.

    Raises:
        ArgumentError: The metric is unknown, no scalar, or does not depend on the attention.
        UnsupportedModelError: A module has no place where its z can be read.
    """
    kept: dict[str, Tensor] = {}

    def keep(path: str, z: Tensor) -> Tensor:
        # With frozen weights nothing requires a gradient until something here does.
        kept[path] = z if z.requires_grad else z.detach().requires_grad_()
        return kept[path]

    with gradients_for("The importance of rows to a metric"), contextlib.ExitStack() as stack:
        for site in sites:
            keeping = functools.partial(keep, site.path)
            stack.enter_context(replaced(model, site, "z", keeping))
        value = _value(metric, batch, batch.run(model))
        gradients = torch.autograd.grad(
            value, [kept[site.path] for site in sites], allow_unused=True, materialize_grads=True
        )
    importance = {}
    for site, gradient in zip(sites, gradients, strict=True):
        z = kept[site.path].detach()
        counted = text_rows(batch, site.stack, (z.shape[0], z.shape[1]), z.device)
        importance[site.path] = _weigh(z, gradient, counted, site.n_heads)
    return importance


def _value(metric: Metric | str, batch: Batch, logits: Any) -> Tensor:
    chosen = metric_of(metric, batch)
    check_reads_no_padding(chosen, logits, batch)
    value = call_metric(chosen, logits)
    if not value.requires_grad:
        raise ArgumentError(
            f"The metric {metric!r} must give a scalar tensor that depends on the logits."
        )
    return value


def _weigh(
    z: Tensor, gradient: Tensor, counted: Bool[Tensor, "batch query"], n_heads: int
) -> Float[Tensor, "batch head query"]:
    z, gradient = of_heads(z, n_heads).float(), of_heads(gradient, n_heads).float()
    rows = counted[:, :, None, None].float()
    mean = (z * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    return rearrange((gradient * (z - mean)).sum(-1).abs(), "b q h -> b h q")


REPLACEMENTS: dict[str, Transform] = {
    "argmax": Limit(),
    "uniform": Uniform(),
    "nearest": Limit("nearest"),
}


def head_damage(
    model: Any,
    batch: Batch,
    sites: list[AttentionSite],
    metric: Metric | str,
    sinks: Callable[[AttentionSite, Tensor], Bool[Tensor, "batch key"]],
) -> dict[str, dict[str, Float[Tensor, "batch head"]]]:
    """Measure the damage of every replacement at every head, for each sequence of a batch.

    Args:
        model: A TransformerLens model.
        batch: The input.
        sites: The attention modules to look at.
        metric: A function of the logits, the lower the better, or ``"loss"``. One that has
            ``.per_prompt`` gives a value per sequence; the value of another counts for all.
        sinks: Says of a module, and of scores of its, which keys are sinks.

    Returns:
        path of the module -> replacement (argmax, uniform, no_sink, nearest, zero) -> damage.

    Raises:
        ArgumentError: The metric is unknown or gives no number.
        NonFiniteError: The metric is not finite.
        UnsupportedModelError: A module has no place where its z can be set to zero.
    """
    values = _per_prompt(metric, batch)
    with torch.no_grad():
        soft = batch.run(model)
        check_reads_no_padding(metric_of(metric, batch), soft, batch)
        before = values(soft)
        del soft

        def without_sinks(site: AttentionSite) -> Transform:
            return lambda scores: UniformWithoutSinks(sinks(site, scores))(scores)

        def damage(site: AttentionSite, head: int, name: str) -> Tensor:
            intervention: contextlib.AbstractContextManager[Any]
            if name == "zero":
                zero = functools.partial(_without, site.n_heads, head)
                intervention = replaced(model, site, "z", zero)
            else:
                new = without_sinks(site) if name == "no_sink" else REPLACEMENTS[name]
                intervention = attach_transforms(model, sites, {site.path: [([head], new)]})
            with intervention:
                return values(batch.run(model)) - before

        return {
            site.path: {
                name: torch.stack([damage(site, h, name) for h in range(site.n_heads)], 1)
                for name in DAMAGES
            }
            for site in sites
        }


def _without(n_heads: int, head: int, z: Tensor) -> Tensor:
    changed = of_heads(z, n_heads).clone()
    changed[:, :, head] = 0
    return changed.reshape(z.shape)


def _per_prompt(metric: Metric | str, batch: Batch) -> Callable[[Any], Tensor]:
    chosen = metric_of(metric, batch)
    # A metric without values per prompt counts as much for each of them.
    n_prompts = batch.size if hasattr(chosen, "per_prompt") else None
    return lambda logits: read_metric(chosen, logits, n_prompts).double().expand(batch.size)
