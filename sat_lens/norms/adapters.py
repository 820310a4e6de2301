"""Adapters, such as LoRA's: what the layers that they adapt amount to, as after merging.

Adapters are known by the names that PEFT gives their modules, and not by its classes, which need
not be installed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.errors import ModelError

# A parameter's name, the memory that it is read from, and how.
Named = tuple[str, Tensor, Callable[[], Tensor]]

_BASE, _COPIES = "base_layer", "modules_to_save"
_WRAPPED = re.compile(rf"\.({_BASE}|original_module|{_COPIES}\.[^.]+)(?=\.)")
# An update is the product of two factors, B A.
_A = re.compile(r"\.lora_(embedding_)?A\b")
_B = re.compile(r"\.lora_(embedding_)?B\b.*?(?P<kind>weight|bias)?$")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers that adapters change, with their paths."""
    found: list[str] = []
    for path, module in model.named_modules():
        # Not hasattr: TransformerLens's components answer for what they wrap. An adapter may adapt
        # what another one adapts.
        is_adapted = not {_BASE, _COPIES}.isdisjoint(module._modules)
        if is_adapted and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
            yield path, module


def as_merged(model: nn.Module) -> Iterator[Named]:
    """Yield the parameters of a model as they would be after merging the active adapters."""
    adapted = {id(p): layer for _, layer in adapted_layers(model) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        layer = adapted.get(id(parameter))
        if layer is None:
            yield name, parameter, parameter.detach
            continue
        for own, base in _base_of(layer).named_parameters():
            if base is parameter:
                yield name_after_merging(name), parameter, partial(_merged, layer, own)


def name_after_merging(name: str) -> str:
    """Return the name of a parameter, or of the one that an update is added to, after merging."""
    factor = _B.search(name)
    if factor:
        name = f"{name[: factor.start()]}.{factor['kind'] or 'weight'}"
    return _WRAPPED.sub("", name)


def is_first_factor(name: str) -> bool:
    """Whether a parameter is the A of an update B A."""
    return _A.search(name) is not None


def check_linear(model: nn.Module) -> None:
    """Raise a ModelError for active adapters whose update is no product B A."""
    for path, layer in adapted_layers(model):
        for name, _ in layer.named_parameters(prefix=path):
            known = any(part.search(name) for part in (_WRAPPED, _A, _B))
            if not known and not _is_disabled(layer):
                raise ModelError(
                    f"{path} has an adapter that is no plain LoRA ({name}) and cannot be scaled "
                    "with it. Merge the adapters first: model.merge_and_unload()."
                )


def _base_of(layer: Any) -> nn.Module:
    """Return the layer that adapters change, or the copy of it that is trained in its place."""
    if _BASE in layer._modules:
        base: nn.Module = layer.base_layer
        return _base_of(base) if _BASE in base._modules else base
    active = [] if _is_disabled(layer) else layer.active_adapters
    chosen = next((name for name in active if name in layer.modules_to_save), None)
    found: nn.Module = layer.modules_to_save[chosen] if chosen else layer.original_module
    return found


def _is_disabled(layer: Any) -> bool:
    return bool(getattr(layer, "disable_adapters", False))


def merged_layer(layer: Any) -> nn.Module:
    """Return the layer that an adapted layer amounts to: a copy with the active adapters merged."""
    layer = copy.deepcopy(layer).eval()
    if _BASE not in layer._modules:
        return _base_of(layer)
    if not hasattr(layer, "merge"):
        _merge_by_running(layer)
    elif _is_disabled(layer) and layer.merged:
        layer.unmerge()
    elif not _is_disabled(layer) and not layer.merged:
        layer.merge()
    return _base_of(layer)


def _merged(layer: Any, name: str) -> Tensor:
    return merged_layer(layer).get_parameter(name).detach()


def _merge_by_running(layer: Any) -> None:
    """Read a linear layer's parameters off what it makes of zero and of the basis vectors."""
    base = _base_of(layer)
    weight, bias = base.get_parameter("weight"), base._parameters.get("bias")
    kept, is_linear = weight.dtype, isinstance(base, nn.Linear)
    # GPT-2's Conv1D keeps its matrix as [in, out].
    rows = torch.eye(weight.shape[int(is_linear)], dtype=torch.float64, device=weight.device)
    with torch.no_grad():
        outputs = layer.double()(torch.cat([torch.zeros_like(rows[:1]), rows]))
    matrix = outputs[1:] - outputs[0]
    weight.data = (matrix.mT if is_linear else matrix).to(kept)
    if bias is not None:
        bias.data = outputs[0].to(kept)
