"""Measure the checkpoints of a training run of the demo model into one JSON file.

For each kept step: losses soft and saturated on held-out text, the norm of all parameters, and
the saturation of every head. The file ships with the model as ``training_log.json``.

When not to use it: for a training run of your own; ``sat_lens.norm_growth`` reads any checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.data import text_windows
from sat_lens.demo.corpus import corpus_name, held_out_texts
from sat_lens.intervention import saturate
from sat_lens.metrics import next_token_loss
from sat_lens.models import load_model
from sat_lens.results import library_versions, write_whole
from sat_lens.roles import head_roles

WINDOWS = 64


def measure_checkpoints(work: Path, out: Path, context: int, recipe: dict[str, Any]) -> None:
    """Measure ``work/checkpoint-*`` in the order of steps and write ``out``."""
    steps = sorted(int(path.name.split("-")[1]) for path in work.glob("checkpoint-*"))
    records = [_measure(work, step, context) for step in tqdm(steps, desc="measuring", unit="ckpt")]
    log = {
        "recipe": recipe,
        "corpus": corpus_name(),
        "held_out_windows": WINDOWS,
        "versions": library_versions(),
        "steps": records,
    }
    write_whole(out, (json.dumps(log, indent=1) + "\n").encode())


def _measure(work: Path, step: int, context: int) -> dict[str, Any]:
    model = load_model(str(work / f"checkpoint-{step}"), tokenizer=_tokenizer(work))
    windows = text_windows(model, held_out_texts(), context, WINDOWS)
    roles = head_roles(model, windows, progress=False).frame()
    parameters = [p.detach() for p in model.original_model.parameters()]
    return {
        "step": step,
        "loss": _loss(model, windows),
        "loss_saturated": _saturated_loss(model, windows),
        "norm": float(torch.sqrt(sum((p.double() ** 2).sum() for p in parameters))),
        "heads": {
            label: {
                name: round(float(row[name]), 4)
                for name in ("tv_argmax", "tv_mean", "tv_nearest", "lean", "previous", "induction")
            }
            for label, row in roles.iterrows()
        },
    }


def _loss(model: Any, windows: Int[Tensor, "window context"]) -> float:
    with torch.no_grad():
        losses = [float(next_token_loss(part)(model(part))) for part in windows.split(16)]
    return round(sum(losses) / len(losses), 4)


def _saturated_loss(model: Any, windows: Int[Tensor, "window context"]) -> float:
    with saturate(model):
        return _loss(model, windows)


def _tokenizer(work: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(work / "tokenizer")
