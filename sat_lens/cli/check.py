"""``sat-lens check``: try which attention modules can be saturated."""

from __future__ import annotations

import argparse

from sat_lens import models
from sat_lens.intervention import verify_bridge, verify_sites
from sat_lens.sites.discovery import parts_not_probed

LEGEND = """
One line for each attention module: its name in the model, what it attends to (self or cross), the
number of its heads, and its level, which says where their scores are changed:
{levels}
The trial sends all heads of the module to random keys, which must change the output; in brackets,
the largest change of a logit."""
LEVELS = {
    "scores": "at TransformerLens's hook_attn_scores, before the softmax",
    "softmax": "at the softmax itself, where no hook carries all that it receives",
    "kernel": "in the call of the fused attention kernel",
}


def run(options: argparse.Namespace) -> int:
    """Try every attention module, and print the outcome."""
    model = models.load_model(options.model)
    trials = verify_sites(model)
    untried = parts_not_probed(model)
    for trial in trials:
        print(trial)
    for path in untried:
        print(f"{path}: not tried, because it does not run on a few made-up tokens")
    if untried:
        print("To try these too: sat_lens.intervention.verify_sites(model, *your_inputs) in Python")
    found = {trial.site.level for trial in trials}
    levels = [f"  {level:8} {where}" for level, where in LEVELS.items() if level in found]
    print(LEGEND.format(levels="\n".join(levels) or "  none: nothing could be reached"))
    bridge = verify_bridge(model)
    print(bridge)
    return 0 if all(trial.ok for trial in trials) and not untried and bridge.ok else 1
