"""``sat-lens check``: say which attention modules can be saturated, by trying."""

from __future__ import annotations

import argparse
from typing import Any

from sat_lens.cli.arguments import add_command, add_model

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


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    help_text = "say which attention modules can be saturated, by trying"
    add_model(add_command(chosen, "check", run, help_text))


def run(options: argparse.Namespace) -> int:
    """Try every attention module, and print what came of it."""
    from sat_lens.models import load_model
    from sat_lens.sites.discovery import parts_not_seen
    from sat_lens.verify import verify_sites

    model = load_model(options.model)
    verdicts = verify_sites(model)
    untried = parts_not_seen(model)
    for verdict in verdicts:
        print(verdict)
    for path in untried:
        print(f"{path}: not tried, because it does not run on a few made-up tokens")
    if untried:
        print("To try these too, in Python: sat_lens.verify.verify_sites(model, *your_inputs)")
    found = {verdict.site.level for verdict in verdicts}
    levels = [f"  {level:8} {where}" for level, where in LEVELS.items() if level in found]
    print(LEGEND.format(levels="\n".join(levels) or "  none: nothing could be reached"))
    return 0 if all(verdict.ok for verdict in verdicts) and not untried else 1
