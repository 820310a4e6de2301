"""Activations of heads at their hook points: captured, or replaced by others.

Only points that lie on the path from input to output are used: the outputs of the projections to
q, k and v, and the input of the output projection (z). An edit there changes the output on every
architecture that has them, also where TransformerLens discards edits of patterns. (A pattern is
reached through its scores, by :mod:`sat_lens.intervention`.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.errors import NotReachedError, UnsupportedModelError
from sat_lens.models import unembedding
from sat_lens.sites import AttentionSite

Component = Literal["z", "pattern", "q", "k", "v"]
COMPONENTS: tuple[Component, ...] = ("z", "pattern", "q", "k", "v")
Activations = dict[str, Tensor]

_POINTS = {
    "z": ("o.hook_in", "hook_z"),
    "q": ("q.hook_out", "hook_q"),
    "k": ("k.hook_out", "hook_k"),
    "v": ("v.hook_out", "hook_v"),
}


def hook_point(model: Any, site: AttentionSite, component: str) -> nn.Module:
    """Return the module through which a component of an attention module passes.

    Raises:
        UnsupportedModelError: This attention has no such point.
    """
    module = model.get_submodule(site.path)
    for name in _POINTS[component]:
        with contextlib.suppress(AttributeError):
            return module.get_submodule(name)
    raise UnsupportedModelError(
        f"The {component} of single heads cannot be reached in {site.path}: TransformerLens has no "
        'hook point there. In a sweep use component="pattern", or source="local".'
    )


@contextlib.contextmanager
def captured(model: Any, sites: list[AttentionSite], component: str) -> Iterator[Activations]:
    """Keep a component of every site during the block, by path.

    Raises:
        UnsupportedModelError: A site has no such point, or ran more than once.
        NotReachedError: A site's point was not passed.
    """
    found: Activations = {}

    def keep(path: str, activation: Tensor) -> Tensor:
        found[path] = activation.detach()
        return activation

    with contextlib.ExitStack() as stack:
        for site in sites:
            stack.enter_context(replaced(model, site, component, partial(keep, site.path)))
        yield found


@contextlib.contextmanager
def replaced(
    model: Any, site: AttentionSite, component: str, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Put a site's component through ``edit`` during the block, which must run the site once.

    Raises:
        UnsupportedModelError, NotReachedError: As for :func:`captured`.
    """
    passed = 0

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        nonlocal passed
        passed += 1
        return edit(output)

    handle = hook_point(model, site, component).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if passed == 0:
        raise NotReachedError(
            f"The {component} of {site.path} did not pass its hook point in a forward pass, so "
            'nothing was patched there. Use component="pattern", or source="local".'
        )
    if passed > 1:
        raise UnsupportedModelError(
            f"{site.path} ran {passed} times in one forward pass, so that a run has no single "
            f'{component} to patch in. Use source="local".'
        )


@contextlib.contextmanager
def unembedding_only(model: Any, positions: Sequence[int] | None) -> Iterator[None]:
    """Let a model compute logits at some positions only, or at all for None, during the block.

    Logits of all positions can cost as much as all layers. A model without an unembedding is left
    as it is.

    Example:
        >>> import torch
        >>> import sat_lens as sl
        >>> model, tokens = sl.load_model("demo"), torch.tensor([[0, 5, 6]])
        >>> with unembedding_only(model, [-1]):
        ...     model(tokens).shape
        torch.Size([1, 1, 2048])
    """
    module = unembedding(model)
    if positions is None or module is None:
        yield
        return
    read = list(positions)

    def cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        # A classifier of whole sequences gets [batch, d_model]: no positions to leave out.
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3:
            return (args[0][:, read], *args[1:])
        return None

    handle = module.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def of_heads(activation: Tensor, n_heads: int) -> Float[Tensor, "batch position head width"]:
    """View an activation ``[batch, position, head * width]`` with an axis for heads.

    Raises:
        UnsupportedModelError: The activation has another form.

    Example:
        >>> of_heads(torch.zeros(2, 5, 12), n_heads=4).shape
        torch.Size([2, 5, 4, 3])
    """
    if activation.dim() == 4 and activation.shape[2] == n_heads:
        return activation
    if activation.dim() != 3 or activation.shape[-1] % n_heads:
        raise UnsupportedModelError(
            f"Needed an activation [batch, position, head * width] of {n_heads} heads, found shape "
            f'{list(activation.shape)}. Use component="pattern", or source="local".'
        )
    return activation.unflatten(-1, (n_heads, -1))


def with_heads(
    base: Tensor, source: Tensor, n_heads: int, heads: list[int], position: int | None
) -> Tensor:
    """Return ``base`` with some heads, at one position or at all, taken from ``source``.

    Example:
        >>> new = with_heads(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), 2, heads=[1], position=0)
        >>> new.tolist()
        [[[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]
    """
    new = of_heads(base, n_heads).clone()
    index = torch.tensor(heads, device=base.device)
    at = slice(None) if position is None else slice(position, position + 1)
    new[:, at, index] = of_heads(source, n_heads)[:, at, index].to(new)
    return new.view(base.shape)


def n_heads_of(model: Any, site: AttentionSite, component: str) -> int:
    """Return the number of heads in a component: groups of heads may share keys and values."""
    if component not in ("k", "v"):
        return site.n_heads
    shared = getattr(getattr(model, "cfg", None), "n_key_value_heads", None)
    if isinstance(shared, int) and 0 < shared <= site.n_heads and site.n_heads % shared == 0:
        return shared
    return site.n_heads
