"""The parameters of a model, a checkpoint directory or a file, by name, each counted once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.errors import ArgumentError, FileFormatError, ModelError
from sat_lens.norms.files import Lazy, config_beside, identity, open_tensors, tensors_of_state
from sat_lens.norms.naming import canonical_name, parameter_places, superseded

logger = logging.getLogger(__name__)

# What state dicts hold beside parameters: tables, masks, statistics, constants.
_TABLES = (
    *("inv_freq", "rotary_sin", "rotary_cos", ".mask", ".masked_bias", ".IGNORE"),
    *("running_mean", "running_var", "final_logits_bias", "act_fn.beta", "act_fn.eps"),
    ".layer_scalar",
)


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of one model, each counted once.

    Attributes:
        name: What to call it in messages.
        shapes: Shape of each parameter, by its name without wrappers.
        read: Gives one parameter by that name.
        config: The model's settings as far as known: number of heads and the like.
        integers: Names of parameters of whole numbers, as quantised weights are, which have no
            norm and stand in none of the above.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    config: Mapping[str, Any]
    integers: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The number of elements of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def without(self, names: set[str]) -> Parameters:
        """Leave some parameters out."""
        kept = {name: shape for name, shape in self.shapes.items() if name not in names}
        return dataclasses.replace(self, shapes=kept)


@contextlib.contextmanager
def open_parameters(source: Any, name: str = "") -> Iterator[Parameters]:
    """Open a model, a checkpoint directory or a file of weights.

    Raises:
        FileFormatError: The file is missing, broken, no checkpoint, or would have to run code.
        ModelError: The model has no parameters, or none that have values.
        ArgumentError: The source is none of these.
    """
    if isinstance(source, nn.Module):
        yield dataclasses.replace(module_parameters(source), name=name or type(source).__name__)
        return
    if not isinstance(source, (str, Path)):
        raise ArgumentError(
            "A checkpoint is a directory, a file of weights or a model in memory; found "
            f"{type(source).__name__}."
        )
    path = Path(source)
    with contextlib.ExitStack() as stack:
        yield _from_lazy(name or str(path), open_tensors(path, stack), config_beside(path))


def module_parameters(model: nn.Module) -> Parameters:
    """Give the parameters of a model in memory; tied ones once.

    Example:
        >>> module_parameters(torch.nn.Linear(2, 3)).shapes
        {'weight': (3, 2), 'bias': (3,)}
    """
    found: dict[str, Tensor] = {}
    integers: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    _check_unsharded(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} has no values (it is on the meta device). Load the weights.")
        tensor = parameter.detach()
        if identity(tensor) in seen or not tensor.numel():
            continue
        seen.add(identity(tensor))
        if tensor.is_floating_point():
            found[canonical_name(name)] = tensor
        else:
            integers.append(canonical_name(name))
    kind = type(model).__name__
    if not found:
        what = "only integer (quantised) parameters" if integers else "no parameters"
        raise ModelError(f"{kind} has {what}, so there is no norm to take.")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    parameters = Parameters(
        kind, shapes, found.__getitem__, config_of(model), integers=tuple(integers)
    )
    return parameters.without(superseded(shapes))


def named_as_in_files(model: nn.Module, own: Parameters, names: Set[str]) -> Parameters:
    """Give a model's parameters under the names that its files use.

    A file's names are those of the model, or of its state dict (a TransformerBridge changes them
    there), or what transformers turns those into when it saves.
    """
    if own.shapes.keys() == names:
        return own
    states = [model.state_dict()]
    if hasattr(model, "save_pretrained"):
        # Older versions save what the state dict says.
        with contextlib.suppress(ImportError):
            from transformers.core_model_loading import revert_weight_conversion

            states.append(revert_weight_conversion(model, states[0]))
    known = [
        own,
        *(_from_lazy(own.name, tensors_of_state(state), dict(own.config)) for state in states),
    ]
    found = max(known, key=lambda parameters: len(parameters.shapes.keys() & names))
    if found.size < own.size:
        logger.warning(
            "The files leave out %d of the %d parameters of %s, as TransformerLens's state dict "
            "does with some models; norms are of the others.",
            own.size - found.size,
            own.size,
            own.name,
        )
    return found


def _check_unsharded(model: nn.Module) -> None:
    split = [
        n for n, p in model.named_parameters() if hasattr(p, "placements") or hasattr(p, "ds_id")
    ]
    wrapped = [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    if split or wrapped:
        what = split[0] if split else "The model"
        raise ModelError(
            f"{what} is split over several processes (FSDP, DeepSpeed or tensor parallelism), and "
            "one of them does not see all weights. Follow such a run by its checkpoints: "
            "sat_lens.norm_growth(folder)."
        )


def config_of(model: Any) -> dict[str, Any]:
    """Give a model's settings as a dict: Hugging Face's where there are any, else its own."""
    wrapped = getattr(model, "original_model", None)
    configs: list[Any] = [getattr(wrapped, "config", None), getattr(model, "config", None)]
    for config in configs:
        if isinstance(config, Mapping):
            return dict(config)
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
    plain = next((c for c in (*configs, getattr(model, "cfg", None)) if c is not None), None)
    return dict(getattr(plain, "__dict__", {}))


def tied_names(parameters: Parameters) -> set[str]:
    """Name the output heads of a file that repeat an embedding bit for bit."""
    places = parameter_places(parameters.shapes)
    by_component: dict[str, list[str]] = {}
    for name, shape in parameters.shapes.items():
        if len(shape) == 2:
            by_component.setdefault(places[name].component, []).append(name)
    return {
        head
        for head in by_component.get("unembedding", [])
        for embedding in by_component.get("embedding", [])
        if parameters.shapes[head] == parameters.shapes[embedding]
        and torch.equal(parameters.read(head), parameters.read(embedding))
    }


def _from_lazy(name: str, tensors: Mapping[str, Lazy], config: dict[str, Any]) -> Parameters:
    named = {canonical_name(key): lazy for key, lazy in tensors.items()}
    kept = {key: lazy for key, lazy in named.items() if not _is_table(key, lazy.shape)}
    if not kept:
        raise FileFormatError(f"{name} holds no weights.")
    shapes = {key: lazy.shape for key, lazy in kept.items()}
    parameters = Parameters(name, shapes, lambda key: kept[key].read(), config)
    return parameters.without(superseded(shapes))


def _is_table(name: str, shape: tuple[int, ...]) -> bool:
    # GPT-2 and its kin kept their causal mask under the name of a bias.
    is_mask = name.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1)
    return is_mask or 0 in shape or name.endswith(_TABLES)
