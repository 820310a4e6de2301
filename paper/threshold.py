"""Figure ``threshold``: does the norm grow up to a threshold that rises with training accuracy?

The first version of the paper says so (arXiv 2010.09697v1, abstract). It is tested twice:

- Constructed problems: bias-free ReLU networks learn labels of which a share was flipped, so that
  accuracy is limited. They are homogeneous, so the norm at which growth stops can be computed
  (:func:`paper.flow.stationary_norm`).
- A small language model. It is not homogeneous, so its threshold is found by search: the norm at
  which the loss along the ray through its parameters is least.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from paper.claims import Claim, Reproduction, verdict
from paper.flow import Descent, descend, squares
from paper.network import (
    Shape,
    SmallTransformer,
    characters,
    log_spaced_steps,
    new_network,
    next_token_cross_entropy,
    windows,
)
from sat_lens.demo.corpus import corpus_name, training_texts
from sat_lens.figures import headline, label, panels
from sat_lens.norms.scaled import scaled_parameters
from sat_lens.vocabulary import LINES

CONSTRUCTED, NATURAL = "labels partly flipped", "language model"
# The rules of the verdicts: a norm within this share of its threshold is at it; growth below this
# share while steps double has stopped; a rank correlation from here on means rising.
AT_THRESHOLD, STOPPED, RISING = 0.05, 0.01, 0.9
# Multiples of the present norm, as powers of two, at which the loss along the ray is measured.
_RAY = [k / 32 for k in range(-32, 33)]
# Earlier steps of the language model are not judged.
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
    quick: bool = False, seed: int = 0, progress: bool = True, plan: Plan | None = None
) -> Reproduction:
    """Follow norm and accuracy on constructed problems and on a language model, and judge.

    Args:
        quick: Whether to train little, in less than a minute.
        seed: Seed of the data and of the initial parameters.
        progress: Whether to show progress bars.
        plan: How much to train; None leaves that to ``quick``.
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
    """Train with several shares of flipped labels; return one row per run, the state at its end."""
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


def flipped_run(layers: int, share: float, seed: int, points: int, steps: int) -> Descent:
    """Learn labels of which a share was flipped, by full-batch gradient descent.

    Example:
        >>> flipped_run(2, 0.2, seed=0, points=50, steps=8).degree
        2
    """
    x, labels = flipped_problem(points, share, seed)
    return descend(
        relu_network([2, *[4] * (layers - 1), 1], seed),
        x,
        lambda f: F.softplus(-labels * f[:, 0]).mean(),
        steps=steps,
        learning_rate=0.3,
        degree=layers,
        accuracy=lambda f: float((f[:, 0].sign() == labels).double().mean()),
    )


def relu_network(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Return a bias-free ReLU network; its degree of homogeneity is the number of its layers.

    Example:
        >>> len(relu_network([2, 4, 1], seed=0))
        3
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for wide, narrow in itertools.pairwise(sizes):
            layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def flipped_problem(points: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return points on two sides of a gap, and their labels: the side, flipped for a share."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 2, generator=generator, dtype=torch.float64)
    x[:, 0] += 0.5 * x[:, 0].sign()
    labels = x[:, 0].sign()
    labels[torch.randperm(points, generator=generator)[: round(share * points)]] *= -1
    return x, labels


def language_model_run(optimiser: str, plan: Plan, seed: int, progress: bool) -> pd.DataFrame:
    """Train a small language model; return norm, accuracy and threshold at (half) powers of two."""
    stream = characters(training_texts(), 400_000)
    model = new_network(plan.shape, seed=seed)
    parameters = list(model.parameters())
    stepper: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=0.5)
        if optimiser == "SGD"
        else torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    )
    fixed = windows(stream, plan.shape.context, 32, seed + 1_000_003)
    kept = log_spaced_steps(plan.model_steps, halves_from=1)
    step_term, first, rows = 0.0, squares(parameters), []
    named = f"language model, {optimiser}"
    for step in tqdm(range(plan.model_steps + 1), desc=named, unit="step", disable=not progress):
        if step in kept:
            state = _state(model, fixed)
            grown = state["norm"] ** 2 - first
            state["step_share"] = step_term / grown if grown > 0 else math.nan
            rows.append({"panel": NATURAL, "run": optimiser, "seed": seed, "step": step, **state})
        batch = windows(stream, plan.shape.context, 16, seed + step)
        stepper.zero_grad()
        torch.autograd.backward(next_token_cross_entropy(model(batch), batch))
        before = [p.detach().clone() for p in parameters]
        stepper.step()
        moves = torch._foreach_sub([p.detach() for p in parameters], before)
        step_term += squares(moves)
    return pd.DataFrame(rows)


@torch.no_grad()
def _state(model: SmallTransformer, tokens: Tensor) -> dict[str, float]:
    logits = model(tokens)
    right = logits[:, :-1].argmax(-1) == tokens[:, 1:]
    norm = math.sqrt(squares(list(model.parameters())))
    return {
        "accuracy": float(right.double().mean()),
        "loss": float(next_token_cross_entropy(logits, tokens)),
        "norm": norm,
        "threshold": norm * 2.0 ** least_on_ray(model, tokens),
    }


@torch.no_grad()
def least_on_ray(model: SmallTransformer, tokens: Tensor) -> float:
    """Return log2 of the factor on all parameters at which the loss is least.

    NaN where that factor is not between 1/2 and 2.
    """
    losses = []
    for octave in _RAY:
        with scaled_parameters(model, 2.0**octave):
            losses.append(float(next_token_cross_entropy(model(tokens), tokens)))
    least = losses.index(min(losses))
    if least in (0, len(losses) - 1):
        return math.nan
    below, at, above = losses[least - 1 : least + 2]
    # The vertex of the parabola through the three lowest points.
    vertex = 0.5 * (below - above) / (below - 2 * at + above)
    return _RAY[least] + vertex * (_RAY[1] - _RAY[0])


def constructed_claims(frame: pd.DataFrame) -> Iterator[Claim]:
    """Judge how the runs on flipped labels ended."""
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
    """Judge how norm, threshold and accuracy of a language model went, by optimiser."""
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
    figure, axes = panels(
        len(groups),
        "The norm, and where it would stop, against accuracy",
        across=len(groups),
        size=(3.6, 3.3),
    )
    for panel, (name, part) in zip(axes, groups, strict=True):
        for color, (run, rows) in zip(LINES, part.groupby("run", sort=False), strict=False):
            drawn = rows.sort_values("accuracy")
            panel.plot(drawn["accuracy"], drawn["norm"], "o", color=color, ms=4, label=str(run))
            panel.plot(drawn["accuracy"], drawn["threshold"], "o", color=color, ms=8, mfc="none")
        headline(panel, str(name))
        label(panel, x="training accuracy", y="norm; open: where growth stops")
        panel.legend(frameon=False, fontsize=7)
    return figure
