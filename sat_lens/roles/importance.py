"""How much each query row of each head matters to a metric.

The importance of row q is |<dL/dz_q, z_q - mean z>|: to first order, what the metric would change
by if the head gave its mean output there instead of its own (mean over the counted rows of the
same sequence). One backward pass gives it for all heads and rows at once.

When not to use it: as the size of an effect. It is a first-order estimate, and a weight only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sat_lens.data import Batch
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.metrics import next_token_loss
from sat_lens.roles.positions import fitting_mask
from sat_lens.sites import AttentionSite

Metric = Callable[[Any], Tensor] | str


def row_importance(
    model: Any, batch: Batch, sites: list[AttentionSite], metric: Metric
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Give the importance of every query row, by the path of the attention module.

    Args:
        model: A TransformerLens model.
        batch: The input.
        sites: The attention modules to look at.
        metric: A function of the logits that gives a scalar, or ``"loss"``, the next-token loss.

    Raises:
        ArgumentError: The metric is unknown, no scalar, or does not depend on the attention.
        UnsupportedModelError: A module has no place where its z can be read.
    """
    outputs: dict[str, Tensor] = {}
    with torch.enable_grad(), contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(_keeping_z(model, site, outputs))
        logits = batch.run(model)
        value = _value(metric, batch, logits)
        present = {site.path: outputs[site.path] for site in sites if site.path in outputs}
        gradients = torch.autograd.grad(value, list(present.values()), allow_unused=True)
    importance = {}
    for (path, z), gradient in zip(present.items(), gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(z)
        site = next(site for site in sites if site.path == path)
        counted = _counted(batch, site, z)
        importance[path] = _weigh(z.detach(), gradient, counted, site.n_heads)
    return importance


def z_point(model: Any, site: AttentionSite) -> nn.Module:
    """Find the hook point that carries z, the heads' outputs before the output projection.

    Raises:
        UnsupportedModelError: The module has none.
    """
    module = model.get_submodule(site.path)
    for path in ("hook_z", "o.hook_in"):
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError(
        f"{site.path} has no hook point for z (neither hook_z nor o.hook_in), so the outputs of "
        "its heads cannot be read one by one."
    )


def as_z(tensor: Tensor, n_heads: int) -> Float[Tensor, "batch query head d_head"]:
    """View what a z hook point carries with the heads on an axis of their own."""
    if tensor.dim() == 4:
        return tensor
    return rearrange(tensor, "b q (h d) -> b q h d", h=n_heads)


@contextlib.contextmanager
def _keeping_z(model: Any, site: AttentionSite, outputs: dict[str, Tensor]) -> Iterator[None]:
    def hook(_module: nn.Module, _args: Any, z: Tensor) -> Tensor:
        # With frozen weights nothing requires a gradient until something here does.
        kept = z if z.requires_grad else z.detach().requires_grad_()
        outputs[site.path] = kept
        return kept

    handle = z_point(model, site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def metric_on(metric: Metric, batch: Batch) -> Callable[[Any], Tensor]:
    """Give the metric as a function of this batch's logits; ``"loss"`` is the next-token loss."""
    if metric == "loss":
        if batch.output_tokens is None:
            raise ArgumentError(
                'metric="loss" needs tokens as data; pass a function of the logits.'
            )
        metric = next_token_loss(batch.output_tokens, batch.output_real)
    if not callable(metric):
        raise ArgumentError(
            f'metric must be "loss" or a function of the logits; {metric!r} was given.'
        )
    return metric


def _value(metric: Metric, batch: Batch, logits: Any) -> Tensor:
    value = metric_on(metric, batch)(logits)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ArgumentError(
            f"The metric {metric!r} must give a scalar tensor that depends on the logits."
        )
    return value.reshape(())


def _counted(batch: Batch, site: AttentionSite, z: Tensor) -> Bool[Tensor, "batch query"]:
    in_decoder = site.stack in ("decoder", "cross") and batch.decoder_tokens is not None
    real = batch.decoder_real if in_decoder else batch.real
    return fitting_mask(real, (z.shape[0], z.shape[1]), z.device)


def _weigh(
    z: Tensor, gradient: Tensor, counted: Bool[Tensor, "batch query"], n_heads: int
) -> Float[Tensor, "batch head query"]:
    z, gradient = as_z(z, n_heads).float(), as_z(gradient, n_heads).float()
    rows = counted[:, :, None, None].float()
    mean = (z * rows).sum(1, keepdim=True) / rows.sum(1, keepdim=True).clamp(min=1)
    return rearrange((gradient * (z - mean)).sum(-1).abs(), "b q h -> b h q")
