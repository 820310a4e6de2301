"""Tensors of checkpoint directories and files, read one at a time; nothing in them is run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sat_lens.errors import FileFormatError

STATE_DICT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model_state_dict", "model")


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def open_tensors(path: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
    """Open a checkpoint directory or a file of weights, for as long as the stack lasts.

    Raises:
        FileFormatError: It is missing, broken, no checkpoint, or would have to run code.
    """
    return _directory(path, stack) if path.is_dir() else _file(path, stack)


def _directory(path: Path, stack: contextlib.ExitStack) -> dict[str, Lazy]:
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
    state = _load(path)
    for key in _NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise FileFormatError(f"{path} holds no state dict, a mapping from names to tensors.")
    return tensors_of_state(state)


def tensors_of_state(state: Mapping[str, Any]) -> dict[str, Lazy]:
    """Give the tensors of a state dict by name, tied ones once."""
    tensors: dict[str, Lazy] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            if identity(value) not in seen:
                tensors[str(name)] = Lazy(tuple(value.shape), value.detach)
            seen.add(identity(value))
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


def config_beside(path: Path) -> dict[str, Any]:
    """Read the settings that stand beside weights; none are no error."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Say which memory a tensor is, for finding those that are tied."""
    # A transposed view of a tied matrix is the same weights.
    return tensor.device, tensor.data_ptr(), tensor.numel()
