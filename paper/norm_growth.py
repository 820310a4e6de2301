"""Figure ``norm-growth``: whether the norm grows like the square root of the number of steps."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from paper.claims import Claim, Reproduction, verdict
from paper.language import measured_growth, trained_run
from sat_lens.figures import headline, lines, panels
from sat_lens.norms import Exponent, NormGrowth

# The rules of the verdicts: a norm grew if it ends above this multiple of its start; an exponent
# this close to 1/2 is a square root.
GREW = 1.01
NEAR = 0.1
PARTS = ("embedding", "qk", "ov", "mlp", "layer_norm")


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Follow the norm through training and fit its exponent, raw and without the initial norm."""
    growth = measured_growth(quick, seed, progress)
    return Reproduction(
        name="norm-growth",
        title="The norm of the parameters through training",
        claims=judged(growth),
        frame=growth.frame(),
        figure=_drawn(growth),
        note=f"Measured on {trained_run(quick, seed, progress).setting}. One seed, one model. The "
        "norm with the initial norm taken out is sqrt(|theta|^2 - |theta_0|^2). Exponents are "
        "fitted over the last five doublings of the steps.",
    )


def judged(growth: NormGrowth) -> tuple[Claim, ...]:
    """Judge growth, and the square root, by the measured norms."""
    norms = growth.columns["norm"]
    first, last = float(norms[0]), float(norms[-1])
    share = float(_grown(growth.columns["norm_embedding"]) / _grown(norms))
    return (
        Claim(
            "The norm of the parameters grows during training.",
            verdict(last > GREW * first),
            f"{first:.2f} at step 0, {last:.2f} at step {growth.steps[-1]}; the embedding has "
            f"{share:.0%} of the growth of the squared norm. Rule: it grows if it ends more than "
            "1% above its start.",
        ),
        Claim(
            "It grows in proportion to the square root of the number of steps.",
            verdict(_is_half(growth.raw_exponent), _is_half(growth.exponent)),
            f"Exponent of the raw norm: {growth.raw_exponent}. With the initial norm taken out: "
            f"{growth.exponent}. Rule: an exponent within {NEAR} of 1/2 is a square root; if only "
            "the norm without its initial part has one, that is the correction.",
        ),
    )


def _grown(norms: Tensor) -> Tensor:
    return norms[-1].square() - norms[0].square()


def _is_half(exponent: Exponent) -> bool:
    return abs(exponent.value - 0.5) <= NEAR


def _drawn(growth: NormGrowth) -> Figure:
    table = growth.frame()
    figure, (norms, parts) = panels(
        2, "The norm of the parameters through training", across=2, size=(3.6, 3.3)
    )
    table["sqrt"] = table["norm_grown"].iloc[-1] * np.sqrt(table.index / table.index[-1])
    named = {
        "norm": "raw norm",
        "norm_grown": "initial norm taken out",
        "sqrt": "square root of the step",
    }
    lines(norms, table, named, x="step", y="norm", log_y=True, dashed=["sqrt"])
    names = {f"norm_{part}": part.replace("_", " ") for part in PARTS}
    names |= {"qk_product": "W_Q W_K, per head", "ov_product": "W_V W_O, per head"}
    shares = table[list(names)] / table[list(names)].iloc[0]
    lines(parts, shares, names, x="step", y="norm / initial norm", log_y=True)
    headline(parts, "by component")
    return figure
