"""The attention modules of a model, found once and remembered while the model lives."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.sites.naming import AttentionSite
from sat_lens.sites.plain import is_plain, probe_plain
from sat_lens.sites.probe import probe, probe_failure, probe_inputs

_PATTERN = ".hook_pattern"


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What one look at a model found, and the state that the model was in."""

    state: object
    sites: list[AttentionSite]
    idle: list[str]


_remembered: WeakKeyDictionary[Any, _Survey] = WeakKeyDictionary()


def attention_sites(model: Any, *inputs: Any, **kwargs: Any) -> list[AttentionSite]:
    """List the attention modules of a model and how each can be touched.

    The level of each is found by one forward pass, on ``inputs`` where given and on a few made-up
    tokens otherwise; the result is remembered while the model lives and its mode stays the same.
    Made-up tokens do not run a tower for images or sound; inputs that do list it as well:
    ``attention_sites(model, tokens, pixel_values=images)``. Where all heads are chosen, a part that
    computes attention without having been looked at is an error.

    Args:
        model: A ``TransformerBridge``, a ``HookedTransformer`` and its like, or a plain Hugging
            Face model, whose fused attention is the level ``kernel``.
        *inputs: Example inputs of the model, for one that made-up inputs do not fit.
        **kwargs: Further arguments of the model's own forward.

    Returns:
        One :class:`AttentionSite` per attention module, in the model's order.

    Raises:
        UnsupportedModelError: The model has no softmax attention, or no forward pass worked.
        ArgumentError: ``model`` is neither of these.

    Example:
        >>> import sat_lens as sl
        >>> [site.level for site in sl.attention_sites(sl.load_model("demo"))]
        ['scores', 'scores', 'scores', 'scores']
    """
    paths = None if is_plain(model) else _attention_paths(model)
    state = _state(model)
    if not inputs and not kwargs:
        known = _remembered.get(model)
        if known is not None and known.state == state:
            return list(known.sites)
    sites, idle = _probe(model, paths, inputs, kwargs)
    if not sites:
        raise UnsupportedModelError(
            f"Needed a model with softmax attention, and none ran in {type(model).__name__} "
            f"{_name(model)!r}. State-space and linear-attention models (Mamba, RWKV) have nothing "
            "that can be saturated."
        )
    _remembered[model] = _Survey(state, sites, idle)
    return list(sites)


def parts_not_seen(model: Any) -> list[str]:
    """Name the parts of the model, with weights, that did not run when it was last looked at."""
    known = _remembered.get(model)
    return [] if known is None else list(known.idle)


def has_several_stacks(sites: list[AttentionSite]) -> bool:
    """Say whether results must be told apart by stack (encoder, decoder, cross)."""
    return len({site.stack for site in sites}) > 1


def _attention_paths(model: Any) -> list[str]:
    hook_points = getattr(model, "hook_dict", None)
    if hook_points is None:
        raise ArgumentError(
            f"Needed a TransformerLens model (a TransformerBridge or a HookedTransformer) or a "
            f"Hugging Face model, and a {type(model).__name__} was given."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"A {type(model).__name__} runs its model in another process or on another machine, "
            "where no hook of ours can change attention. Load the model here: "
            "TransformerBridge.boot_transformers(name)."
        )
    by_point: dict[int, str] = {}
    for name, point in hook_points.items():
        if name.endswith(_PATTERN):
            path = name.removesuffix(_PATTERN)
            with contextlib.suppress(AttributeError):
                if model.get_submodule(path) is not None:
                    by_point.setdefault(id(point), path)
    return list(by_point.values())


def _probe(
    model: Any, paths: list[str] | None, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[AttentionSite], list[str]]:
    def look(args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[list[AttentionSite], list[str]]:
        if paths is None:
            return probe_plain(model, args, extra)
        return probe(model, paths, args, extra)

    if inputs or kwargs:
        return look(inputs, kwargs)
    tried: list[Exception] = []
    for args, extra in probe_inputs(model):
        try:
            return look(args, extra)
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure only means that the input did not fit
            tried.append(error)
    raise probe_failure(tried)


def _state(model: Any) -> object:
    config = getattr(getattr(model, "original_model", model), "config", None)
    return (
        # Parts can be in training mode while the whole is not.
        Counter(module.training for module in model.modules())[True],
        getattr(model, "compatibility_mode", None),
        getattr(config, "_attn_implementation", None),
        Counter(name.endswith(_PATTERN) for name in getattr(model, "hook_dict", ()))[True],
    )


def _name(model: Any) -> str:
    return str(getattr(getattr(model, "cfg", None), "model_name", "") or "")
