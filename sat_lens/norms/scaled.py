"""Parameters multiplied by a factor while a block runs: the paper's own road to saturation.

Multiplying all parameters by c is not attention-only saturation (:func:`sat_lens.saturate`).
Scores grow with c squared, but so do, at degrees of their own, biases, the gains of layer norms and
the MLPs; the residual stream is drowned by what is added to it, and what comes out has little in
common with the model at c = 1 long before attention is saturated. On a pretrained sentence encoder
the cosine to the model was .19 at c = 1.5 and .01 at c = 2, while under attention-only saturation
it was .66 (control: random keys, .10). Read it as a statement about the paper's construction, and
ask for attention alone, ``which="qk"`` or :func:`sat_lens.saturate`, for one about attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from sat_lens.errors import ArgumentError
from sat_lens.norms.heads import joint_rows
from sat_lens.norms.naming import ParameterPlace, canonical_name, parameter_places, superseded
from sat_lens.norms.sources import config_of

Which = Literal["all", "attention", "qk", "matrices"]
Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def scaled_parameters(model: Model, c: float, which: Which = "all") -> Iterator[Model]:
    """Multiply parameters by c while the block lasts (Merrill et al. 2021, section 4).

    Afterwards the parameters hold the very bits that they held before, also if an exception or an
    interrupt ends the block; tied parameters are multiplied once. The copies that this takes are as
    large as the parameters.

    This is not attention-only saturation: biases, gains and MLPs grow as well, and the output soon
    has little to do with the model's; see the module's own text. With ``which="qk"`` scores are
    multiplied by c squared and nothing else changes, where queries and keys have no norms of
    their own.

    Args:
        model: A TransformerLens model or any other module.
        c: The factor, finite.
        which: ``"all"`` parameters; those of ``"attention"``; ``"qk"``, the queries' and keys'
            projections with their biases; or ``"matrices"``, all but biases and gains.

    Yields:
        The model.

    Raises:
        ArgumentError: ``c`` is not finite, ``which`` is unknown, or the model has no such
            parameters.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> with scaled_parameters(layer, 10.0):
        ...     large = layer.weight.norm()
        >>> round((large / layer.weight.norm()).item(), 4)
        10.0
    """
    if not math.isfinite(c):
        raise ArgumentError(f"c must be a finite number; found {c}.")
    chosen = _chosen(model, which)
    saved = [part.read().clone() for part in chosen]
    try:
        for part, copy in zip(chosen, saved, strict=True):
            part.write(copy * c)
        yield model
    finally:
        for part, copy in zip(chosen, saved, strict=True):
            part.write(copy)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter, or some rows of one."""

    tensor: Tensor
    rows: Tensor | None = None

    def read(self) -> Tensor:
        return self.tensor if self.rows is None else self.tensor[self.rows]

    def write(self, values: Tensor) -> None:
        with torch.no_grad():
            if self.rows is None:
                self.tensor.copy_(values)
            else:
                self.tensor.index_copy_(0, self.rows, values)


def _chosen(model: nn.Module, which: Which) -> list[_Part]:
    if which not in get_args(Which):
        raise ArgumentError(f"which is one of {', '.join(get_args(Which))}; found {which!r}.")
    named = {
        canonical_name(name): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel()
    }
    places = parameter_places(named)
    whole = [p for name, p in named.items() if _is_meant(places[name], p, which)]
    chosen = [_Part(parameter) for parameter in _without_overlap(whole)]
    if which == "qk":
        chosen += _joint_parts(named, places, config_of(model))
    if not chosen:
        raise ArgumentError(
            f"{type(model).__name__} has no parameters of the kind {which!r}: none of its names "
            "says so. Use which='all', or 'matrices'."
        )
    return chosen


def _joint_parts(
    named: Mapping[str, Tensor], places: Mapping[str, ParameterPlace], config: Mapping[str, Any]
) -> Iterator[_Part]:
    """Give the queries' and keys' rows of joint projections that are not split already."""
    split = superseded(named)
    for name, place in places.items():
        joint = None if name in split else joint_rows(place, named[name].shape, config)
        if joint is not None:
            transposed, rows = joint
            tensor = named[name].T if transposed else named[name]
            yield _Part(tensor, torch.cat([rows["q"], rows["k"]]).to(tensor.device))


def _is_meant(place: ParameterPlace, parameter: Tensor, which: Which) -> bool:
    if which == "matrices":
        return parameter.dim() >= 2 and not place.bias and place.component != "layer norm"
    if which == "attention":
        return bool(place.attention)
    return which == "all" or place.component == "qk"


def _without_overlap(parameters: list[Tensor]) -> list[Tensor]:
    """Keep each stretch of memory once: a bridge splits joint projections into views of them."""
    kept: list[Tensor] = []
    taken: dict[int, list[tuple[int, int]]] = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        known = taken.setdefault(parameter.untyped_storage().data_ptr(), [])
        start = int(parameter.storage_offset())
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        end = start + sum((size - 1) * stride for size, stride in sides)
        if not any(low <= start and end <= high for low, high in known):
            known.append((start, int(end)))
            kept.append(parameter)
    return kept
