"""Measure the roles of all heads in one streaming pass over data."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens._checks import check_count, is_count, is_integer, require_lens_model
from sat_lens.attention import AttentionCall
from sat_lens.caching.activations import unembedding_only
from sat_lens.data import Batch, Data, batch_sizes, batches, predicts_next
from sat_lens.data.texts import read_tokenizer
from sat_lens.errors import ArgumentError, DataError
from sat_lens.intervention import observe_attention
from sat_lens.metrics import Metric
from sat_lens.models import model_name, wrapped_model
from sat_lens.results import Provenance
from sat_lens.roles.causal import head_damage, row_importance
from sat_lens.roles.positions import ROWS_PER_SEQUENCE, BatchReader, Rows, special_ids
from sat_lens.roles.result import HeadRoles
from sat_lens.roles.rule import Thresholds
from sat_lens.roles.statistics import measure, measure_fused, shape_of
from sat_lens.roles.sums import Sums
from sat_lens.sites import AttentionSite, attention_sites

VALUES_PER_PARAMETER = 16


def head_roles(
    model: Any,
    data: Data,
    *,
    metric: Metric | str | None = None,
    query_positions: Sequence[int] | None = None,
    min_keys: int = 8,
    rows: Rows = ROWS_PER_SEQUENCE,
    thresholds: Thresholds | None = None,
    damage: bool = False,
    shard: tuple[int, int] | None = None,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    data_name: str = "",
) -> HeadRoles:
    """Measure what every head does with its attention, in one pass over data.

    Statistics are taken inside the forward pass; what is kept does not grow with the data. Rows
    with fewer than ``min_keys`` visible keys are left out, because with a few keys argmax and
    uniform are near to each other; so are padded query rows. Ctrl-C returns what was measured so
    far, marked incomplete. Under ``torch.distributed`` each rank reads its share of the batches and
    all ranks return the whole result.

    Args:
        model: A TransformerLens model in evaluation mode, or a plain Hugging Face model; where that
            runs fused attention, memory grows with the length of a sequence and not its square.
        data: Tokens, texts, batches or a Hugging Face dataset; see :func:`sat_lens.data.batches`.
        metric: Weigh each query row by its first-order effect on this function of the logits (or
            ``"loss"``, the next-token loss); costs a forward and a backward pass more.
        query_positions: Count these query positions only; negative ones count from the end. A head
            that acts at one position looks like something else over all of them.
        min_keys: Least number of visible keys of a counted row.
        rows: For what needs a sort or a search (tv_nearest, m, c_lo, c_hi), how many seeded rows of
            each sequence (16 for c_lo and c_hi, whose search costs most); ``"all"`` for all.
        thresholds: Where one role ends and the next begins.
        damage: Also measure what replacing each head's pattern (by its argmax, uniform with and
            without sinks, its nearest saturated row, zero) does to the metric, or to the loss if
            none is given; costs five forward passes per head.
        shard: ``(i, n)`` with i from 1 to n: read every n-th batch only, starting with the i-th.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        DataError: The data or the shard is empty, or no row has ``min_keys`` visible keys, or the
            metric depends on none that has.
        ArgumentError: A number is out of range, or the metric is unusable; the loss is for a model
            whose logits see the next token.
        UnsupportedModelError: The attention cannot be reached.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> roles = sl.head_roles(model, ["import os, sys, re, json"] * 2, progress=False)
        >>> len(roles.frame())
        32
    """
    _check(min_keys, rows, shard, query_positions, thresholds)
    if metric is not None or damage:
        require_lens_model(model, "head_roles with a metric or damage")
    sites = attention_sites(model)
    limits = thresholds or Thresholds()
    sums = {site.path: Sums.empty(site.n_heads) for site in sites}
    tokenizer = read_tokenizer(tokenizer)
    special = special_ids(model, tokenizer)
    index, count = _of_this_process(shard or (1, 1))
    batched = batches(model, data, batch_size, attention_mask=attention_mask, tokenizer=tokenizer)
    mine = _share(batched, (index, count))
    sizes = batch_sizes(data, batch_size)
    total = None if sizes is None else sum(sizes[index - 1 :: count])
    n_sequences, complete = 0, True
    with tqdm(desc="head roles", total=total, unit="seq", disable=not progress) as bar:
        try:
            for batch in mine:
                if n_sequences == 0 and (metric == "loss" or (damage and metric is None)):
                    _check_predicts_next(model, batch)
                importance = None if metric is None else row_importance(model, batch, sites, metric)
                reader = BatchReader(batch, special, query_positions, rows, importance)
                found = _one_batch(model, sites, batch, reader, min_keys, limits)
                if damage:
                    done = head_damage(model, batch, sites, metric or "loss", reader.sinks)
                    for path, part in found.items():
                        part.add_damage(done[path], reader.resampling)
                for path, part in found.items():
                    sums[path].add(part)
                n_sequences += batch.size
                bar.update(batch.size)
        except KeyboardInterrupt:
            complete = False
    # Also after an interrupt: the other processes wait for this one's part.
    sums, n_sequences, complete = all_reduced(sums, n_sequences, complete)
    if n_sequences == 0 and not complete:
        raise KeyboardInterrupt
    if n_sequences == 0:
        raise DataError(
            f"Shard {shard} holds no batch: there are fewer batches than shards. Take fewer "
            "shards, or a smaller batch_size."
        )
    if all(float(part.counted.sum()) == 0 for part in sums.values()):
        raise DataError(_nothing_counted(min_keys, metric))
    return HeadRoles(
        provenance=Provenance(model_name(model), data_name),
        # Where a kernel ran is no setting of the measurement, and parts may run on several devices.
        sites=tuple(dataclasses.replace(site, runs_in=None) for site in sites),
        sums=sums,
        thresholds=limits,
        min_keys=min_keys,
        n_sequences=n_sequences,
        complete=complete,
        weighted_by="" if metric is None else str(getattr(metric, "__name__", metric)),
        rows=rows,
        query_positions=None if query_positions is None else tuple(query_positions),
        damage=damage,
        fingerprint=fingerprint(model),
    )


def _one_batch(
    model: Any,
    sites: list[AttentionSite],
    batch: Batch,
    reader: BatchReader,
    min_keys: int,
    thresholds: Thresholds,
) -> dict[str, Sums]:
    """Measure one batch apart from the rest, so that an interrupt leaves no half of it behind."""
    sums = {site.path: Sums.empty(site.n_heads) for site in sites}
    holders = [module for module in map(model.get_submodule, sums) if hasattr(module, "_pattern")]

    def observe(site: AttentionSite, scores: Tensor) -> None:
        # TransformerLens bridges keep the pattern of every layer alive for nothing.
        for module in holders:
            module._pattern = None
        measure(sums[site.path], scores, reader.positions(site, scores), min_keys, thresholds)

    def observe_call(site: AttentionSite, call: AttentionCall) -> None:
        positions = reader.positions(site, shape_of(call))
        measure_fused(sums[site.path], call, positions, min_keys, thresholds)

    with (
        torch.no_grad(),
        unembedding_only(model, [-1]),
        observe_attention(model, observe, observe_call),
    ):
        batch.run(model, **without_key_value_cache(model))
    for module in holders:
        module._pattern = None
    return sums


def _check_predicts_next(model: Any, batch: Batch) -> None:
    if batch.output_tokens is not None and not predicts_next(model, batch):
        raise ArgumentError(
            "The next-token loss means nothing for this model and data: its logits do not predict "
            "the next token (a masked language model sees it). Pass a metric of your own."
        )


def _nothing_counted(min_keys: int, metric: Metric | str | None) -> str:
    if metric is None:
        return (
            f"No query row has {min_keys} visible keys, so there is nothing to judge heads by. "
            "Give longer sequences, or lower min_keys."
        )
    return (
        f"The metric depends on no query row with {min_keys} visible keys or more, so every row "
        "has the weight 0. Give a metric of later positions, or lower min_keys."
    )


def _of_this_process(shard: tuple[int, int]) -> tuple[int, int]:
    """Divide a shard among the processes of torch.distributed, where it is running."""
    (index, count), (rank, processes) = shard, shard_of_rank()
    return index + count * (rank - 1), count * processes


def _share(batched: Iterable[Batch], shard: tuple[int, int]) -> Iterable[Batch]:
    index, count = shard
    return (batch for i, batch in enumerate(batched) if i % count == index - 1)


def _check(
    min_keys: int,
    rows: Rows,
    shard: tuple[int, int] | None,
    query_positions: Sequence[int] | None,
    thresholds: Thresholds | None,
) -> None:
    if not (is_count(rows) or (isinstance(rows, str) and rows == "all")):
        raise ArgumentError(f'rows must be "all" or a whole number of at least 1; found {rows!r}.')
    check_count("min_keys", min_keys)
    pair = shard if isinstance(shard, tuple) and len(shard) == 2 else (0, 0)
    if shard is not None and not (all(is_count(part) for part in pair) and pair[0] <= pair[1]):
        raise ArgumentError(
            f"A shard is (i, n) with i from 1 to n, such as (2, 8); found {shard!r}."
        )
    if not (query_positions is None or _are_positions(query_positions)):
        raise ArgumentError(
            "query_positions is a list of at least one position, such as [0, -1]; found "
            f"{query_positions!r}."
        )
    if not (thresholds is None or isinstance(thresholds, Thresholds)):
        raise ArgumentError(
            "thresholds is a sat_lens.roles.Thresholds, such as Thresholds(near=0.2); found "
            f"{type(thresholds).__name__}."
        )


def _are_positions(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) > 0 and all(map(is_integer, value))


def without_key_value_cache(model: Any) -> dict[str, Any]:
    """Return the arguments that keep the model from storing keys and values for a later pass."""
    taken = inspect.signature(wrapped_model(model).forward).parameters
    return {"use_cache": False} if "use_cache" in taken else {}


def shard_of_rank() -> tuple[int, int]:
    """Return this process's share of the data: (1, 1) unless torch.distributed is running."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() + 1, dist.get_world_size()
    return 1, 1


def all_reduced(
    sums: dict[str, Sums], n_sequences: int, complete: bool
) -> tuple[dict[str, Sums], int, bool]:
    """Add up the sums of all processes, where torch.distributed is running.

    The whole is complete if every process has read all of its share.
    """
    if shard_of_rank()[1] == 1:
        return sums, n_sequences, complete
    # NCCL reduces tensors on a GPU only, gloo those of the CPU.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([n_sequences, int(not complete)], device=device)
    dist.all_reduce(total)
    for part in sums.values():
        for tensor in part.tensors().values():
            reduced = tensor.to(device)
            dist.all_reduce(reduced)
            tensor.copy_(reduced)
    return sums, int(total[0]), int(total[1]) == 0


def fingerprint(model: Any) -> str:
    """Return a short hash by which the weights of two models are told apart.

    It is made of the name and shape of every parameter and of 16 evenly spaced values of each,
    as float32; so it changes with training and with the dtype that the weights were rounded to,
    and not with the device.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.roles import fingerprint
        >>> fingerprint(sl.load_model("demo")) == fingerprint(sl.load_model("demo"))
        True
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)} ".encode())
        if parameter.numel() and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            step = max(1, len(flat) // VALUES_PER_PARAMETER)
            digest.update(flat[::step][:VALUES_PER_PARAMETER].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
