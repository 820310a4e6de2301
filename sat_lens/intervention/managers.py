"""The blocks in which attention is changed or observed, and the same as hooks."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, ParamSpec, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens._checks import check_choice, check_evaluation_mode, require_lens_model
from sat_lens.attention import (
    AttentionCall,
    Limit,
    Scale,
    StraightThrough,
    Transform,
    Uniform,
)
from sat_lens.attention.transforms import Ties, check_ties
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.intervention.attach import BlockState, attach_edits, refusing_attention_not_probed
from sat_lens.intervention.edits import (
    Edit,
    Observation,
    TransformEdit,
    TransformOfHeads,
    put,
    put_back,
    transform_for,
)
from sat_lens.sites import (
    AttentionSite,
    Heads,
    ScaleLike,
    ScaleOfHead,
    attention_sites,
    select_heads,
    select_with_scales,
)
from sat_lens.sites.discovery import eager_attention

Arguments = ParamSpec("Arguments")


class _Managed(contextlib.ContextDecorator):
    """A context manager that warns when it is dropped without having been used."""

    _used = True

    def __init__(
        self, name: str, make: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        self._name, self._make = name, make
        self._running = [make()]  # now, so that wrong arguments are found at once
        self._used = False

    def _recreate_cm(self) -> _Managed:
        self._used = True
        return _Managed(self._name, self._make)

    def __enter__(self) -> Any:
        if self._used:
            self._running.append(self._make())
        self._used = True
        return self._running[-1].__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._running.pop().__exit__(*error)

    def __del__(self) -> None:
        if not self._used:
            warnings.warn(
                f"sat_lens.{self._name}(...) was called and its block never entered, so nothing "
                f"was changed. Use it so: with sat_lens.{self._name}(...): model(tokens)",
                stacklevel=2,
            )


def _managed(
    function: Callable[Arguments, Iterator[Any]],
) -> Callable[Arguments, contextlib.AbstractContextManager[Any]]:
    """Make a context manager of a generator, as contextlib does, that notices if it is not used."""
    make = contextlib.contextmanager(function)

    @functools.wraps(function)
    def manager(*args: Any, **kwargs: Any) -> _Managed:
        return _Managed(function.__name__, lambda: make(*args, **kwargs))

    return cast("Callable[Arguments, contextlib.AbstractContextManager[Any]]", manager)


@_managed
def saturate(
    model: Any,
    heads: Heads = None,
    scale: ScaleLike = math.inf,
    ties: Ties = "exact",
    *,
    gradient: Literal["straight-through"] | None = None,
    surrogate_scale: float = 1.0,
) -> Iterator[Any]:
    """Multiply the QK logits of chosen heads by an inverse temperature while the block lasts.

    At the default, infinity, attention is saturated: uniform over the keys that attain the row's
    maximum (Merrill et al. 2021, section 3).

    Args:
        model: A TransformerLens model (``TransformerBridge``, ``HookedTransformer`` and its like),
            or a plain Hugging Face model. The latter keeps its fused attention where that can be
            taken to the limit exactly, and runs eager attention while the block lasts elsewhere.
        heads: Which heads; None is all. A head is ``"L5H1"`` or ``(5, 1)``, a layer ``"L5"``,
            several ``"L5-L8"``; also a list of these, a bool tensor ``[layer, head]``, or a
            predicate on (layer, head). With several stacks names take a prefix, ``"encoder.L2"``,
            and predicates get (stack, layer, head).
        scale: The inverse temperature c >= 0: a number, a tensor ``[layer, head]``, a mapping from
            heads to numbers, or a callable ``(layer, head) -> c``, a schedule through the forward
            pass. ``math.inf`` is the exact limit, 0 uniform over the visible keys. A tensor that
            requires a gradient gets one; its entries must be finite.
        ties: Which keys share a row in the limit: ``"exact"``, a number d >= 0 (keys within d of
            the maximum), or ``"nearest"`` (the saturated row nearest to the soft row). Others than
            exact ones need a head whose scale is infinite.
        gradient: None leaves heads in a limit without a gradient of their scores, which is what
            they have. ``"straight-through"`` gives them that of the softmax, so that a model can be
            trained while it is hard; no number of the forward pass changes.
        surrogate_scale: The inverse temperature of that softmax.

    Yields:
        The model.

    Raises:
        HeadSelectionError: A head does not exist, or none is selected.
        ArgumentError: A scale is negative or NaN, or ``ties`` is unknown, or there is no limit that
            it, or a straight-through gradient, could apply to.
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
    _check_ties_apply(scales, ties)
    transforms = {path: _by_scale(chosen, ties) for path, chosen in scales.items()}
    if isinstance(scale, Tensor) and scale.requires_grad:
        transforms = _with_gradients(sites, scales, scale)
    if gradient is not None:
        check_choice("gradient", gradient, ("straight-through",))
        transforms = _straight_through(transforms, surrogate_scale)
    with attach_transforms(model, sites, transforms) as block:
        yield model
        _warn_if_nothing_ran(block, "saturate")


@_managed
def replace_attention(model: Any, transform: Transform, heads: Heads = None) -> Iterator[Any]:
    """Put the scores of chosen heads through a transform while the block lasts.

    Args:
        model: A TransformerLens model or a plain Hugging Face model, which runs eager attention
            while the block lasts where its fused attention cannot do the same.
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
        hint = " Pass an instance of it." if isinstance(transform, type) else ""
        raise ArgumentError(
            f"A transform is a function from scores to scores, and {transform!r} was given.{hint}"
        )
    sites = attention_sites(model)
    selection = select_heads(sites, heads)
    transforms: dict[str, TransformOfHeads]
    transforms = {path: [(chosen, transform)] for path, chosen in selection.items()}
    with attach_transforms(model, sites, transforms) as block:
        yield model
        _warn_if_nothing_ran(block, "replace_attention")


def saturation_hooks(
    model: Any, heads: Heads = None, scale: ScaleLike = math.inf, ties: Ties = "exact"
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Return the same intervention as hooks for TransformerLens's ``run_with_hooks``.

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
    scales = select_with_scales(sites, heads, scale)
    _check_ties_apply(scales, ties)
    hooks, shared = [], _Hooks()
    for path, chosen in scales.items():
        site = _site_at(sites, path)
        _check_reachable(site)
        edit = TransformEdit.at(site, _by_scale(chosen, ties))
        if site.level == "scores":
            hooks.append((f"{path}.hook_attn_scores", _scores_hook(edit, shared)))
        elif site.pattern_is_true and min(chosen.values()) >= 1:
            hooks.append((f"{path}.hook_pattern", _pattern_hook(edit, shared)))
        else:
            raise UnsupportedModelError(
                f"{path} cannot be saturated through a TransformerLens hook"
                + (" at a scale below 1" if site.pattern_is_true else "")
                + ": its scores' hook does not carry what its softmax receives. "
                "Use `with sat_lens.saturate(model): ...`."
            )
    shared.called = False
    return hooks


class _Hooks:
    """What the hooks of one call of :func:`saturation_hooks` share: whether one was called."""

    called = True  # until somebody has them

    def __del__(self) -> None:
        if not self.called:
            warnings.warn(
                "Hooks of sat_lens.saturation_hooks were made and never called, so nothing was "
                "changed. Pass them on: model.run_with_hooks(tokens, fwd_hooks=hooks).",
                stacklevel=2,
            )


def _scores_hook(edit: Edit, hooks: _Hooks) -> Callable[..., Tensor]:
    def hook_fn(scores: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001 - TransformerLens names it
        hooks.called = True
        new = edit(scores)
        return scores if new is None else put_back(scores, new)

    return hook_fn


def _pattern_hook(edit: Edit, hooks: _Hooks) -> Callable[..., Tensor]:
    # The logarithm of a pattern is its scores up to a constant per row, and neither an inverse
    # temperature nor a tie depends on that constant. Keys whose probability underflowed to 0 stay
    # at 0, which is right for inverse temperatures of 1 and more.
    def hook_fn(pattern: Tensor, hook: Any = None) -> Tensor:  # noqa: ARG001 - TransformerLens names it
        hooks.called = True
        if torch.finfo(pattern.dtype).bits < 32:
            raise UnsupportedModelError(
                f"A hook on patterns needs float32, and this pattern is in {pattern.dtype}: its "
                "rounding makes ties that the scores do not have. Use "
                "`with sat_lens.saturate(model): ...`, which reaches the scores."
            )
        new = edit(_logarithm(pattern))
        if new is None:
            return pattern
        # A row of zeros has no visible key and stays one.
        empty = new.scores.amax(-1, keepdim=True) == -math.inf
        rows = new.scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        return put(pattern, new.heads, rows.to(pattern.dtype))

    return hook_fn


def _logarithm(pattern: Tensor) -> Tensor:
    """Take the logarithm, -inf at 0, with a gradient that is finite there."""
    zero = pattern == 0
    return pattern.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


@contextlib.contextmanager
def attach_transforms(
    model: Any, sites: list[AttentionSite], transforms: Mapping[str, TransformOfHeads]
) -> Iterator[BlockState]:
    """Attach transforms to groups of heads, by the path of their site, for the length of the block.

    Where a fused kernel cannot serve, the model runs eager attention for the length of the block.
    """
    chosen = {path: _site_at(sites, path) for path in transforms}
    for site in chosen.values():
        _check_reachable(site)
    edits = {path: TransformEdit.at(site, transforms[path]) for path, site in chosen.items()}
    reasons = [edit.why_not_fused(chosen[path]) for path, edit in edits.items()]
    why = next(filter(None, reasons), "")
    with contextlib.ExitStack() as stack:
        if why:
            sites = stack.enter_context(eager_attention(model, why))
        if all(site.path in edits for site in sites):
            stack.enter_context(refusing_attention_not_probed(model))
        yield stack.enter_context(attach_edits(model, sites, edits))


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
        edits = {site.path: Observation(site, observer, of_calls) for site in sites}
        stack.enter_context(refusing_attention_not_probed(model))
        stack.enter_context(attach_edits(model, sites, edits))
        yield


def _by_scale(scale_of_head: Mapping[int, float], ties: Ties) -> TransformOfHeads:
    heads_of: dict[float, list[int]] = {}
    for head, c in scale_of_head.items():
        heads_of.setdefault(c, []).append(head)
    return [(heads, transform_for(c, ties)) for c, heads in heads_of.items()]


def _straight_through(
    transforms: Mapping[str, TransformOfHeads], surrogate_scale: float
) -> dict[str, TransformOfHeads]:
    hard = (Limit, Uniform)
    if not any(isinstance(new, hard) for groups in transforms.values() for _, new in groups):
        raise ArgumentError(
            'gradient="straight-through" is for heads in a limit, and every scale is finite and '
            "above 0, where patterns have gradients of their own. Leave it out, or use "
            "scale=math.inf."
        )
    return {
        path: [
            (heads, StraightThrough(new, surrogate_scale) if isinstance(new, hard) else new)
            for heads, new in groups
        ]
        for path, groups in transforms.items()
    }


def _with_gradients(
    sites: list[AttentionSite], scales: ScaleOfHead, c: Tensor
) -> dict[str, TransformOfHeads]:
    transforms: dict[str, TransformOfHeads] = {}
    for path, chosen in scales.items():
        own = c if c.dim() == 0 else c[_site_at(sites, path).layer, list(chosen)]
        transforms[path] = [(list(chosen), Scale(own.expand(len(chosen))))]
    return transforms


def _check_ties_apply(scales: Mapping[str, Mapping[int, float]], ties: Ties) -> None:
    limits = [c for chosen in scales.values() for c in chosen.values() if c == math.inf]
    if ties != "exact" and not limits:
        raise ArgumentError(
            f"ties={ties!r} says which keys share a row in the limit, and every scale here is "
            "finite. Leave ties out, or choose scale=math.inf for some head."
        )


def _warn_if_nothing_ran(block: BlockState, name: str) -> None:
    if not block.ran:
        warnings.warn(
            f"No chosen head ran inside the block of sat_lens.{name}, so nothing was changed. Run "
            "the model inside the block, as far as the layers of the chosen heads.",
            stacklevel=5,
        )


def _site_at(sites: list[AttentionSite], path: str) -> AttentionSite:
    return next(site for site in sites if site.path == path)


def _check_reachable(site: AttentionSite) -> None:
    if site.level is None:
        raise UnsupportedModelError(
            f"The attention of {site.path} cannot be reached: {site.why_not}."
        )
    check_evaluation_mode([site])
