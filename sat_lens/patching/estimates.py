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

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import ArgumentError
from sat_lens.patching.activations import Activations, captured, of_heads, replacing
from sat_lens.patching.exact import Measured, Task, measure
from sat_lens.patching.items import Item
from sat_lens.patching.recording import BaseRun
from sat_lens.patching.result import Checks
from sat_lens.patching.runs import Local, Patch, Setting, everywhere, local_activations

# How many heads beyond the confirmed ones are computed to estimate the recall, as a share of them.
RECALL_SHARE = 0.5
LEAST_RECALL_SAMPLE = 4


@dataclasses.dataclass(frozen=True)
class Screened:
    """A screen's values, which of its items are exact, and how well the estimate chose."""

    measured: Measured
    confirmed: Tensor
    checks: Checks


def estimate(
    setting: Setting, patch: Patch, tasks: list[Task], base: Tensor, values: Tensor
) -> None:
    """Estimate all tasks from two forward passes and one backward pass, into ``values``.

    Args:
        setting: The model and the metric.
        patch: What is patched into what.
        tasks: What is wanted.
        base: The metric of the run that is patched.
        values: Where the estimates go: ``base`` plus the estimated effect.

    Raises:
        ArgumentError: The metric has no gradient.
    """
    items = list({task.item.label: task.item for task in tasks}.values())
    base_z, gradients = _gradients(setting, patch, items)
    with torch.no_grad():
        if isinstance(patch.source, Local):
            new_z = local_activations(setting, patch, items, base_z)
        else:
            new_z = dict(patch.source.activations)
        effects = {
            site.path: _products(new_z, base_z, gradients, site.path, site.n_heads)
            for site in setting.sites_of(items)
        }
        for task in tasks:
            values[task.index] = base + _effect(effects, task, setting.readout.per_prompt)


def screen(
    setting: Setting,
    patch: Patch,
    tasks: list[Task],
    estimates: Tensor,
    base: Tensor,
    *,
    confirm: float,
    run: BaseRun | None,
    seed: int,
    progress: bool,
) -> Screened:
    """Compute the items of largest estimated effect exactly, and some others, to tell the recall.

    Args:
        setting: The model and the metric.
        patch: What is patched into what.
        tasks: What is wanted.
        estimates: The values by :func:`estimate`.
        base: The metric of the run that is patched.
        confirm: The share of items to be confirmed.
        run: A record of the run that is patched, if the fast route may be used.
        seed: Seed of the sample that the recall is estimated from.
        progress: Whether to show a progress bar.
    """
    n_items = estimates.shape[0]
    n_picked = max(round(confirm * n_items), 1)
    order = _size(estimates, base).argsort(descending=True, stable=True).tolist()
    picked, rest = order[:n_picked], order[n_picked:]
    n_drawn = min(max(round(RECALL_SHARE * n_picked), LEAST_RECALL_SAMPLE), len(rest))
    drawn = random.Random(seed).sample(rest, n_drawn)
    wanted = {*picked, *drawn}
    values = torch.full_like(estimates, float("nan"))
    chosen = [task for task in tasks if task.index[0] in wanted]
    measured = measure(
        setting, patch, chosen, values, run=run, progress=progress, name="screen", seed=seed
    )
    confirmed = ~values.reshape(n_items, -1).isnan().all(1)
    checks = Checks(measured.route, measured.n_checked, measured.max_error)
    if measured.complete:
        size = _size(values, base)
        recall = _recall(size[picked], size[drawn], len(rest), n_top=max(n_picked // 2, 1))
        checks = dataclasses.replace(checks, recall=recall, recall_sample=n_drawn)
    mixed = values.where(confirmed.view(-1, *[1] * (values.dim() - 1)), estimates)
    return Screened(dataclasses.replace(measured, values=mixed), confirmed, checks)


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
    setting: Setting, patch: Patch, items: list[Item]
) -> tuple[Activations, dict[str, Tensor]]:
    """Run the base, and give z and the gradient of the metric at z, by path."""
    sites = setting.sites_of(items)
    added: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(everywhere(setting, patch.base))
        found = stack.enter_context(captured(setting.model, sites, "z"))
        for site in sites:

            def edit(z: Tensor, path: str = site.path) -> Tensor:
                added[path] = torch.zeros_like(z, requires_grad=True)
                return z + added[path]

            stack.enter_context(replacing(setting.model, site, "z", edit))
        stack.enter_context(setting.readout.narrowed(setting.unembed))
        logits = patch.batch.run(setting.model)
        value = setting.readout.raw_at(logits)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ArgumentError(
                f"An estimate needs a metric with a gradient, and {setting.readout.metric!r} has "
                'none. Use method="exact".'
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


def _effect(effects: dict[str, Tensor], task: Task, per_prompt: bool) -> Tensor:
    parts = [effects[path][:, :, heads].sum(-1) for path, heads in task.item.selection.items()]
    by_prompt = sum(
        (part.sum(1) if task.position is None else part[:, task.position] for part in parts),
        start=torch.zeros(len(parts[0])),
    )
    return by_prompt if per_prompt else by_prompt.sum()
