"""First-order estimates of all patches at once, and screens that confirm the largest exactly.

The estimate is attribution patching: the change of each head's z times the gradient of the metric
there, in the run that is patched. It is exact only for small changes, and saturation is not one:
use it to rank heads, never as a value. Towards denoising it is poorer still, because no gradient
passes through the patterns of a saturated run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.caching.activations import Activations, captured, of_heads, replaced
from sat_lens.errors import ArgumentError
from sat_lens.patching.baselines import Baseline
from sat_lens.patching.engine import Evaluated, Work, evaluate
from sat_lens.patching.items import Entry, Item
from sat_lens.patching.patches import Experiment, Local, Patch, everywhere, local_activations
from sat_lens.patching.result import Checks

Method = Literal["exact", "attribution", "screen"]

# How many heads beyond the confirmed ones are computed to estimate the recall, as a share of them.
RECALL_SHARE = 0.5
LEAST_RECALL_SAMPLE = 4


def values_of(
    work: Work,
    patch: Patch,
    base: Baseline,
    name: str,
    method: Method,
    confirm: float,
    like: Evaluated | None = None,
) -> Evaluated:
    """Fill the table of one patch: exactly, by estimates, or by both.

    Args:
        work: What is wanted.
        patch: What is patched into what.
        base: The run that is patched.
        name: What the progress bar shows.
        method: Exact values, estimates, or a screen.
        confirm: The share of items that a screen confirms.
        like: Another screen, whose items are confirmed here too.
    """
    if method == "exact":
        return evaluate(work, patch, base.record, name)
    estimates = estimate(work, patch, base.value)
    if method == "attribution":
        unconfirmed = torch.zeros(len(estimates), dtype=torch.bool)
        return Evaluated(estimates, unconfirmed, Checks("estimate"))
    if like is not None:
        confirmed = set(like.confirmed.nonzero().flatten().tolist())
        return _mixed(evaluate(work.of_items(confirmed), patch, base.record, name), estimates)
    return screen(work, patch, base, estimates, confirm)


def estimate(work: Work, patch: Patch, base: Tensor) -> Tensor:
    """Estimate all entries from two forward passes and one backward pass.

    Args:
        work: What is wanted.
        patch: What is patched into what.
        base: The metric of the run that is patched; estimates are this plus an effect.

    Raises:
        ArgumentError: The metric has no gradient.
    """
    experiment, values = work.experiment, work.empty()
    items = list({entry.item.label: entry.item for entry in work.entries}.values())
    base_z, gradients = _gradients(experiment, patch, items)
    with torch.no_grad():
        if isinstance(patch.source, Local):
            new_z = local_activations(experiment, patch, items, base_z)
        else:
            new_z = dict(patch.source.activations)
        effects = {
            site.path: _products(new_z, base_z, gradients, site.path, site.n_heads)
            for site in experiment.sites_of(items)
        }
        for entry in work.entries:
            values[entry.index] = base + _effect(effects, entry, experiment.readout.per_prompt)
    return values


def screen(
    work: Work, patch: Patch, base: Baseline, estimates: Tensor, confirm: float
) -> Evaluated:
    """Compute the items of largest estimated effect exactly, and some others, to tell the recall.

    Args:
        work: What is wanted.
        patch: What is patched into what.
        base: The run that is patched.
        estimates: The values by :func:`estimate`.
        confirm: The share of items to be confirmed.
    """
    n_picked = max(round(confirm * len(estimates)), 1)
    order = _size(estimates, base.value).argsort(descending=True, stable=True).tolist()
    picked, rest = order[:n_picked], order[n_picked:]
    n_drawn = min(max(round(RECALL_SHARE * n_picked), LEAST_RECALL_SAMPLE), len(rest))
    drawn = random.Random(work.seed).sample(rest, n_drawn)
    exact = evaluate(work.of_items({*picked, *drawn}), patch, base.record, "screen")
    if exact.complete:
        size = _size(exact.values, base.value)
        recall = _recall(size[picked], size[drawn], len(rest), n_top=max(n_picked // 2, 1))
        checks = dataclasses.replace(exact.checks, recall=recall, recall_sample=n_drawn)
        exact = dataclasses.replace(exact, checks=checks)
    return _mixed(exact, estimates)


def _mixed(exact: Evaluated, estimates: Tensor) -> Evaluated:
    """Exact values where there are some, estimates elsewhere."""
    confirmed = exact.confirmed.view(-1, *[1] * (estimates.dim() - 1))
    return dataclasses.replace(exact, values=exact.values.where(confirmed, estimates))


def _recall(picked: Tensor, drawn: Tensor, n_rest: int, n_top: int) -> float:
    """Estimate which share of the ``n_top`` items of largest exact effect was picked.

    Each drawn item stands for as many of the rest as were not drawn. Items are counted off from
    the largest effect down until ``n_top`` are reached.
    """
    weight = n_rest / len(drawn) if len(drawn) else 0.0
    sizes = torch.cat([picked, drawn])
    weights = torch.cat([torch.ones(len(picked)), torch.full((len(drawn),), weight)])
    order = sizes.argsort(descending=True, stable=True)
    taken = weights[order].cumsum(0).clamp(max=n_top).diff(prepend=torch.zeros(1))
    return float(taken[order < len(picked)].sum() / n_top)


def _size(values: Tensor, base: Tensor) -> Float[Tensor, " item"]:
    """The largest absolute effect of each item over positions; prompts are averaged first."""
    effects = values - (base if base.dim() == 0 else base.view(*[1] * (values.dim() - 1), -1))
    if base.dim():
        effects = effects.mean(-1)
    return effects.abs().reshape(len(effects), -1).nan_to_num(-1.0).amax(1)


def _gradients(
    experiment: Experiment, patch: Patch, items: list[Item]
) -> tuple[Activations, dict[str, Tensor]]:
    """Run the base, and give z and the gradient of the metric at z, by path."""
    sites = experiment.sites_of(items)
    added: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(everywhere(experiment, patch.base))
        found = stack.enter_context(captured(experiment.model, sites, "z"))
        for site in sites:

            def edit(z: Tensor, path: str = site.path) -> Tensor:
                added[path] = torch.zeros_like(z, requires_grad=True)
                return z + added[path]

            stack.enter_context(replaced(experiment.model, site, "z", edit))
        stack.enter_context(experiment.unembedding_read())
        logits = patch.batch.run(experiment.model)
        value = experiment.readout.raw_at(logits)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ArgumentError(
                "An estimate needs a metric with a gradient, and there is none through "
                f'{experiment.readout.metric!r}. Use method="exact".'
            )
        paths = list(added)
        # Prompts do not meet in the model, so the gradient of their sum keeps them apart.
        gradients = torch.autograd.grad(
            value.sum(), [added[path] for path in paths], allow_unused=True
        )
    at_zero = {
        path: torch.zeros_like(added[path]) if gradient is None else gradient
        for path, gradient in zip(paths, gradients, strict=True)
    }
    return found, at_zero


def _products(
    new_z: Activations, base_z: Activations, gradients: dict[str, Tensor], path: str, n_heads: int
) -> Float[Tensor, "batch position head"]:
    product = (new_z[path] - base_z[path]) * gradients[path]
    return of_heads(product, n_heads).sum(-1).float().cpu()


def _effect(effects: dict[str, Tensor], entry: Entry, per_prompt: bool) -> Tensor:
    parts = [effects[path][:, :, heads].sum(-1) for path, heads in entry.item.selection.items()]
    by_prompt = sum(
        (part.sum(1) if entry.position is None else part[:, entry.position] for part in parts),
        start=torch.zeros(len(parts[0])),
    )
    return by_prompt if per_prompt else by_prompt.sum()
