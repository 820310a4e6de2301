"""How saturated a model is on some data, whatever holds the model: a TransformerLens model, a
checkpoint directory, or a Hugging Face model in training.

A model in training is never touched. It is measured through a twin: the same modules once more,
whose parameters are the same memory, so an optimiser's step is seen at once and nothing is copied.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sat_lens._checks import is_lens_model, require_lens_model
from sat_lens.caching import normalised_similarity
from sat_lens.caching.pair import pair_of
from sat_lens.data import Data, batches, predicts_next
from sat_lens.data.texts import read_tokenizer
from sat_lens.errors import ArgumentError, FileFormatError, ModelError, UnsupportedModelError
from sat_lens.metrics import next_token_loss
from sat_lens.models import check_complete, last_residual, load_error, quiet_loading
from sat_lens.norms.adapters import adapted_layers, merged_layer
from sat_lens.norms.names import is_joint
from sat_lens.roles import ROLES, head_roles
from sat_lens.version import newer_lens

# Unless told not to, transformers asks at the terminal whether to run a checkpoint's own code.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def saturation_measures(
    model: Any,
    data: Data,
    *,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    min_keys: int = 8,
) -> dict[str, float]:
    """Measure saturation on data; the model's mode and the random state stay as they are.

    Args:
        model: A TransformerLens model.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
        min_keys: Least number of visible keys of a row that counts for roles.

    Returns:
        ``loss`` and ``loss_saturated`` (next-token, nats; where the model predicts the next token),
        ``cos_saturated``, ``cos_random`` and ``S`` of the residual stream after the last layer (NaN
        where the model passes it by no hook point), the
        mean ``lean``, ``tv_argmax`` and ``tv_mean`` of all heads, and ``role_...``, how many heads
        have each role.

    Raises:
        UnsupportedModelError: It is no TransformerLens model.
        DataError, ArgumentError: As for :func:`sat_lens.head_roles`.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.norms import saturation_measures
        >>> measures = saturation_measures(sl.load_model("demo"), ["import os, sys, re, json"])
        >>> measures["loss"] < measures["loss_saturated"]
        True
    """
    require_lens_model(model, "saturation_measures")
    reading = {
        "batch_size": batch_size,
        "attention_mask": attention_mask,
        "tokenizer": read_tokenizer(tokenizer),
    }
    with undisturbed(model):
        return _outputs(model, data, reading) | _heads(model, data, reading, min_keys)


def _outputs(model: Any, data: Data, reading: dict[str, Any]) -> dict[str, float]:
    last = last_residual(model)
    sums: dict[str, float] = {}
    total, predicts = 0, None
    for batch in batches(model, data, **reading):
        if predicts is None:
            predicts = predicts_next(model, batch)
        pair = pair_of(
            model,
            (batch.inputs,),
            batch.kwargs,
            (batch.non_padding, batch.output_non_padding),
            names_filter=lambda name: name == last,
        )
        found = {"cos_saturated": math.nan, "cos_random": math.nan}
        if last in pair.soft.cache:
            similarity = pair.similarity("resid_post")
            found["cos_saturated"] = float(similarity.cos_saturated[-1])
            found["cos_random"] = float(similarity.cos_random[-1])
        if predicts and batch.output_tokens is not None:
            loss = next_token_loss(batch.output_tokens, batch.output_non_padding)
            found["loss"] = float(loss(pair.soft.logits))
            found["loss_saturated"] = float(loss(pair.saturated.logits))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * batch.size
        total += batch.size
    means = {name: value / total for name, value in sums.items()}
    cosines = (torch.tensor(means[name]) for name in ("cos_saturated", "cos_random"))
    return means | {"S": float(normalised_similarity(*cosines))}


def _heads(model: Any, data: Data, reading: dict[str, Any], min_keys: int) -> dict[str, float]:
    roles = head_roles(model, data, **reading, min_keys=min_keys, progress=False)
    frame = roles.frame()
    means = {name: float(frame[name].mean()) for name in ("lean", "tv_argmax", "tv_mean")}
    counts = frame["role"].value_counts()
    return means | {f"role_{role}": float(counts.get(role, 0)) for role in ROLES}


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode without gradients; leave mode and random state as found."""
    modes = [(module, module.training) for module in model.modules()]
    with kept_random_state(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave PyTorch's random state, on every device in use, as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield


def import_transformer_lens() -> None:
    """Import TransformerLens now, so that no training step has to wait for it."""
    # Older versions have no bridges; lens_model says so to those who need one.
    with contextlib.suppress(ImportError):
        importlib.import_module("transformer_lens.model_bridge.sources")


def lens_model(source: Path | nn.Module, tokenizer: Any = None) -> Any:
    """Return a TransformerLens model of a checkpoint directory or of a model in memory.

    A TransformerLens model comes back as it is; a Hugging Face model comes back as a bridge over a
    twin that shares its memory, and is itself left alone.

    Args:
        source: A directory that save_pretrained or the Trainer wrote, or a model.
        tokenizer: A tokenizer or its directory, for texts; a checkpoint's own where it has one.

    Raises:
        ArgumentError: A file of weights alone, which says nothing of its architecture.
        ModelError, UnsupportedModelError: It cannot be loaded, or TransformerLens has no adapter.

    Example:
        >>> import transformers
        >>> from sat_lens.norms import lens_model
        >>> config = transformers.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)
        >>> lens_model(transformers.GPT2LMHeadModel(config)).cfg.n_heads
        2
    """
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        if is_lens_model(model):
            return model
        return _bridge(_twin(model), tokenizer)
    if not source.is_dir():
        raise ArgumentError(
            f"{source} holds weights and no architecture, so it cannot be run on data. Give a "
            "directory with config.json, a model in memory, or as_model=, a function that makes a "
            "model of it."
        )
    if tokenizer is None and (source / "tokenizer_config.json").exists():
        tokenizer = source
    return _bridge(_from_directory(source), tokenizer)


def shares_memory(view: nn.Module, model: nn.Module) -> bool:
    """Whether a view's parameters are all the model's own memory, and so never go stale."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return all(p.untyped_storage().data_ptr() in own for p in view.parameters())


def unwrapped(model: Any) -> Any:
    """Take a model out of what DataParallel, torch.compile and PEFT put around it.

    PEFT's adapters, such as LoRA's, are in the model that comes out; a model with learned prompts,
    which are in the wrapper, stays in it.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if inner is None and hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            prompts = any(config.is_prompt_learning for config in model.peft_config.values())
            inner = None if prompts else model.get_base_model()
        if inner is None:
            return model
        model = inner


def _twin(model: nn.Module) -> Any:
    if not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"Measuring saturation needs a TransformerLens or a Hugging Face model; found "
            f"{type(model).__name__}. Norms alone can be measured without data."
        )
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    twin: Any = copy.deepcopy(model, shared)
    for module in twin.modules():
        # Hooks belong to the training run, and a replaced forward may lead back to its model.
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        module.__dict__.pop("forward", None)
    for path, layer in list(adapted_layers(twin)):
        # Of a joint matrix a bridge takes the parts, without their adapters.
        if is_joint(f"{path}.weight"):
            twin.set_submodule(path, merged_layer(layer))
    if hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("eager")
    return twin


def _from_directory(folder: Path) -> Any:
    """Load a checkpoint, which need not have a tokenizer, as load_model does."""
    if not (folder / "config.json").exists():
        raise FileFormatError(f"{folder} holds no config.json, so its model cannot be built.")
    with quiet_loading() as said:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
            architecture = getattr(transformers, (config.architectures or [""])[0])
            model = architecture.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        except Exception as error:
            raise load_error(str(folder), error, said) from error
    check_complete(str(folder), said)
    return model


def _bridge(model: Any, tokenizer: Any) -> Any:
    architecture = type(model).__name__
    try:
        # Slow to import, and missing in older versions.
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        raise ModelError(
            "Measuring a Hugging Face model on data needs TransformerLens 3.9 or newer "
            "(TransformerBridge). Give models of TransformerLens's own classes, or leave data out "
            "to measure norms alone."
        ) from error
    try:
        with quiet_loading():
            bridge = build_bridge_from_module(model, architecture, hf_config=model.config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"TransformerLens has no adapter for {architecture}: {str(error)[:200]}{newer_lens()}"
        ) from error
    if tokenizer is not None:
        bridge.tokenizer = read_tokenizer(tokenizer)
    return bridge.eval()
