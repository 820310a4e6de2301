"""The small language model that most figures are redone on, trained when first asked for.

A Llama-shaped model (pre-norm, RMSNorm, rotary positions, no biases: T5's kind of block) on the
source of Python's standard library, with AdamW at a constant learning rate and no weight decay, so
that nothing but the gradient changes its norm. Figures redone in one call share one run.

When not to use it: for a model worth interpreting; take the bundled demo model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from paper.demo_training import Recipe, encode, new_model
from paper.network import log_spaced_steps, next_token_cross_entropy, windows
from sat_lens.demo.corpus import corpus_name, held_out_texts, training_texts
from sat_lens.models import load_tokenizer
from sat_lens.norms import NormGrowth, norm_growth
from sat_lens.norms.measures import lens_model

EQUAL_SPACES = 16


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model, its data and its steps."""

    steps: int = 2048
    layers: int = 4
    heads: int = 8
    width: int = 64
    context: int = 128
    batch: int = 16
    learning_rate: float = 1e-3
    files: int | None = None
    held_out: int = 16

    def __str__(self) -> str:
        return (
            f"{self.layers} layer{'s' * (self.layers > 1)} of {self.heads} "
            f"head{'s' * (self.heads > 1)}, width {self.width}, context {self.context}; "
            f"{self.steps} steps of {self.batch} windows, AdamW at a constant "
            f"{self.learning_rate:g} without weight decay, on the {corpus_name()}"
        )


FULL = Setting()
QUICK = Setting(steps=64, layers=2, heads=4, context=64, batch=8, files=8, held_out=4)


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageRun:
    """A training run kept in memory.

    Attributes:
        setting: What was trained.
        seed: Of the parameters and the batches.
        checkpoints: The models by step: log-spaced steps, and seventeen equally spaced ones.
        tokens: Held-out windows to measure on.
    """

    setting: Setting
    seed: int
    checkpoints: dict[int, nn.Module]
    tokens: Int[Tensor, "window context"]

    def lens(self, step: int) -> Any:
        """Return a checkpoint as a TransformerLens model."""
        return lens_model(self.checkpoints[step])

    @property
    def last(self) -> int:
        """The step of the last checkpoint."""
        return max(self.checkpoints)


@functools.lru_cache(maxsize=1)
def trained_run(quick: bool, seed: int, progress: bool) -> LanguageRun:
    """Train the model, or return the last run if its arguments were the same."""
    return train(QUICK if quick else FULL, seed, progress)


def train(setting: Setting, seed: int, progress: bool) -> LanguageRun:
    """Train a model of any setting, and keep its checkpoints."""
    tokenizer = load_tokenizer()
    stream, held_out = (
        encode(tokenizer, itertools.islice(texts, setting.files))
        for texts in (training_texts(), held_out_texts())
    )
    model = _new_model(setting, seed, len(tokenizer))
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=setting.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)
    )
    kept = set(log_spaced_steps(setting.steps, halves_from=16)) | set(equal_steps(setting.steps))
    checkpoints: dict[int, nn.Module] = {0: _copy(model)}
    bar = tqdm(range(setting.steps), desc="training", unit="step", disable=not progress)
    for step in bar:
        tokens = windows(stream, setting.context, setting.batch, seed * 1_000_003 + step)
        loss = next_token_cross_entropy(model(tokens, use_cache=False).logits, tokens)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if step + 1 in kept:
            checkpoints[step + 1] = _copy(model)
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    measured = windows(held_out, setting.context, setting.held_out, seed)
    return LanguageRun(setting, seed, checkpoints, measured)


@functools.lru_cache(maxsize=1)
def measured_growth(quick: bool, seed: int, progress: bool) -> NormGrowth:
    """Follow norms, rotation and saturation over the log-spaced checkpoints of the run."""
    run = trained_run(quick, seed, progress)
    chosen = {step: run.checkpoints[step] for step in log_spaced_steps(run.last, halves_from=16)}
    return norm_growth(chosen, run.tokens, progress=progress, data_name=corpus_name())


def equal_steps(last: int) -> list[int]:
    """Return seventeen equally spaced steps, the first and the last included.

    Example:
        >>> equal_steps(64)[:4]
        [0, 4, 8, 12]
    """
    return [round(last * i / EQUAL_SPACES) for i in range(EQUAL_SPACES + 1)]


def _new_model(setting: Setting, seed: int, vocabulary: int) -> Any:
    recipe = Recipe(
        seed=seed,
        vocab=vocabulary,
        layers=setting.layers,
        heads=setting.heads,
        d_model=setting.width,
        d_head=setting.width // setting.heads,
        d_mlp=3 * setting.width,
        context=setting.context,
    )
    with torch.random.fork_rng(devices=[]):
        return new_model(recipe, 0, 1, 2)


def _copy(model: Any) -> Any:
    return copy.deepcopy(model).requires_grad_(False).eval()
