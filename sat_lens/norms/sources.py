"""Named tensors of a model or of a file, read one at a time, without running code of the file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sat_lens.errors import ArgumentError, FileFormatError, ModelError
from sat_lens.norms.naming import canonical_name, parameter_places, superseded

STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model")
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".IGNORE", ".mask")


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
        tensors = _directory(path, stack) if path.is_dir() else _file(path, stack)
        yield _from_lazy(name or str(path), tensors, _config_beside(path))


def module_parameters(model: nn.Module) -> Parameters:
    """Give the parameters of a model in memory; tied ones once.

    Example:
        >>> module_parameters(torch.nn.Linear(2, 3)).shapes
        {'weight': (3, 2), 'bias': (3,)}
    """
    found: dict[str, Tensor] = {}
    integers: list[str] = []
    seen: set[tuple[Any, ...]] = set()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} has no values (it is on the meta device). Load the weights.")
        tensor = parameter.detach()
        if _identity(tensor) in seen or not tensor.numel():
            continue
        seen.add(_identity(tensor))
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


@dataclasses.dataclass(frozen=True)
class _Lazy:
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _from_lazy(name: str, tensors: Mapping[str, _Lazy], config: dict[str, Any]) -> Parameters:
    kept = {
        canonical_name(key): lazy
        for key, lazy in tensors.items()
        if not key.endswith(_BUFFERS) and not _is_mask(key, lazy.shape) and 0 not in lazy.shape
    }
    if not kept:
        raise FileFormatError(f"{name} holds no weights.")
    shapes = {key: lazy.shape for key, lazy in kept.items()}
    parameters = Parameters(name, shapes, lambda key: kept[key].read(), config)
    return parameters.without(superseded(shapes))


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    # GPT-2 and its kin kept their causal mask under the name of a bias.
    return name.endswith(".bias") and len(shape) == 4 and shape[:2] == (1, 1)


def _directory(path: Path, stack: contextlib.ExitStack) -> dict[str, _Lazy]:
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{weights}.index.json"
        if (path / weights).exists():
            return _file(path / weights, stack)
        if index.exists():
            return _shards(index, stack)
    raise FileFormatError(
        f"{path} is no checkpoint: it holds neither model.safetensors nor pytorch_model.bin, as "
        "save_pretrained and the Trainer write them."
    )


def _shards(index: Path, stack: contextlib.ExitStack) -> dict[str, _Lazy]:
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{index} is no index of weights: {error}.") from error
    tensors: dict[str, _Lazy] = {}
    for file in files:
        tensors |= _file(index.parent / Path(str(file)).name, stack)
    return tensors


def _file(path: Path, stack: contextlib.ExitStack) -> dict[str, _Lazy]:
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


def _safetensors(path: Path, stack: contextlib.ExitStack) -> dict[str, _Lazy]:
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        shapes = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is broken or no safetensors file ({error}).") from error
    return {
        name: _Lazy(tuple(part.get_shape()), partial(file.get_tensor, name))
        for name, part in shapes.items()
        if part.get_dtype() in ("F64", "F32", "F16", "BF16")
    }


def _state_dict(path: Path) -> dict[str, _Lazy]:
    state = _load(path)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise FileFormatError(f"{path} holds no state dict, a mapping from names to tensors.")
    tensors: dict[str, _Lazy] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            if _identity(value) not in seen:
                tensors[str(name)] = _Lazy(tuple(value.shape), value.detach)
            seen.add(_identity(value))
    return tensors


def _load(path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files in the format before PyTorch 1.6 cannot be mapped, and are read whole.
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FileFormatError(
            f"{path} is not only weights: reading it would run code, which is refused. Save "
            "model.state_dict() alone, or as safetensors."
        ) from error
    except Exception as error:
        # Any error at all can come of the bytes of a file that is none.
        raise FileFormatError(
            f"{path} is broken or no state dict ({type(error).__name__}: {str(error)[:200]})."
        ) from error


def _config_beside(path: Path) -> dict[str, Any]:
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    # A transposed view of a tied matrix is the same weights.
    return tensor.device, tensor.data_ptr(), tensor.numel()
