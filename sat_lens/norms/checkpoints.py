"""Which checkpoints a caller means, and the step of each."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from torch import nn

from sat_lens._checks import check_count, is_integer
from sat_lens.errors import ArgumentError, FileFormatError, ModelError
from sat_lens.models import hub_or_cache
from sat_lens.norms.sources import STATE_DICT_SUFFIXES

_STEP = re.compile(r"(\d+)(?:\.[A-Za-z]+)?$")
_CHECKPOINT = re.compile(r"^(checkpoint|step|model|state)?[-_]?\d+(\.[A-Za-z]+)?$")
_SUFFIXES = (".safetensors", *STATE_DICT_SUFFIXES)
_REVISIONS = {"EleutherAI/": "step{}", "stanford-crfm/": "checkpoint-{}"}


@dataclasses.dataclass(frozen=True)
class HubRevision:
    """One revision of a model on the hub."""

    name: str
    revision: str

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"

    def download(self) -> Path:
        """Fetch its weights and return their directory."""
        try:
            with hub_or_cache(self.name):
                for weights in ("*.safetensors", "*.bin"):
                    folder = snapshot_download(
                        self.name, revision=self.revision, allow_patterns=["*.json", weights]
                    )
                    if any(Path(folder).glob(weights)):
                        return Path(folder)
        except Exception as error:
            raise ModelError(
                f"{self} is not in the local cache, and the hub could not be reached or has no "
                f"such revision ({type(error).__name__}). Check the name, the step and the network "
                "(is HF_HUB_OFFLINE set?), or give local checkpoint directories."
            ) from error
        raise ModelError(f"{self} holds neither safetensors nor PyTorch weights.")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: the step it was taken at, and where its weights are."""

    step: int
    source: Path | HubRevision | nn.Module

    def __str__(self) -> str:
        if isinstance(self.source, nn.Module):
            return f"the model of step {self.step}"
        return str(self.source)

    @functools.cached_property
    def located(self) -> Path | nn.Module:
        """The path or the model, after a download where one is needed."""
        return self.source.download() if isinstance(self.source, HubRevision) else self.source


def list_checkpoints(checkpoints: Any) -> list[Checkpoint]:
    """Return the checkpoints that a caller means, in the order of their steps."""
    found = _listed(checkpoints)
    for before, after in itertools.pairwise(found):
        if before.step == after.step:
            raise ArgumentError(f"Step {after.step} is given twice: {before} and {after}.")
        if before.step > after.step:
            raise ArgumentError(
                f"Steps are out of order: {before.step} ({before}) comes before {after.step} "
                f"({after}). Give them from the first step to the last."
            )
    if len(found) < 2:
        raise ArgumentError(f"Growth needs at least two checkpoints; found {len(found)}.")
    for checkpoint in found:
        if isinstance(checkpoint.source, Path) and not checkpoint.source.exists():
            raise FileFormatError(f"There is no checkpoint {checkpoint.source}.")
    return found


def hub_checkpoints(name: str, steps: Iterable[int] | None) -> list[Checkpoint]:
    """List the published checkpoints of a model, by TransformerLens's registry."""
    try:
        # Slow to import, and missing in older versions.
        from transformer_lens.tools.model_registry import checkpoints, registry_io
    except ImportError as error:
        raise ModelError("Checkpoints of hub models need TransformerLens 4.") from error
    full_name = registry_io.resolve_model_alias(name) or name
    pattern = next((p for owner, p in _REVISIONS.items() if full_name.startswith(owner)), None)
    try:
        known = checkpoints.get_checkpoint_labels(full_name)[0] if pattern else []
    except ValueError:
        known = []
    if pattern is None or not known:
        raise ArgumentError(
            f"TransformerLens knows no checkpoints of {name!r} that are revisions on the hub. Give "
            "a model that has some, such as 'EleutherAI/pythia-70m'; or local checkpoint "
            "directories; or, where they were published as files, a mapping from steps to files."
        )
    chosen = list(known) if steps is None else list(steps)
    missing = [step for step in chosen if step not in set(known)]
    if missing:
        near = sorted(known, key=lambda step: abs(step - missing[0]))[:3]
        raise ArgumentError(
            f"{name} has no checkpoint of step {missing[0]}; the nearest are {sorted(near)}."
        )
    return [Checkpoint(step, HubRevision(full_name, pattern.format(step))) for step in chosen]


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint."""
    found = _STEP.search(path.name)
    if found is None:
        raise ArgumentError(
            f"No step can be read from {path.name!r}. Name it like checkpoint-1000, or give a "
            "mapping from steps to checkpoints."
        )
    return int(found[1])


def _listed(checkpoints: Any) -> list[Checkpoint]:
    if isinstance(checkpoints, (str, os.PathLike)):
        return _in_directory(Path(checkpoints))
    if isinstance(checkpoints, Mapping):
        return [_item(pair) for pair in checkpoints.items()]
    if not isinstance(checkpoints, Iterable) or isinstance(checkpoints, nn.Module):
        raise _unreadable(checkpoints)
    items: list[Any] = [list(x) if isinstance(x, Iterator) else x for x in checkpoints]
    if len(items) == 2 and isinstance(items[0], str) and _are_steps(items[1]):
        name, steps = items
        return hub_checkpoints(name, None if steps is None else [int(step) for step in steps])
    return [_item(item) for item in items]


def _in_directory(folder: Path) -> list[Checkpoint]:
    if not folder.is_dir():
        raise FileFormatError(
            f"There is no directory {folder}. For a hub model give its name and the steps: "
            f"({str(folder)!r}, [0, 512, 1000])."
        )
    kept = [
        path
        for path in folder.iterdir()
        if _CHECKPOINT.match(path.name) and (path.is_dir() or path.suffix in _SUFFIXES)
    ]
    if not kept:
        raise FileFormatError(
            f"{folder} holds no checkpoints: looked for checkpoint-N, as the Trainer names them, "
            "and for files such as model_N.pt."
        )
    return sorted((Checkpoint(step_of(path), path) for path in kept), key=lambda c: c.step)


def _item(item: Any) -> Checkpoint:
    """Read a path whose name says the step, or a pair of a step and a path or model."""
    if isinstance(item, (str, os.PathLike)):
        return Checkpoint(step_of(Path(item)), Path(item))
    if isinstance(item, nn.Module):
        raise ArgumentError(
            "A model in memory does not say its step: give a mapping from steps to models."
        )
    if not isinstance(item, Sequence) or len(item) != 2:
        raise _unreadable(item)
    step, source = item
    check_count("A step", step, at_least=0)
    if not isinstance(source, (str, os.PathLike, nn.Module)):
        raise _unreadable(source)
    return Checkpoint(int(step), source if isinstance(source, nn.Module) else Path(source))


def _are_steps(value: Any) -> bool:
    is_list = isinstance(value, Iterable) and not isinstance(value, (str, Mapping))
    return value is None or (is_list and all(map(is_integer, value)))


def _unreadable(found: object) -> ArgumentError:
    return ArgumentError(
        "Checkpoints are a directory that holds checkpoint-N, a list of such directories or files "
        "of weights, a mapping from steps to paths or models, or a hub model and its steps; found "
        f"{type(found).__name__}."
    )
