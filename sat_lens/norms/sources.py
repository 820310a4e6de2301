"""The parameters of a model, a checkpoint directory or a file, by name, each counted once.

Files are read one tensor at a time, and reading one never runs code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sat_lens.errors import FileFormatError, ModelError
from sat_lens.norms.adapters import (
    Named,
    adapted_layers,
    as_merged,
    is_first_factor,
    name_after_merging,
)
from sat_lens.norms.names import (
    ParameterPlace,
    canonical_name,
    is_inner_norm,
    parameter_places,
    superseded,
)

_log = logging.getLogger(__name__)

STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# Under which keys a training script's file may keep its state dict.
_NESTED = ("state_dict", "model_state_dict", "model")
# What state dicts hold beside parameters: tables, masks, statistics, constants.
_TABLES = (
    *("inv_freq", "rotary_sin", "rotary_cos", ".mask", ".masked_bias", ".IGNORE"),
    *("running_mean", "running_var", "final_logits_bias", "act_fn.beta", "act_fn.eps"),
    ".layer_scalar",
)
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    # The memory that it is read from, or most of it; None for a file.
    memory: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of one model, each counted once.

    Attributes:
        name: What to call it in messages.
        tensors: Its floating-point parameters, by canonical name.
        config: The model's settings, as in a Hugging Face ``config.json``; may be empty.
        integers: Names of integer parameters, such as quantised weights, which have no norm.
        adapted: Paths of the layers whose parameters are those after merging their adapters.
    """

    name: str
    tensors: Mapping[str, Lazy]
    config: Mapping[str, Any]
    integers: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """Read one of them."""
        return self.tensors[name].read()

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @functools.cached_property
    def places(self) -> dict[str, ParameterPlace]:
        """Where each belongs, by name."""
        return parameter_places(self.tensors)

    @property
    def size(self) -> int:
        """The number of elements of all of them."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def normed(self, model: nn.Module | None, of: str = "qkv") -> list[str]:
        """Return the norms inside attention; the model shows those that have no parameters."""
        paths = () if model is None else (path for path, _ in model.named_modules())
        names = [*self.tensors, *map(canonical_name, paths)]
        return [name for name in names if is_inner_norm(name, of)]

    def without(self, names: Set[str]) -> Parameters:
        """Leave some of them out."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return dataclasses.replace(self, tensors=kept)


@contextlib.contextmanager
def open_parameters(source: Path | nn.Module, name: str = "") -> Iterator[Parameters]:
    """Open a model, a checkpoint directory or a file of weights."""
    if isinstance(source, nn.Module):
        yield dataclasses.replace(module_parameters(source), name=name or type(source).__name__)
        return
    with contextlib.ExitStack() as stack:
        tensors = _directory(source, stack) if source.is_dir() else _file(source, stack)
        yield _without_tables(name or str(source), tensors, _config_beside(source))


def module_parameters(model: nn.Module) -> Parameters:
    """Return the parameters of a model in memory, tied ones once and adapters merged."""
    _check_unsharded(model)
    named = [
        (canonical_name(name), parameter, read)
        for name, parameter, read in as_merged(model)
        if parameter.numel()
    ]
    for name, parameter, _ in named:
        check_has_values(name, parameter)
    tensors = _floating(named)
    integers = tuple(name for name, parameter, _ in named if not parameter.is_floating_point())
    kind = type(model).__name__
    if not tensors:
        what = "only integer (quantised) parameters" if integers else "no parameters"
        raise ModelError(f"{kind} has {what}, so there is no norm to take.")
    adapted = tuple(path for path, _ in adapted_layers(model))
    parameters = Parameters(kind, tensors, config_of(model), integers, adapted)
    return parameters.without(superseded(tensors))


def check_has_values(name: str, parameter: Tensor) -> None:
    """Raise a ModelError for a parameter on the meta device."""
    if parameter.is_meta:
        raise ModelError(
            f"{name} has no values here: it is on the meta device, or offloaded by accelerate. "
            "Load the model with its weights in memory, or read norms from its files: "
            "sat_lens.norm_growth."
        )


def named_as_in_files(model: nn.Module, own: Parameters, names: Set[str]) -> Parameters:
    """Return a model's parameters under the names that the files of its run use.

    A file's names are those of the model, or of its state dict (a TransformerBridge changes them
    there), or what transformers turns those into when it saves.
    """
    if own.adapted or own.tensors.keys() == names:
        return own
    states = [model.state_dict()]
    if hasattr(model, "save_pretrained"):
        # Older versions of transformers save the state dict as it is.
        with contextlib.suppress(ImportError):
            from transformers.core_model_loading import revert_weight_conversion

            states.append(revert_weight_conversion(model, states[0]))
    renamed = (_without_tables(own.name, _state_tensors(state), own.config) for state in states)
    found = max((own, *renamed), key=lambda parameters: len(parameters.tensors.keys() & names))
    if found.size < own.size:
        _log.warning(
            "The files leave out %d of the %d parameters of %s, as TransformerLens's state dict "
            "does with some models; norms are of the others.",
            own.size - found.size,
            own.size,
            own.name,
        )
    return found


def tied_names(parameters: Parameters) -> set[str]:
    """Return the unembeddings of a file that repeat an embedding bit for bit."""
    matrices: dict[str, list[str]] = {}
    for name, shape in parameters.shapes.items():
        if len(shape) == 2:
            matrices.setdefault(parameters.places[name].component, []).append(name)
    return {
        head
        for head in matrices.get("unembedding", [])
        for embedding in matrices.get("embedding", [])
        if parameters.shapes[head] == parameters.shapes[embedding]
        and torch.equal(parameters.read(head), parameters.read(embedding))
    }


def config_of(model: Any) -> dict[str, Any]:
    """Return a model's settings as a dict: Hugging Face's where there are any, else its own."""
    wrapped = getattr(model, "original_model", None)
    configs: list[Any] = [getattr(wrapped, "config", None), getattr(model, "config", None)]
    for config in configs:
        if isinstance(config, Mapping):
            return dict(config)
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
    plain = next((c for c in (*configs, getattr(model, "cfg", None)) if c is not None), None)
    return dict(getattr(plain, "__dict__", {}))


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that tied tensors share: the memory that they are in."""
    # A transposed view of a tied matrix is the same weights.
    return tensor.device, tensor.data_ptr(), tensor.numel()


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none (Apple's)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into flat pieces whose float64 copies fit into memory."""
    return tensor.detach().flatten().split(_CHUNK)


def squared_norm(tensor: Tensor) -> float:
    """Sum the squares of a tensor in float64."""
    return sum(float(wide(piece).square().sum()) for piece in chunks(tensor))


def _check_unsharded(model: nn.Module) -> None:
    split = [
        n for n, p in model.named_parameters() if hasattr(p, "placements") or hasattr(p, "ds_id")
    ]
    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if split or wrapped:
        what = split[0] if split else "The model"
        raise ModelError(
            f"{what} is split over several processes (FSDP, DeepSpeed or tensor parallelism), and "
            "no single one sees all weights. Follow such a run by its checkpoints: "
            "sat_lens.norm_growth(folder)."
        )


def _without_tables(
    name: str, tensors: Mapping[str, Lazy], config: Mapping[str, Any]
) -> Parameters:
    named = {canonical_name(key): lazy for key, lazy in tensors.items()}
    kept = {key: lazy for key, lazy in named.items() if not _is_table(key, lazy.shape)}
    apart = [key for key in kept if name_after_merging(key) != key or is_first_factor(key)]
    if apart:
        raise FileFormatError(
            f"{name} holds adapters ({apart[0]} and others), which count only once they are merged "
            "into what they adapt. Save model.merge_and_unload(), or give the model in memory."
        )
    if not kept:
        raise FileFormatError(f"{name} holds no weights.")
    return Parameters(name, kept, config).without(superseded(kept))


def _is_table(name: str, shape: tuple[int, ...]) -> bool:
    # GPT-2 and similar models kept their causal mask under the name of a bias.
    is_mask = name.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1)
    return is_mask or 0 in shape or name.endswith(_TABLES)


def _directory(path: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
    for weights in ("model.safetensors", "pytorch_model.bin"):
        if (path / weights).exists():
            return _file(path / weights, stack)
        if (path / f"{weights}.index.json").exists():
            return _shards(path / f"{weights}.index.json", stack)
    if (path / "adapter_model.safetensors").exists():
        return _file(path / "adapter_model.safetensors", stack)
    raise FileFormatError(
        f"{path} is no checkpoint: it holds neither model.safetensors nor pytorch_model.bin, as "
        "save_pretrained and the Trainer write them."
    )


def _shards(index: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{index} is no index of weights: {error}.") from error
    tensors: dict[str, Lazy] = {}
    for file in files:
        tensors |= _file(index.parent / Path(str(file)).name, stack)
    return tensors


def _file(path: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
    if not path.is_file():
        raise FileFormatError(f"There is no checkpoint {path}.")
    if path.suffix == ".safetensors":
        return _safetensors(path, stack)
    if path.suffix in STATE_DICT_SUFFIXES:
        return _state_dict(path)
    raise FileFormatError(
        f"{path} is no checkpoint: a file of weights ends in .safetensors or in "
        f"{', '.join(STATE_DICT_SUFFIXES)}."
    )


def _safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is broken or no safetensors file ({error}).") from error
    return {
        name: Lazy(tuple(part.get_shape()), partial(file.get_tensor, name))
        for name, part in shapes.items()
        if part.get_dtype() in ("F64", "F32", "F16", "BF16")
    }


def _state_dict(path: Path) -> dict[str, Lazy]:
    state = _load_pickle(path)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise FileFormatError(f"{path} holds no state dict, a mapping from names to tensors.")
    return _state_tensors(state)


def _state_tensors(state: Mapping[str, Any]) -> dict[str, Lazy]:
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return _floating((name, value, value.detach) for name, value in tensors.items())


def _floating(named: Iterable[Named]) -> dict[str, Lazy]:
    """Return the floating-point tensors among some by name, tied ones once."""
    found: dict[str, Lazy] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, memory, read in named:
        if memory.is_floating_point() and memory.numel():
            if identity(memory) not in seen:
                found[name] = Lazy(tuple(memory.shape), read, memory)
            seen.add(identity(memory))
    return found


def _load_pickle(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files in the format before PyTorch 1.6 cannot be mapped, and are read whole.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path} holds more than weights: reading it would run code, which is refused. Save "
            "model.state_dict() alone, or as safetensors."
        ) from error
    except Exception as error:
        # A file of arbitrary bytes can make the unpickler raise any error.
        raise FileFormatError(
            f"{path} is broken or no state dict ({type(error).__name__}: {str(error)[:200]})."
        ) from error


def _config_beside(path: Path) -> dict[str, Any]:
    """Return the settings that stand beside weights; weights without any are no error."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
