"""Figures of "Effects of Parameter Norm Growth During Transformer Training", redone and judged.

Merrill et al. 2021, arXiv 2010.09697. Each figure is redone on a small model that is trained for
it, and each of its claims gets a verdict by a rule that is stated beside the numbers.
"""

from sat_lens.paper.claims import VERDICTS, Claim, Reproduction, Verdict, verdict

__all__ = ["VERDICTS", "Claim", "Reproduction", "Verdict", "verdict"]
