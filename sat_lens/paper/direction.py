"""Whether the direction of the parameters converges while their norm grows."""

from __future__ import annotations

import itertools

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from sat_lens.norms import NormGrowth
from sat_lens.paper.claims import Claim, Reproduction, verdict
from sat_lens.paper.drawing import lines, panels
from sat_lens.paper.language import LanguageRun, equal_steps, measured_growth, trained_run
from sat_lens.vocabulary import INK

LATE = 5


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Measure how the parameters turn, at equal spaces and per doubling of the steps."""
    run = trained_run(quick, seed, progress)
    growth = measured_growth(quick, seed, progress)
    equal, doubling = successive(run), _doublings(growth)
    return Reproduction(
        name="direction",
        title="The direction of the parameters through training",
        claims=judged(equal, doubling),
        frame=pd.concat({"equal": equal, "doubling": doubling}, names=["spacing"]),
        figure=_drawn(equal, doubling),
        note=f"Measured on {run.setting}. One seed. A path of independent steps at right angles "
        "to the parameters has cosine |theta_t| / |theta_t'| between checkpoints t < t', and "
        "cosine sqrt(t / t') between the ways from the start to them; both are drawn as controls.",
    )


def successive(run: LanguageRun) -> pd.DataFrame:
    """Give the cosine of checkpoints at equal spaces with the one before, by step.

    Columns: ``cosine``, and ``independent``, the cosine that a path of independent steps with the
    same norms would have.
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
            "Successive checkpoints, at equal spaces, point more and more in the same direction.",
            verdict(bool(cosines.iloc[-1] > cosines.iloc[0])),
            f"Cosine {cosines.iloc[0]:.4f} for the first two checkpoints {spacing} steps apart, "
            f"{cosines.iloc[-1]:.4f} for the last two; independent steps would give "
            f"{independent.iloc[0]:.4f} and {independent.iloc[-1]:.4f}. Rule: the last is above "
            "the first. At equal spaces a growing norm alone makes cosines rise.",
        ),
        Claim(
            "The direction of the parameters converges.",
            verdict(last < 0.5 * most, last < 0.8 * most),
            f"{last:.1f} degrees in the last doubling of the steps, at most {most:.1f} in any. "
            "Rule: a direction that converges turns less with each doubling: by less than half "
            "the most at the end; below 0.8 of it, it slows (the correction).",
        ),
        Claim(
            "The path is straighter than a random walk (not in the paper; what can be said "
            "instead of convergence).",
            verdict(bool((gaps > 0).all()), bool(gaps.mean() > 0)),
            f"Cosine between the ways from the start to successive checkpoints: "
            f"{late['straightness'].min():.3f} to {late['straightness'].max():.3f} in the last "
            f"{len(late)}, for a random walk {late['random_walk'].min():.3f} to "
            f"{late['random_walk'].max():.3f}. Rule: above it at each of them; on average only is "
            "the correction.",
        ),
    )


def _doublings(growth: NormGrowth) -> pd.DataFrame:
    return growth.frame()[["rotation_per_doubling", "straightness", "random_walk"]]


def _vector(model: nn.Module) -> Tensor:
    # Tied parameters come once.
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def _drawn(equal: pd.DataFrame, doubling: pd.DataFrame) -> Figure:
    title = "The direction of the parameters through training"
    figure, (cosines, turns, straight) = panels(3, title)
    named = {"cosine": "trained", "independent": "independent steps"}
    lines(cosines, equal, named, x="step", log_x=False, dashed=["independent"])
    cosines.set_title("cosine to the checkpoint before", size=8.5, color=INK, loc="left")
    lines(turns, doubling, {"rotation_per_doubling": "trained"}, x="step")
    turns.set_ylim(bottom=0)
    turns.set_title("degrees per doubling of steps", size=8.5, color=INK, loc="left")
    named = {"straightness": "trained", "random_walk": "random walk"}
    lines(straight, doubling, named, x="step", dashed=["random_walk"])
    straight.set_title("cosine of the ways from the start", size=8.5, color=INK, loc="left")
    return figure
