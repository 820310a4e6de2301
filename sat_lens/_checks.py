"""Checks of arguments that several rooms share: counts, numbers, choices, and what a model is.

Each message says what was needed and what was found, and where it helps, what to do.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeGuard

import torch
from torch import nn

from sat_lens.errors import ArgumentError, UnsupportedModelError


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number; bools do not count."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; bools do not count."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_count(value: object, at_least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer of at least 1 (or another bound).

    Example:
        >>> from sat_lens._checks import is_count
        >>> is_count(1), is_count(0), is_count(2.0), is_count(True)
        (True, False, False, False)
    """
    return is_integer(value) and bool(value >= at_least)


def check_count(
    name: str, value: object, at_least: int = 1, error: type[ArgumentError] = ArgumentError
) -> None:
    """Raise an ArgumentError unless a value is an integer of at least 1 (or another bound)."""
    if not is_count(value, at_least):
        raise error(f"{name} must be a whole number of at least {at_least}; found {shown(value)}.")


def check_number(
    name: str, value: object, at_least: float = -math.inf, at_most: float = math.inf
) -> None:
    """Raise an ArgumentError unless a value is a finite number within bounds."""
    if is_number(value) and math.isfinite(value) and at_least <= value <= at_most:
        return
    if at_most < math.inf:
        needed = f"lie in [{at_least:g}, {at_most:g}]"
    else:
        needed = "be a finite number" + (
            f" of at least {at_least:g}" if at_least > -math.inf else ""
        )
    raise ArgumentError(f"{name} must {needed}; found {shown(value)}.")


def check_share(name: str, value: object) -> None:
    """Raise an ArgumentError unless a value is a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise ArgumentError(f"{name} must be a share in (0, 1]; found {shown(value)}.")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise an ArgumentError unless an argument is one of the known values."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ArgumentError(f"{name} must be one of {listed}; found {shown(value)}.")


def check_module(model: object) -> None:
    """Raise an ArgumentError unless a model is a ``torch.nn.Module``, and not its name, say."""
    if isinstance(model, nn.Module):
        return
    hint = " Load it first: sat_lens.load_model(name)." if isinstance(model, str) else ""
    raise ArgumentError(
        f"Needed a model, a torch.nn.Module; found {shown(model)} ({type(model).__name__}).{hint}"
    )


def is_lens_model(model: object) -> bool:
    """Whether TransformerLens wraps a model, so that it has hook points."""
    return hasattr(model, "hook_dict")


def is_plain(model: object) -> bool:
    """Whether this is a Hugging Face model that TransformerLens has not wrapped."""
    return (
        isinstance(model, nn.Module)
        and hasattr(getattr(model, "config", None), "_attn_implementation")
        and not is_lens_model(model)
    )


def inner_model_hint(model: object) -> str:
    """Return a sentence that names the model inside of a wrapper; empty if there is none."""
    held = model._modules if isinstance(model, nn.Module) else getattr(model, "__dict__", {})
    for name, part in held.items():
        if is_lens_model(part) or is_plain(part):
            return (
                f" It holds the model as its .{name}: pass that. Running the wrapper runs it, too."
            )
    return ""


def require_lens_model(model: object, what: str) -> None:
    """Raise an UnsupportedModelError unless TransformerLens wraps the model, as ``what`` needs."""
    if not is_lens_model(model):
        raise UnsupportedModelError(
            f"{what} needs a TransformerLens model (a TransformerBridge or a HookedTransformer); "
            f"found {type(model).__name__}. A Hugging Face model becomes one with "
            "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)."
            + inner_model_hint(model)
        )


def check_evaluation_mode(sites: Iterable[Any]) -> None:
    """Raise an UnsupportedModelError if dropout was active when attention sites were found.

    Dropout is seen when the model is run for its sites, because many models call it as a function
    and not as a module that could be looked for.
    """
    if any(site.dropout for site in sites):
        raise UnsupportedModelError(
            "The model is in training mode and drops out entries at random, so no two runs of it "
            "agree, saturated or not. Call model.eval() first."
        )


@contextlib.contextmanager
def gradients_for(what: str) -> Iterator[None]:
    """Turn gradients on for ``what`` needs them.

    Raises:
        ArgumentError: Inference mode is on, which keeps none.
    """
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"{what} needs gradients, and torch.inference_mode() keeps none. Use torch.no_grad() "
            "in its place: gradients are turned on where they are needed."
        )
    with torch.enable_grad():
        yield


def shown(value: object) -> str:
    """Return the name of a function, or the ``repr`` of another value, cut to a readable length."""
    text = value.__name__ if isinstance(value, types.FunctionType) else repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
