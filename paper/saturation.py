"""Figure ``saturation``: how close a network comes to its saturated version while it trains."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from paper.claims import Claim, Reproduction, number, verdict
from paper.language import measured_growth, trained_run
from sat_lens.figures import headline, lines, panels

# A rise above this is clear.
CLEAR = 0.05
MEASURES = ("cos_saturated", "cos_random", "S", "lean", "loss", "loss_saturated")


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Compare every checkpoint with its saturated version, and with attention to random keys."""
    table = measured_growth(quick, seed, progress).frame()[list(MEASURES)]
    return Reproduction(
        name="saturation",
        title="Soft and saturated through training",
        claims=judged(table),
        frame=table,
        figure=_drawn(table),
        note=f"Measured on {trained_run(quick, seed, progress).setting}. Saturated is the exact "
        "limit of attention alone; the paper multiplies all parameters by a large number instead "
        "(see the figure on scaling). Cosines are of the residual stream after the last layer. "
        "Step 0 is the random initialisation. One seed.",
    )


def judged(table: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge the approach to saturation by the first and the last checkpoint."""
    first, last = table.iloc[0], table.iloc[-1]
    raw, over = (last - first)["cos_saturated"], (last - first)["S"]
    beside = table["cos_saturated"] - table["cos_random"]
    return (
        Claim(
            "Training brings a network close to its saturated version; a randomly initialised one "
            "is far from it.",
            verdict(bool(raw > CLEAR and over > CLEAR), bool(over > CLEAR)),
            f"Raw cosine {first['cos_saturated']:.3f} at random initialisation, "
            f"{last['cos_saturated']:.3f} at the end; with random keys {first['cos_random']:.3f} "
            f"and {last['cos_random']:.3f}. S, the cosine beside that control: "
            f"{number(first['S'])} and {number(last['S'])}. Rule: both rise by more than "
            f"{CLEAR}; if S alone does, taking the control into account is the correction.",
        ),
        Claim(
            "The raw cosine tells how saturated a network is (implied).",
            verdict(bool((beside.iloc[1:] > CLEAR).all())),
            "Cosine to the saturated network minus that with random keys: from "
            f"{beside.min():.3f} (step {beside.idxmin()}) to {beside.max():.3f} (step "
            f"{beside.idxmax()}). Rule: after step 0 it exceeds {CLEAR} at every checkpoint; where "
            "it does not, a cosine is no evidence, because any hard attention gives it.",
        ),
        Claim(
            "Heads move from uniform attention towards single keys.",
            verdict(bool(last["lean"] > first["lean"] + CLEAR)),
            f"Mean lean of the heads (0 uniform, 1 one key) {first['lean']:.3f} at the start, "
            f"{last['lean']:.3f} at the end. Rule: it rises by more than {CLEAR}.",
        ),
    )


def _drawn(table: pd.DataFrame) -> Figure:
    figure, (cosines, measures, losses) = panels(
        3, "Soft and saturated through training", across=3, size=(3.6, 3.3)
    )
    named = {"cos_saturated": "saturated", "cos_random": "random keys"}
    lines(cosines, table, named, x="step", dashed=["cos_random"])
    headline(cosines, "cosine to the soft network")
    words = {"S": "S", "lean": "mean lean of heads"}
    lines(measures, table, words, x="step")
    headline(measures, "beside the control")
    named = {"loss": "soft", "loss_saturated": "saturated"}
    lines(losses, table, named, x="step")
    headline(losses, "loss, nats per token")
    return figure
