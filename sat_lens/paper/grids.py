"""Where norms grow, by learning rate and weight decay, under AdamW and under SGD."""

from __future__ import annotations

import pandas as pd

from sat_lens.paper.claims import Claim, Reproduction, verdict
from sat_lens.paper.drawing import growth_maps
from sat_lens.paper.grid import STAYED, GrowthGrid, Rule, growth_grid
from sat_lens.paper.network import Shape

USUAL_DECAY = 0.01
MOST, HALF = 0.8, 0.5
RATES: dict[Rule, tuple[float, float]] = {"adamw": (1e-4, 1e-1), "sgd": (1e-3, 1.0)}
DECAYS = (0.0, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 0.6, 1.0)
QUICK_DECAYS = (0.0, 1e-2, 1.0)
QUICK_SHAPE = Shape(width=16, heads=2)
NAMES = {"adamw": "AdamW", "sgd": "SGD"}


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Train both grids, and judge where norms grow."""
    count, steps = (4, 40) if quick else (10, 500)
    grids: list[GrowthGrid] = []
    for optimiser, (first, last) in RATES.items():
        rates = [first * (last / first) ** (i / (count - 1)) for i in range(count)]
        grids.append(
            growth_grid(
                rates,
                QUICK_DECAYS if quick else DECAYS,
                optimiser=optimiser,
                steps=steps,
                shape=QUICK_SHAPE if quick else None,
                seed=seed,
                progress=progress,
            )
        )
        if not grids[-1].complete:
            break
    tables = {grid.optimiser: grid.frame() for grid in grids}
    title = "Where norms grow, by learning rate and weight decay"
    return Reproduction(
        name="grid",
        title=title,
        claims=tuple(claim for name, table in tables.items() for claim in judged(name, table)),
        frame=pd.concat(tables.values(), ignore_index=True),
        figure=growth_maps(grids, title),
        note=f"Each cell is a {grids[0].provenance}, trained for {grids[0].steps} steps from one "
        "initialisation on the same batches of characters; SGD without momentum. Grows and "
        f"shrinks mean by more than {STAYED:.0%}. Where growth ends depends on the initial norm "
        "and on the number of steps: with few steps a small learning rate moves nothing. One "
        "seed.",
        complete=all(grid.complete for grid in grids),
    )


def judged(optimiser: str, table: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge where norms grow at usual weight decay, and whether more of it ends growth."""
    trained = table[table["outcome"] != "diverged"]
    usual = trained[trained["wd"] <= USUAL_DECAY]
    counts = usual["outcome"].value_counts()
    grew = float(counts.get("grows", 0) / max(len(usual), 1))
    lost = len(table) - len(trained)
    growth = trained.pivot(index="lr", columns="wd", values="growth")
    steps = growth.diff(axis=1).stack()
    turned = float((growth.min(axis=1) < 1 - STAYED).mean())
    share = float((steps.dropna() <= STAYED).mean())
    name = NAMES[optimiser]
    return (
        Claim(
            f"Under {name} norms grow at most learning rates, up to a weight decay of "
            f"{USUAL_DECAY:g}.",
            verdict(grew >= MOST, grew >= HALF),
            f"{counts.get('grows', 0)} of {len(usual)} such cells grow, {counts.get('stays', 0)} "
            f"stay and {counts.get('shrinks', 0)} shrink; {lost} cells of all {len(table)} "
            f"diverged and are left out. Rule: {MOST:.0%} of them; from {HALF:.0%} on, the "
            "correction is that it takes the larger learning rates or the smaller decays (see the "
            "map).",
        ),
        Claim(
            f"Under {name} enough weight decay ends growth.",
            verdict(turned >= MOST and share >= MOST, turned >= HALF),
            f"At {turned:.0%} of the learning rates the norm shrinks at some decay up to "
            f"{table['wd'].max():g}; from one decay to the next above it the end norm falls or "
            f"stays in {share:.0%} of the pairs. Rule: {MOST:.0%} for both; {HALF:.0%} of the "
            "learning rates is the correction.",
        ),
    )
