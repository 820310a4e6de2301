"""Several patches in one whole forward pass, on copies of the prompts side by side.

It pays for short prompts, as the replay's own side-by-side runs do, and serves to check those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sat_lens.data import Batch
from sat_lens.intervention import Edit, NewScores, attach_edits, bind_transform
from sat_lens.patching.activations import replacing, with_heads
from sat_lens.patching.items import Item
from sat_lens.patching.runs import FromRun, Local, Patch, Setting, local_edit
from sat_lens.sites import AttentionSite

Patches = list[tuple[Item, int | None]]


def side_by_side_logits(setting: Setting, patch: Patch, patches: Patches) -> list[Tensor]:
    """Run the soft model once with one patch in each copy of the prompts.

    Args:
        setting: A model whose prompts do not meet.
        patch: Into the soft run, with values computed there or z from another run.
        patches: An item and a position (None is all) for each copy.

    Returns:
        The logits that the readout reads, copy by copy.
    """
    assert patch.base is None
    batch = _copies(patch.batch, len(patches))
    with contextlib.ExitStack() as stack:
        for site in setting.sites_of([item for item, _ in patches]):
            here = [(item.selection.get(site.path, []), at) for item, at in patches]
            source = patch.source
            if isinstance(source, Local):
                edits = {site.path: _local(source, site, here, patch.batch.size)}
                stack.enter_context(attach_edits(setting.model, setting.sites, edits))
            else:
                put = _from_run(source, site, here, patch.batch.size)
                stack.enter_context(replacing(setting.model, site, "z", put))
        stack.enter_context(setting.readout.narrowed(setting.unembed))
        logits = batch.run(setting.model)
    return list(logits.split(patch.batch.size))


def _local(
    source: Local, site: AttentionSite, here: list[tuple[list[int], int | None]], size: int
) -> Edit:
    edits = [
        local_edit(
            None,
            source.transform and bind_transform(source.transform, site, tuple(heads)),
            heads,
            at,
        )
        if heads
        else None
        for heads, at in here
    ]

    def edit(scores: Tensor) -> NewScores:
        whole = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
        for part, target, one in zip(scores.split(size), whole.split(size), edits, strict=True):
            changed = None if one is None else one(part)
            if changed is not None:
                target[:, changed.heads] = changed.scores.to(target.dtype)
        return NewScores(list(range(site.n_heads)), whole)

    return edit


def _from_run(
    source: FromRun, site: AttentionSite, here: list[tuple[list[int], int | None]], size: int
) -> Callable[[Tensor], Tensor]:
    given = source.activations[site.path]

    def put(z: Tensor) -> Tensor:
        return torch.cat(
            [
                with_heads(part, given, site.n_heads, heads, at) if heads else part
                for part, (heads, at) in zip(z.split(size), here, strict=True)
            ]
        )

    return put


def _copies(batch: Batch, copies: int) -> Batch:
    def repeated(value: Any) -> Any:
        per_prompt = isinstance(value, Tensor) and value.dim() and len(value) == batch.size
        return torch.cat([value] * copies) if per_prompt else value

    kwargs = {name: repeated(value) for name, value in batch.kwargs.items()}
    return Batch(repeated(batch.inputs), kwargs)
