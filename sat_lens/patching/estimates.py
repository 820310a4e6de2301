"""First-order estimates of all patches at once, and screens that confirm the largest exactly.

The estimate is attribution patching (Nanda, 2023; Syed, Rager and Conmy, "Attribution Patching
Outperforms Automated Circuit Discovery", arXiv 2310.10348): the change of each head's z times the
gradient of the metric there, in the run that is patched. It is exact only for small changes, and
saturation is not one: use it to rank heads, never as a value. Towards denoising it is poorer still,
because no gradient passes through the patterns of a saturated run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens._checks import gradients_for
from sat_lens.caching.activations import Activations, captured, of_heads, replaced
from sat_lens.errors import ArgumentError
from sat_lens.patching.arguments import Item
from sat_lens.patching.engine import Evaluated, Work, evaluate
from sat_lens.patching.result import Checks
from sat_lens.patching.runs import Baseline, Experiment, Local, Patch, everywhere, local_activations

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
    if like is None:
        exact = screen(work, patch, base, estimates, confirm)
    else:
        confirmed = set(like.confirmed.nonzero().flatten().tolist())
        exact = evaluate(work.of_items(confirmed), patch, base.record, name)
    is_exact = exact.confirmed.view(-1, *[1] * (estimates.dim() - 1))
    return dataclasses.replace(exact, values=exact.values.where(is_exact, estimates))


def estimate(work: Work, patch: Patch, base: Tensor) -> Tensor:
    """Estimate all entries from two forward passes and one backward pass.

    An estimate is ``base``, the metric of the run that is patched, plus an effect.

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
        effects: dict[str, Float[Tensor, "batch position head"]] = {}
        for site in experiment.sites_of(items):
            product = (new_z[site.path] - base_z[site.path]) * gradients[site.path]
            effects[site.path] = of_heads(product, site.n_heads).sum(-1).float().cpu()
        for entry in work.entries:
            item, position = entry.spot
            parts = [effects[path][:, :, heads].sum(-1) for path, heads in item.selection.items()]
            at = [part.sum(1) if position is None else part[:, position] for part in parts]
            by_prompt = torch.stack(at).sum(0)
            apart = experiment.readout.n_prompts is not None
            values[entry.index] = base + (by_prompt if apart else by_prompt.sum())
    return values


def _gradients(
    experiment: Experiment, patch: Patch, items: list[Item]
) -> tuple[Activations, Activations]:
    """Run the base, and return z and the gradient of the metric at z, by path."""
    sites = experiment.sites_of(items)
    added: Activations = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(gradients_for("An estimate of effects"))
        stack.enter_context(everywhere(experiment, patch.base))
        found = stack.enter_context(captured(experiment.model, sites, "z"))
        for site in sites:

            def edit(z: Tensor, path: str = site.path) -> Tensor:
                added[path] = torch.zeros_like(z, requires_grad=True)
                return z + added[path]

            stack.enter_context(replaced(experiment.model, site, "z", edit))
        stack.enter_context(experiment.unembedding_read())
        value = experiment.readout.with_gradient_at(patch.batch.run(experiment.model))
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ArgumentError(
                "An estimate needs a metric with a gradient, and there is none through "
                f'{experiment.readout.metric!r}. Use method="exact".'
            )
        # Prompts do not meet in the model, so the gradient of their sum keeps them apart.
        gradients = torch.autograd.grad(
            value.sum(), list(added.values()), allow_unused=True, materialize_grads=True
        )
    return found, dict(zip(added, gradients, strict=True))


def screen(
    work: Work, patch: Patch, base: Baseline, estimates: Tensor, confirm: float
) -> Evaluated:
    """Compute the items of largest estimated effect exactly, and some others, to tell the recall.

    ``confirm`` is the share of the items that is computed.
    """
    n_picked = max(round(confirm * len(estimates)), 1)
    order = _size(estimates, base.value).argsort(descending=True, stable=True).tolist()
    picked, rest = order[:n_picked], order[n_picked:]
    n_drawn = min(max(round(RECALL_SHARE * n_picked), LEAST_RECALL_SAMPLE), len(rest))
    drawn = random.Random(work.seed).sample(rest, n_drawn)
    exact = evaluate(work.of_items({*picked, *drawn}), patch, base.record, "screen")
    if not exact.complete:
        return exact
    size = _size(exact.values, base.value)
    recall = _recall(size[picked], size[drawn], len(rest), n_top=max(n_picked // 2, 1))
    checks = dataclasses.replace(exact.checks, recall=recall, recall_sample=n_drawn)
    return dataclasses.replace(exact, checks=checks)


def _size(values: Tensor, base: Tensor) -> Float[Tensor, " item"]:
    """The largest absolute effect of each item over positions; prompts are averaged first."""
    effects = values - base
    if base.dim():
        effects = effects.mean(-1)
    return effects.abs().reshape(len(effects), -1).nan_to_num(-1.0).amax(1)


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
