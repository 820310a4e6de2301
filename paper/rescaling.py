"""Figure ``rescaling``: how much of a growing norm is mere rescaling of weight pairs.

Scores depend on ``W_Q`` and ``W_K`` only through their product, so a norm that grows because one of
them grows while the other shrinks says nothing about the network. Balancing a pair removes that
part (:func:`sat_lens.norms.rescaling_share`).
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from paper.claims import Claim, Reproduction, verdict
from paper.language import LanguageRun, trained_run
from sat_lens.figures import headline, lines, panels
from sat_lens.norms import rescaling_share

# The rule of the verdict: shares of the growth that balancing removes.
LITTLE, MOST = 0.05, 0.5
PAIRS = {"qk": "W_Q, W_K", "vo": "W_V, W_O", "mlp": "mlp"}
TITLE = "How much of the norm is mere rescaling"


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Balance the weight pairs of every checkpoint, and judge what that removes."""
    run = trained_run(quick, seed, progress)
    table = measured(run)
    return Reproduction(
        name="rescaling",
        title=TITLE,
        claims=judged(table),
        frame=table,
        figure=_drawn(table),
        note=f"Measured on {run.setting}. One seed. Pairs are queries with keys (positions are "
        "rotary, which leaves one number for each plane that they turn), values with outputs, and "
        "the two linear matrices of each gated feed-forward layer; gains, embeddings and gates "
        "belong to none. Rescalings between layers and norms are not looked at.",
    )


def measured(run: LanguageRun) -> pd.DataFrame:
    """Return, by step, the squared norms of all pairs, raw and balanced, and the shares removed.

    Columns: ``raw`` and ``minimal``, the squared norms of all pairs together, as they are and after
    the best rescaling; ``share`` of the raw one that this removes, and that of each kind of pair
    (``share_qk``, ``share_vo``, ``share_mlp``); ``share_of_model``, the same part of the squared
    norm of all parameters.
    """
    return pd.DataFrame.from_dict(
        {step: _row(run.checkpoints[step]) for step in sorted(run.checkpoints)}, orient="index"
    ).rename_axis("step")


def _row(model: object) -> dict[str, float]:
    found = rescaling_share(model)
    squares = found.frame()[["raw", "minimal"]].pow(2)
    of_pair = squares.groupby("pair").sum()
    raw, minimal = squares.sum()
    shares = 1 - of_pair["minimal"] / of_pair["raw"]
    named = {f"share_{name}": float(shares[pair]) for name, pair in PAIRS.items()}
    row = {"raw": raw, "minimal": minimal, "share": 1 - minimal / raw}
    return row | named | {"share_of_model": found.share}


def judged(table: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge whether the pairs still grow once rescaling is taken out."""
    first, last = table.iloc[0], table.iloc[-1]
    raw, kept = (last[name] - first[name] for name in ("raw", "minimal"))
    removed = 1 - kept / raw
    by_pair = ", ".join(f"{last[f'share_{name}']:.1%} {pair}" for name, pair in PAIRS.items())
    return (
        Claim(
            "A growing norm is growth of the network, not mere rescaling of weight pairs "
            "(implied).",
            verdict(bool(raw > 0 and removed <= LITTLE), bool(raw > 0 and removed <= MOST)),
            f"The squared norm of all pairs went from {first['raw']:.1f} to {last['raw']:.1f}, and "
            f"balanced from {first['minimal']:.1f} to {last['minimal']:.1f}. Balancing removes "
            f"{first['share']:.1%} of it at step 0 and {last['share']:.1%} at step "
            f"{table.index[-1]} ({by_pair}), {last['share_of_model']:.2%} of that of all "
            f"parameters. Rule: at most {LITTLE:.0%} of the growth is removed; up to {MOST:.0%} "
            "the correction is to give balanced norms.",
        ),
    )


def _drawn(table: pd.DataFrame) -> Figure:
    figure, (norms, shares) = panels(2, TITLE, across=2, size=(3.6, 3.3))
    lines(norms, table, {"raw": "as they are", "minimal": "balanced"}, x="step", dashed=["minimal"])
    headline(norms, "squared norm of all pairs")
    named = {f"share_{name}": pair for name, pair in PAIRS.items()}
    lines(shares, table, named, x="step")
    shares.set_ylim(bottom=0)
    headline(shares, "share that balancing removes")
    return figure
