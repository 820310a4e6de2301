"""Figure ``narrowing``: attention starts uniform, narrows to distinct tokens, and freezes.

Tian et al. 2023, arXiv 2305.16380, call this "scan and snap". They prove it for one layer without
positions, in which decoder and attention learn at different rates, and show it on WikiText. Here
the text is the source of Python's standard library, and the model one ordinary layer, measured by
:func:`sat_lens.norms.attention_narrowing`.
"""

from __future__ import annotations

import math

import pandas as pd

from paper.claims import Claim, Reproduction, verdict
from paper.language import Setting, train
from paper.network import log_spaced_steps
from sat_lens.demo.corpus import corpus_name
from sat_lens.models import load_tokenizer
from sat_lens.norms.narrowing import SLOW, Narrowing, attention_narrowing

# The rules of the verdicts: nearly uniform is this share of the entropy of uniform attention; a
# fall of the entropy (in nats) or a rank correlation is clear above the other number.
NEARLY_UNIFORM, CLEAR = 0.95, 0.1

FULL = Setting(steps=4096, layers=1, heads=1, context=64, held_out=64)
QUICK = Setting(steps=512, layers=1, heads=1, context=64, batch=8, files=40, held_out=32)


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Train a model of one layer and one head, and follow its attention by key token."""
    run = train(QUICK if quick else FULL, seed, progress)
    kept = {step: run.checkpoints[step] for step in log_spaced_steps(run.last)}
    result = attention_narrowing(
        kept, run.tokens, tokenizer=load_tokenizer(), progress=progress, data_name=corpus_name()
    )
    return Reproduction(
        name="narrowing",
        title="Scan and snap: attention by key token",
        claims=judged(result),
        frame=result.frame().join(_masses(result)),
        figure=result.plot("Scan and snap: the attention of one layer, by key token"),
        note=f"Tian et al. 2023 used WikiText; measured here on {run.setting}. Their theorem is "
        "about one layer without positions or a feed-forward layer, trained by SGD with a decoder "
        "that learns faster than attention; this one has all of these and AdamW. One seed.",
    )


def _masses(result: Narrowing) -> pd.DataFrame:
    """Return the masses that the figure shows: of the most frequent query token on six keys."""
    query = result.queries[0]
    shown = result.keys(query, 6).drop(index="uniform")
    source = repr(result.name(query))
    return shown.rename(columns=lambda key: f"mass on {result.name(key)!r} from {source}")


def judged(result: Narrowing) -> tuple[Claim, ...]:
    """Judge the phases of one training run."""
    table, boundary = result.frame(), result.boundary
    start = table["entropy"].iloc[0] / table["entropy_uniform"].iloc[0]
    low, last = table["entropy"].min(), table["entropy"].iloc[-1]
    narrowed = bool(table["entropy"].iloc[0] - low > CLEAR)
    fastest = table["narrowing"].max()
    later = table["narrowing"].iloc[:0] if boundary is None else table["narrowing"].loc[boundary:]
    again = later.iloc[1:].max() if len(later) > 1 else math.inf
    slow = boundary is not None and bool(again < SLOW * fastest)
    moved = float(table["moved"].max()), float(table["moved"].iloc[-1])
    common = table["commonness"]
    return (
        Claim(
            "Attention starts uniform and narrows (scan).",
            verdict(bool(start >= NEARLY_UNIFORM) and narrowed, corrected=narrowed),
            f"Entropy over key tokens {start:.3f} of that of uniform attention at step 0; "
            f"{table['entropy'].iloc[0]:.3f} nats then, {low:.3f} at its lowest, {last:.3f} at the "
            f"end. Rule: at least {NEARLY_UNIFORM}, and a fall of more than {CLEAR} nats; a fall "
            "alone is the correction.",
        ),
        Claim(
            "It narrows to distinct tokens, away from common ones, which leave open what comes "
            "next.",
            verdict(bool(common.iloc[-1] < -CLEAR), corrected=bool(common.min() < -CLEAR)),
            "Rank correlation of what a key token gets beyond uniform attention with the entropy "
            f"of the next token, given it and the query: {common.iloc[0]:.3f} at step 0, "
            f"{common.min():.3f} at its lowest, {common.iloc[-1]:.3f} at the end. Rule: below "
            f"-{CLEAR} at the end; if only earlier, that the preference passes is the correction.",
        ),
        Claim(
            "Then it freezes (snap).",
            verdict(slow and moved[1] < SLOW * moved[0], corrected=slow),
            f"Phase boundary at step {boundary}; fastest narrowing after it {again:.3f} nats per "
            f"doubling of steps, of all {fastest:.3f}. Mass moved per doubling at most "
            f"{moved[0]:.3f}, in the last {moved[1]:.3f}. Rule: after the boundary both stay below "
            f"{SLOW} of their largest; if only the entropy does, that mass goes on moving between "
            "tokens is the correction.",
        ),
    )
