"""How saturated a model is on some data: one small set of numbers, for runs over checkpoints."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from sat_lens._checks import require_lens_model
from sat_lens.errors import NotReachedError
from sat_lens.norms.lens import undisturbed


def saturation_measures(
    model: Any, data: Any, *, batch_size: int = 8, min_keys: int = 8, seed: int = 0
) -> dict[str, float]:
    """Measure saturation on data; the model's mode and the random state stay as they are.

    Args:
        model: A TransformerLens model.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        batch_size: Sequences in a forward pass, for tokens and texts.
        min_keys: Least number of visible keys of a row that counts for roles.
        seed: Seed of the random keys of the control.

    Returns:
        ``loss`` and ``loss_saturated`` (next-token, nats; for causal language models),
        ``cos_saturated``, ``cos_random`` and ``S`` of the residual stream after the last layer, the
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
    with undisturbed(model):
        return _outputs(model, data, batch_size, seed) | _heads(model, data, batch_size, min_keys)


def import_what_measures_need() -> None:
    """Import TransformerLens and the rest now, so that no training step has to wait for it."""
    for room in ("caching", "data", "metrics", "roles"):
        importlib.import_module(f"sat_lens.{room}")
    # Older versions have no bridges; whoever needs one is told so by lens_model.
    with contextlib.suppress(ImportError):
        importlib.import_module("transformer_lens.model_bridge.sources")


def _outputs(model: Any, data: Any, batch_size: int, seed: int) -> dict[str, float]:
    from sat_lens.caching import normalised_similarity, run_with_saturation_cache
    from sat_lens.data import batches

    last = last_residual(model)
    sums: dict[str, float] = {}
    total = 0
    for batch in batches(model, data, batch_size):
        pair = run_with_saturation_cache(
            model, batch.inputs, names_filter=lambda name: name == last, **batch.kwargs
        )
        similarity = pair.similarity("resid_post", seed=seed)
        found = {
            "cos_saturated": float(similarity.cos_saturated[-1]),
            "cos_random": float(similarity.cos_random[-1]),
        }
        for name, run in (("loss", pair.soft), ("loss_saturated", pair.saturated)):
            loss = _loss(model, batch, run.logits)
            if loss is not None:
                found[name] = loss
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value * batch.size
        total += batch.size
    means = {name: value / total for name, value in sums.items()}
    cosines = (torch.tensor(means[name]) for name in ("cos_saturated", "cos_random"))
    return means | {"S": float(normalised_similarity(*cosines))}


def _heads(model: Any, data: Any, batch_size: int, min_keys: int) -> dict[str, float]:
    from sat_lens.roles import ROLES, head_roles

    frame = head_roles(
        model, data, batch_size=batch_size, min_keys=min_keys, progress=False
    ).frame()
    means = {name: float(frame[name].mean()) for name in ("lean", "tv_argmax", "tv_mean")}
    counts = frame["role"].value_counts()
    return means | {f"role_{role}": float(counts.get(role, 0)) for role in ROLES}


def last_residual(model: Any) -> str:
    """Name the residual stream after the last layer.

    Raises:
        NotReachedError: The model shows none.
    """
    names = [name for name in model.hook_dict if name.endswith("hook_resid_post")]
    if not names:
        raise NotReachedError("This model shows no residual stream to measure similarity on.")
    return names[-1]


def _loss(model: Any, batch: Any, logits: Any) -> float | None:
    from sat_lens.metrics import next_token_loss

    causal = getattr(model.cfg, "attention_dir", "causal") == "causal"
    tokens = batch.tokens
    if not causal or tokens is None or not isinstance(logits, Tensor) or logits.dim() != 3:
        return None
    if logits.shape[:2] != tokens.shape or batch.decoder_tokens is not None:
        return None
    if torch.is_floating_point(tokens):
        return None
    return float(next_token_loss(tokens, batch.real)(logits))
