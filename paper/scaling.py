"""Figure ``scaling``: is a trained network closer to its saturated version than a random one?

Parameters are multiplied by c in two ways: all of them, as in the paper, and the projections of
queries and keys alone, which multiplies scores by c squared and changes nothing else.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from paper.claims import Claim, Reproduction, number, verdict
from paper.language import LanguageRun, trained_run
from sat_lens.figures import headline, lines, panels
from sat_lens.norms import homogeneity_curve
from sat_lens.norms.scaled import Which

# A difference above this is clear.
CLEAR = 0.05
SCALES = (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0, 1000.0)
ALL, SCORES = "all parameters", "queries and keys"
TRAINED, RANDOM = "trained", "random initialisation"


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Measure similarity to the saturated network against c, trained and untrained."""
    run = trained_run(quick, seed, progress)
    table = measured(run, progress)
    return Reproduction(
        name="scaling",
        title="Similarity to the saturated network as parameters grow",
        claims=judged(table),
        frame=table,
        figure=_drawn(table),
        note=f"Measured on {run.setting}. The saturated network is the one at c = {SCALES[-1]:g}; "
        "the control has random keys in its place. Queries and keys times c means W_Q and W_K "
        "alone, so that scores grow with c squared. One seed; small and causal: the paper's "
        "figures are of large pretrained models.",
    )


def measured(run: LanguageRun, progress: bool) -> pd.DataFrame:
    """Measure both ways to grow on both networks: one row per way, network and c."""
    ways: dict[str, Which] = {ALL: "all", SCORES: "qk"}
    found = {
        (grown, network): homogeneity_curve(
            run.lens(step), run.tokens, scales=SCALES, which=which, seed=run.seed, progress=progress
        ).frame()
        for grown, which in ways.items()
        for network, step in ((TRAINED, run.last), (RANDOM, 0))
    }
    return pd.concat(found, names=["grown", "network"]).reset_index()


def judged(table: pd.DataFrame) -> tuple[Claim, ...]:
    """Judge convergence with c, and trained against random, for both ways to grow."""
    near = {n: float(_row(table, ALL, n, 100.0)["cos_saturated"]) for n in (TRAINED, RANDOM)}
    return (
        Claim(
            "As all parameters grow together, a network approaches a saturated one.",
            verdict(min(near.values()) > 0.99, min(near.values()) > 0.9),
            f"Cosine between c = 100 and c = {SCALES[-1]:g}: {near[TRAINED]:.4f} trained, "
            f"{near[RANDOM]:.4f} random. Rule: above .99 for both; above .9 is the correction.",
        ),
        _nearer(table, ALL, "with all parameters multiplied, as in the paper"),
        _nearer(table, SCORES, "with attention alone saturated"),
    )


def _nearer(table: pd.DataFrame, grown: str, words: str) -> Claim:
    trained, random = (_row(table, grown, network, 1.0) for network in (TRAINED, RANDOM))
    raw = trained["cos_saturated"] - random["cos_saturated"]
    larger = [_row(table, grown, network, 2.0)["cos_saturated"] for network in (TRAINED, RANDOM)]
    over = trained["S"] - random["S"]
    return Claim(
        f"A trained network is nearer to its saturated version than a random one, {words}.",
        verdict(bool(raw > CLEAR and over > CLEAR), bool(over > CLEAR)),
        f"Raw cosine at c = 1: {trained['cos_saturated']:.3f} trained (random keys "
        f"{trained['cos_random']:.3f}), {random['cos_saturated']:.3f} random (random keys "
        f"{random['cos_random']:.3f}). S: {number(trained['S'])} and "
        f"{number(random['S'])}. At c = 2 the cosines are {larger[0]:.3f} and {larger[1]:.3f}. "
        f"Rule: nearer by more than {CLEAR} in both at c = 1; in S alone, taking the control into "
        "account is the correction.",
    )


def _row(table: pd.DataFrame, grown: str, network: str, c: float) -> pd.Series:
    chosen = (table["grown"] == grown) & (table["network"] == network) & (table["c"] == c)
    return table[chosen].iloc[0]


def _drawn(table: pd.DataFrame) -> Figure:
    figure, axes = panels(
        2, "Similarity to the saturated network as parameters grow", across=2, size=(3.6, 3.3)
    )
    for panel, grown in zip(axes, (ALL, SCORES), strict=True):
        part = table[table["grown"] == grown].pivot(index="c", columns="network")
        shown = pd.DataFrame(
            {
                f"{network} {name}": part[name, network]
                for network in (TRAINED, RANDOM)
                for name in ("cos_saturated", "cos_random")
            }
        )
        words = {
            f"{TRAINED} cos_saturated": "trained",
            f"{RANDOM} cos_saturated": "random initialisation",
            f"{TRAINED} cos_random": "trained, to random keys",
            f"{RANDOM} cos_random": "random, to random keys",
        }
        controls = [name for name in words if name.endswith("cos_random")]
        lines(panel, shown, words, x="c", y="cosine", dashed=controls, legend=False)
        headline(panel, f"{grown} times c")
    named = axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure
