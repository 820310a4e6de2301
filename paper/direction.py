"""Figure ``direction``: whether the parameters' direction converges while their norm grows."""

from __future__ import annotations

import itertools

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paper.claims import Claim, Reproduction, verdict
from paper.language import LanguageRun, equal_steps, measured_growth, trained_run
from sat_lens.figures import headline, lines, panels

# The path is compared with a random walk at this many checkpoints, the last ones.
LATE = 5


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Measure how the parameters turn, between equally spaced steps and per doubling of steps."""
    run = trained_run(quick, seed, progress)
    growth = measured_growth(quick, seed, progress)
    equal = successive(run)
    doubling = growth.frame()[["rotation_per_doubling", "straightness", "random_walk"]]
    return Reproduction(
        name="direction",
        title="The direction of the parameters through training",
        claims=judged(equal, doubling),
        frame=pd.concat({"equal": equal, "doubling": doubling}, names=["spacing"]),
        figure=_drawn(equal, doubling),
        note=f"Measured on {run.setting}. One seed. A path of independent steps at right angles "
        "to the parameters has cosine |theta_t| / |theta_t'| between checkpoints t < t', and "
        "cosine sqrt(t / t') between their displacements from the start; both are drawn as "
        "controls.",
    )


def successive(run: LanguageRun) -> pd.DataFrame:
    """Return, by step, the cosine of each equally spaced checkpoint with the one before.

    Columns: ``cosine``, and ``independent``, the cosine for a path of independent steps with the
    same norms.
    """
    vectors = {step: _vector(run.checkpoints[step]) for step in equal_steps(run.last)}
    rows = {
        later: {
            "cosine": float(torch.cosine_similarity(before, now, dim=0)),
            "independent": float(before.norm() / now.norm()),
        }
        for (_, before), (later, now) in itertools.pairwise(vectors.items())
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("step")


def judged(equal: pd.DataFrame, doubling: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge convergence by the cosines, by degrees per doubling and by straightness."""
    cosines, independent = equal["cosine"], equal["independent"]
    turns = doubling["rotation_per_doubling"].dropna()
    last, most = float(turns.iloc[-1]), float(turns.max())
    late = doubling.dropna().tail(LATE)
    gaps = late["straightness"] - late["random_walk"]
    spacing = int(equal.index[1] - equal.index[0])
    return (
        Claim(
            "Successive checkpoints, equally spaced, point more and more in the same direction.",
            verdict(bool(cosines.iloc[-1] > cosines.iloc[0])),
            f"Cosine {cosines.iloc[0]:.4f} for the first two checkpoints {spacing} steps apart, "
            f"{cosines.iloc[-1]:.4f} for the last two; independent steps would give "
            f"{independent.iloc[0]:.4f} and {independent.iloc[-1]:.4f}. Rule: the last is above "
            "the first. A growing norm alone makes such cosines rise.",
        ),
        Claim(
            "The direction of the parameters converges.",
            verdict(last < 0.5 * most, last < 0.8 * most),
            f"{last:.1f} degrees in the last doubling of the steps, at most {most:.1f} in any. "
            "Rule: a direction that converges turns less with each doubling. It holds if the last "
            "turn is less than half the largest; below 0.8 of it, slowing is the correction.",
        ),
        Claim(
            "The path is straighter than a random walk (not in the paper; what can be said "
            "instead of convergence).",
            verdict(bool((gaps > 0).all()), bool(gaps.mean() > 0)),
            f"Cosine between the displacements of successive checkpoints from the start: "
            f"{late['straightness'].min():.3f} to {late['straightness'].max():.3f} in the last "
            f"{len(late)}, for a random walk {late['random_walk'].min():.3f} to "
            f"{late['random_walk'].max():.3f}. Rule: above it at each of them; only on average is "
            "the correction.",
        ),
    )


def _vector(model: nn.Module) -> Tensor:
    # Tied parameters come once.
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def _drawn(equal: pd.DataFrame, doubling: pd.DataFrame) -> Figure:
    title = "The direction of the parameters through training"
    figure, (cosines, turns, straight) = panels(3, title, across=3, size=(3.6, 3.3))
    named = {"cosine": "trained", "independent": "independent steps"}
    lines(cosines, equal, named, x="step", log_x=False, dashed=["independent"])
    headline(cosines, "cosine to the checkpoint before")
    lines(turns, doubling, {"rotation_per_doubling": "trained"}, x="step")
    turns.set_ylim(bottom=0)
    headline(turns, "degrees per doubling of steps")
    named = {"straightness": "trained", "random_walk": "random walk"}
    lines(straight, doubling, named, x="step", dashed=["random_walk"])
    headline(straight, "cosine of displacements from the start")
    return figure
