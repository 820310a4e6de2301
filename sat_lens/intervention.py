"""Saturate attention, or replace it by any transform, while a block of code runs.

The model is as it was when the block ends, also after an exception or an interrupt. Hooks of
others keep working: one that is added later sees, and may act on, the changed values.

When not to use it: to compare soft and saturated activations, which
:func:`sat_lens.run_with_saturation_cache` does in one call, or to try one head after the other,
which :func:`sat_lens.sweep_heads` does faster.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from sat_lens._checks import check_evaluation_mode, require_lens_model
from sat_lens.attention import Limit, Scale, Transform, Uniform
from sat_lens.attention.transforms import Ties, check_ties
from sat_lens.changes import Groups, change_of, why_not_fused
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.kernels import AttentionCall
from sat_lens.scales import ScaleLike, select_with_scales
from sat_lens.sites import AttentionSite, Heads, attention_sites, open_door
from sat_lens.sites.eager import eager_attention
from sat_lens.sites.hooks import pattern_hook, scores_hook
from sat_lens.sites.selection import select_heads
from sat_lens.sites.unseen import refusing_unseen_attention


@contextlib.contextmanager
def saturate(
    model: Any, heads: Heads = None, scale: ScaleLike = math.inf, ties: Ties = "exact"
) -> Iterator[Any]:
    """Multiply the QK logits of chosen heads by an inverse temperature while the block lasts.

    At the default, infinity, attention is saturated: uniform over the keys that attain the row's
    maximum (Merrill et al. 2021, section 3).

    Args:
        model: A TransformerLens model.
        heads: Which heads; None is all. See :func:`sat_lens.attention_sites` for labels.
        scale: The inverse temperature c >= 0: a number, a tensor ``[layer, head]``, a mapping from
            heads to numbers, or a callable ``(layer, head) -> c``, a schedule through the forward
            pass. ``math.inf`` is the exact limit, 0 uniform over the visible keys.
        ties: Which keys share a row in the limit: ``"exact"``, a number d >= 0 (keys within d of
            the maximum), or ``"nearest"`` (the saturated row nearest to the soft row).

    Yields:
        The model.

    Raises:
        HeadSelectionError: A head does not exist, or none is selected.
        ArgumentError: A scale is negative or NaN, or ``ties`` is unknown.
        UnsupportedModelError: A chosen head's attention cannot be reached.
        NotReachedError: In the block: a layer ran and its chosen heads were not changed.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> with sl.saturate(model, "L0H0"):
        ...     logits, cache = model.run_with_cache("def f(x):")
        >>> cache["pattern", 0][0, 0].max(-1).values.min().item()
        1.0
    """
    check_ties(ties)
    sites = attention_sites(model)
    scales = select_with_scales(sites, heads, scale)
    groups = {path: _groups(chosen, ties) for path, chosen in scales.items()}
    with attached(model, sites, groups):
        yield model


@contextlib.contextmanager
def replace_attention(model: Any, transform: Transform, heads: Heads = None) -> Iterator[Any]:
    """Put the scores of chosen heads through a transform while the block lasts.

    Args:
        model: A TransformerLens model.
        transform: A function from scores ``[batch, head, query, key]`` to scores of the same shape.
            It gets the chosen heads only, in float32, with ``-inf`` at masked keys. The softmax of
            what it returns is the new pattern; masked keys stay masked whatever it returns.
        heads: Which heads; None is all.

    Yields:
        The model.

    Raises:
        ArgumentError: ``transform`` is not callable or, in the block, returned unusable scores.
        HeadSelectionError, UnsupportedModelError, NotReachedError: As for :func:`saturate`.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> with sl.replace_attention(model, lambda scores: 2 * scores, heads="L1H0"):
        ...     twice_as_sharp = model("def f(x):")
    """
    if not callable(transform) or isinstance(transform, type):
        hint = " Give an instance of it." if isinstance(transform, type) else ""
        raise ArgumentError(
            f"A transform is a function from scores to scores, and {transform!r} was given.{hint}"
        )
    sites = attention_sites(model)
    groups: dict[str, Groups] = {
        path: [(chosen, transform)] for path, chosen in select_heads(sites, heads).items()
    }
    with attached(model, sites, groups):
        yield model


def saturation_hooks(
    model: Any, heads: Heads = None, scale: ScaleLike = math.inf, ties: Ties = "exact"
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Give the same intervention as hooks for TransformerLens's ``run_with_hooks``.

    Arguments and errors are those of :func:`saturate`. A hook cannot check that it was called, so
    :func:`saturate` is the safer form where there is a choice. Where only the pattern can be
    hooked (TransformerLens's native models), scales have to be 1 or more, and scores that differ
    by less than the rounding of the pattern count as equal.

    Returns:
        Pairs (name of a hook point, hook).

    Raises:
        UnsupportedModelError: A chosen head cannot be reached through a hook point.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> logits = model.run_with_hooks("import os", fwd_hooks=sl.saturation_hooks(model, "L0H0"))
    """
    check_ties(ties)
    require_lens_model(model, "saturation_hooks")
    sites = attention_sites(model)
    hooks = []
    for path, chosen in select_with_scales(sites, heads, scale).items():
        site = _site_at(sites, path)
        _check_reachable(site)
        edit = change_of(site, _groups(chosen, ties))
        if site.level == "scores":
            hooks.append((f"{path}.hook_attn_scores", scores_hook(edit)))
        elif site.pattern_is_true and min(chosen.values()) >= 1:
            hooks.append((f"{path}.hook_pattern", pattern_hook(edit)))
        else:
            raise UnsupportedModelError(
                f"{path} cannot be saturated through a TransformerLens hook"
                + (" at a scale below 1" if site.pattern_is_true else "")
                + ": its scores' hook does not carry what its softmax receives. "
                "Use `with sat_lens.saturate(model): ...`."
            )
    return hooks


@contextlib.contextmanager
def attached(
    model: Any, sites: list[AttentionSite], groups: Mapping[str, Groups]
) -> Iterator[None]:
    """Attach groups of heads with their transforms to the model's sites, by path.

    Where a fused kernel cannot serve, the model runs eager attention for the length of the block.
    """
    chosen = {path: _site_at(sites, path) for path in groups}
    for site in chosen.values():
        _check_reachable(site)
    edits = {path: change_of(chosen[path], of_site) for path, of_site in groups.items()}
    reasons = [why_not_fused(model, chosen[path], edit) for path, edit in edits.items()]
    why = next(filter(None, reasons), "")
    with contextlib.ExitStack() as stack:
        if why:
            sites = stack.enter_context(eager_attention(model, why))
        if all(site.path in edits for site in sites):
            stack.enter_context(refusing_unseen_attention(model))
        stack.enter_context(open_door(model, edits, sites))
        yield


@contextlib.contextmanager
def observe_attention(
    model: Any,
    observer: Callable[[AttentionSite, Float[Tensor, "batch head query key"]], None],
    of_calls: Callable[[AttentionSite, AttentionCall], None] | None = None,
) -> Iterator[None]:
    """Show the scores of every attention module to ``observer`` while the block lasts.

    The scores come as the softmax receives them, in the model's dtype; nothing is changed. A fused
    kernel shows its arguments to ``of_calls``; without that, the model runs eager attention.
    """
    sites = attention_sites(model)
    for site in sites:
        _check_reachable(site)
    fused = [site for site in sites if site.level == "kernel"]
    reasons = [site.why_not or ("" if of_calls else "scores are to be looked at") for site in fused]
    with contextlib.ExitStack() as stack:
        if any(reasons):
            sites = stack.enter_context(eager_attention(model, next(filter(None, reasons))))
        edits = {site.path: _Look(site, observer, of_calls) for site in sites}
        stack.enter_context(refusing_unseen_attention(model))
        stack.enter_context(open_door(model, edits, sites))
        yield


@dataclasses.dataclass(frozen=True)
class _Look:
    """An edit that only looks."""

    site: AttentionSite
    observer: Callable[[AttentionSite, Tensor], None]
    of_calls: Callable[[AttentionSite, AttentionCall], None] | None

    def __call__(self, scores: Tensor) -> None:
        self.observer(self.site, scores)

    def look(self, call: AttentionCall) -> None:
        if self.of_calls is not None:
            self.of_calls(self.site, call)


def transform_for(scale: float, ties: Ties = "exact") -> Transform:
    """Give the transform that multiplies by ``scale``, with the limits at 0 and infinity."""
    if scale == math.inf:
        return Limit(ties)
    return Uniform() if scale == 0 else Scale(scale)


def _groups(scale_of_head: Mapping[int, float], ties: Ties) -> Groups:
    by_scale: dict[float, list[int]] = {}
    for head, c in scale_of_head.items():
        by_scale.setdefault(c, []).append(head)
    return [(heads, transform_for(c, ties)) for c, heads in by_scale.items()]


def _site_at(sites: list[AttentionSite], path: str) -> AttentionSite:
    return next(site for site in sites if site.path == path)


def _check_reachable(site: AttentionSite) -> None:
    if site.level is None:
        raise UnsupportedModelError(
            f"The attention of {site.path} cannot be reached: {site.why_not}."
        )
    check_evaluation_mode([site])
