"""Does the norm grow up to a threshold that rises with training accuracy?

So says the first version of the paper (arXiv 2010.09697v1, abstract). Constructed: bias-free ReLU
networks learn labels of which a share was flipped, so that accuracy is limited and a homogeneous
network's threshold is known (:mod:`sat_lens.theory.stationary`). Natural: a small language model;
it is not homogeneous, so its threshold is the norm at which the loss along the ray through its
parameters is least, found by trying.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.demo.corpus import corpus_name, training_texts
from sat_lens.norms.scaled import scaled_parameters
from sat_lens.paper.claims import Claim, Reproduction, verdict
from sat_lens.paper.drawing import panels
from sat_lens.paper.flipped import flipped_run
from sat_lens.paper.network import (
    Shape,
    SmallTransformer,
    characters,
    new_network,
    next_token_loss,
    windows,
)
from sat_lens.theory.descent import octaves
from sat_lens.theory.flow import squares
from sat_lens.vocabulary import INK, LINES, QUIET

CONSTRUCTED, NATURAL = "labels partly flipped", "language model"
# A norm is at its threshold within this share, growth has stopped below this share per doubling.
AT_THRESHOLD, STOPPED, RISING = 0.05, 0.01, 0.9
# The loss along the ray is tried at these powers of two of the present norm.
_RAY = [k / 32 for k in range(-32, 33)]
_EARLY = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained."""

    depths: tuple[int, ...] = (2, 3)
    flipped: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
    seeds: int = 2
    points: int = 2000
    steps: int = 16384
    model_steps: int = 4096
    shape: Shape = dataclasses.field(default_factory=Shape)


QUICK = Plan(depths=(2,), flipped=(0.0, 0.1, 0.2, 0.4), seeds=1, steps=4096, model_steps=512)


def reproduce(
    quick: bool, seed: int = 0, progress: bool = True, plan: Plan | None = None
) -> Reproduction:
    """Follow norm and accuracy on constructed problems and on a language model, and judge.

    Args:
        quick: Whether to train little: less than a minute.
        seed: Seed of the data and of the initial parameters.
        progress: Whether to show progress bars.
        plan: How much to train, in place of what ``quick`` chooses.
    """
    chosen = plan or (QUICK if quick else Plan())
    constructed = constructed_runs(chosen, seed, progress)
    natural = pd.concat(
        [language_model_run(name, chosen, seed, progress) for name in ("SGD", "AdamW")]
    )
    return Reproduction(
        name="threshold",
        title="The norm against training accuracy",
        claims=(*constructed_claims(constructed), *natural_claims(natural)),
        frame=pd.concat([constructed, natural], ignore_index=True),
        figure=_drawn(pd.concat([constructed, natural[natural["step"] >= _EARLY]])),
        note=(
            f"Constructed: {chosen.points} points in the plane, labels flipped at random, "
            f"{chosen.steps} steps of full-batch gradient descent in float64 without weight decay; "
            "bias-free ReLU networks with 4 units a layer. Language model: "
            f"{chosen.shape.layers} layers of width {chosen.shape.width}, characters of the "
            f"{corpus_name()}, {chosen.model_steps} steps without weight decay; accuracy is that "
            "of the next character on a fixed batch of training text. Networks wide enough to "
            "learn flipped labels by heart, longer training and other losses were not tried."
        ),
    )


def constructed_runs(plan: Plan, seed: int, progress: bool) -> pd.DataFrame:
    """Train on labels flipped to several shares; give the state at the end of each run."""
    seeds = range(seed, seed + plan.seeds)
    cells = list(itertools.product(plan.depths, plan.flipped, seeds))
    bar = tqdm(cells, desc="flipped labels", unit="run", disable=not progress)
    return pd.DataFrame([_constructed_row(plan, *cell) for cell in bar])


def _constructed_row(plan: Plan, layers: int, share: float, seed: int) -> dict[str, object]:
    run = flipped_run(layers, share, seed, plan.points, plan.steps)
    last = run.frame().iloc[-1]
    return {
        "panel": CONSTRUCTED,
        "run": f"{layers} layers",
        "flipped": share,
        "seed": seed,
        "step": plan.steps,
        "accuracy": last["accuracy"],
        "loss": last["loss"],
        "norm": last["norm"],
        "threshold": last["stationary"],
        "growth_per_doubling": run.growth_per_doubling,
    }


def language_model_run(optimiser: str, plan: Plan, seed: int, progress: bool) -> pd.DataFrame:
    """Train a small language model; give norm, accuracy and threshold at the powers of two."""
    stream = characters(training_texts(), 400_000)
    model = new_network(plan.shape, seed=seed)
    parameters = list(model.parameters())
    stepper: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=0.5)
        if optimiser == "SGD"
        else torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    )
    fixed = windows(stream, plan.shape.context, 32, seed + 1_000_003)
    kept = {*octaves(plan.model_steps), *half_octaves(plan.model_steps)}
    step_term, first, rows = 0.0, squares(parameters), []
    for step in _steps(plan.model_steps, optimiser, progress):
        if step in kept:
            state = _state(model, fixed)
            grown = state["norm"] ** 2 - first
            state["step_share"] = step_term / grown if grown > 0 else math.nan
            rows.append({"panel": NATURAL, "run": optimiser, "seed": seed, "step": step, **state})
        batch = windows(stream, plan.shape.context, 16, seed + step)
        stepper.zero_grad()
        torch.autograd.backward(next_token_loss(model(batch), batch))
        before = [p.detach().clone() for p in parameters]
        stepper.step()
        moves = torch._foreach_sub([p.detach() for p in parameters], before)
        step_term += squares(moves)
    return pd.DataFrame(rows)


def half_octaves(last: int) -> list[int]:
    """Give the steps half way, as logarithms, between powers of two.

    Example:
        >>> half_octaves(50)
        [1, 3, 6, 11, 23, 45]
    """
    return [step for k in range(last.bit_length()) if (step := round(2 ** (k + 0.5))) < last]


def _steps(last: int, name: str, progress: bool) -> Iterator[int]:
    bar = tqdm(range(last + 1), desc=f"language model, {name}", unit="step", disable=not progress)
    return iter(bar)


@torch.no_grad()
def _state(model: SmallTransformer, tokens: Tensor) -> dict[str, float]:
    logits = model(tokens)
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    norm = math.sqrt(squares(list(model.parameters())))
    return {
        "accuracy": float(right.double().mean()),
        "loss": float(next_token_loss(logits, tokens)),
        "norm": norm,
        "threshold": norm * 2.0 ** least_on_ray(model, tokens),
    }


@torch.no_grad()
def least_on_ray(model: SmallTransformer, tokens: Tensor) -> float:
    """Give the power of two by which parameters must be multiplied for the least loss.

    NaN where that is a factor of two or more.
    """
    losses = []
    for octave in _RAY:
        with scaled_parameters(model, 2.0**octave):
            losses.append(float(next_token_loss(model(tokens), tokens)))
    least = losses.index(min(losses))
    if least in (0, len(losses) - 1):
        return math.nan
    below, at, above = losses[least - 1 : least + 2]
    # The vertex of the parabola through the three lowest points.
    vertex = 0.5 * (below - above) / (below - 2 * at + above)
    return _RAY[least] + vertex * (_RAY[1] - _RAY[0])


def constructed_claims(frame: pd.DataFrame) -> Iterator[Claim]:
    """Judge the ends of the runs on flipped labels."""
    limited, full = frame[frame["accuracy"] < 1], frame[frame["accuracy"] == 1]
    ratios = limited["norm"] / limited["threshold"]
    at = float(((ratios - 1).abs() <= AT_THRESHOLD).mean())
    rested = limited[limited["growth_per_doubling"].abs() <= STOPPED]
    stopped = len(rested) / max(len(limited), 1)
    growing = float((full["growth_per_doubling"] > STOPPED).mean())
    where = f"accuracy {rested['accuracy'].min():.2f} to {rested['accuracy'].max():.2f}, "
    yield Claim(
        "Gradient descent increases the norm up to a threshold (v1, abstract; homogeneous "
        "networks).",
        verdict(at == 1 and stopped == 1 and growing == 1, corrected=at >= 0.9 and growing == 1),
        f"Of {len(limited)} runs whose accuracy stayed below 1, {at:.0%} ended within "
        f"{AT_THRESHOLD:.0%} of the norm at which growth along their direction stops (norm over "
        f"threshold {ratios.min():.3f} to {ratios.max():.3f}). In {stopped:.0%} growth had stopped "
        f"({where if len(rested) else ''}at most {STOPPED:.0%} while steps last doubled). Of "
        f"{len(full)} runs with accuracy 1, {growing:.0%} still grew. Rule: holds if all three are "
        "100%; with a correction if at least 90% are at their threshold: it is reached, and moves "
        "on as the direction does.",
    )
    ranks = {
        str(name): _rank_correlation(part["accuracy"], part["norm"])
        for name, part in frame.groupby("run")
    }
    least = min(ranks.values())
    yield Claim(
        "That threshold itself rises with training accuracy (v1, abstract; homogeneous networks).",
        verdict(least >= RISING, corrected=least >= 0.5),
        "Rank correlation of final norm and accuracy over shares of flipped labels: "
        + ", ".join(f"{name} {rank:.2f}" for name, rank in ranks.items())
        + f". Rule: holds from {RISING}, with a correction from 0.5. The threshold is a function "
        "of all margins, not of accuracy alone: inputs twice as large halve the k-th power of it "
        "at the same accuracy.",
    )


def natural_claims(frame: pd.DataFrame) -> Iterator[Claim]:
    """Judge the course of norm, threshold and accuracy of a language model, by optimiser."""
    for name, run in frame.groupby("run", sort=False):
        late = run[run["step"] >= _EARLY]
        last = run.iloc[-1]
        gap = (late["norm"] / late["threshold"] - 1).abs().median()
        rank = _rank_correlation(late["accuracy"], late["threshold"])
        growth = float(last["norm"] / run[run["step"] <= last["step"] / 2].iloc[-1]["norm"] - 1)
        near = bool(gap <= AT_THRESHOLD)
        yield Claim(
            f"The same on a language model trained with {name}: the norm grows up to a threshold "
            "that rises with training accuracy, and stops there.",
            verdict(near and rank >= RISING and growth <= STOPPED, corrected=near and rank >= 0.5),
            f"From step {_EARLY} on the norm differed by {gap:.1%} (median) from that of least "
            f"loss along the ray, which rose with accuracy (rank correlation {rank:.2f}). At step "
            f"{last['step']}, at an accuracy of {last['accuracy']:.2f}, growth had "
            f"{'stopped' if growth <= STOPPED else 'not stopped'}: {growth:.1%} while steps last "
            f"doubled. {last['step_share']:.0%} of the growth of the "
            "squared norm is the squared length of the steps, which gradient flow does not have. "
            f"Rule: holds if the first is at most {AT_THRESHOLD:.0%}, the second at least {RISING} "
            f"and growth at most {STOPPED:.0%}; with a correction if the second is at least 0.5, "
            "whatever the last: the norm follows a threshold that still rises.",
        )


def _rank_correlation(first: pd.Series[float], second: pd.Series[float]) -> float:
    return float(first.rank().corr(second.rank()))


def _drawn(frame: pd.DataFrame) -> Figure:
    groups = list(frame.groupby("panel", sort=False))
    figure, axes = panels(len(groups), "The norm, and where it would stop, against accuracy")
    for panel, (name, part) in zip(axes, groups, strict=True):
        for color, (run, rows) in zip(LINES, part.groupby("run", sort=False), strict=False):
            drawn = rows.sort_values("accuracy")
            panel.plot(drawn["accuracy"], drawn["norm"], "o", color=color, ms=4, label=str(run))
            panel.plot(drawn["accuracy"], drawn["threshold"], "o", color=color, ms=8, mfc="none")
        panel.set_title(str(name), size=8.5, color=INK, loc="left").set_parse_math(False)
        panel.set_xlabel("training accuracy", size=8, color=QUIET)
        panel.set_ylabel("norm; open: where growth stops", size=8, color=QUIET)
        panel.legend(frameon=False, fontsize=7)
    return figure
