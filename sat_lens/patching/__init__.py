"""Patching experiments: what changes in the output when heads are saturated, or restored."""

from sat_lens.patching.result import Checks, HeadSweep
from sat_lens.patching.search import SaturableHeads, saturable_heads
from sat_lens.patching.sweep import sweep_heads

__all__ = ["Checks", "HeadSweep", "SaturableHeads", "saturable_heads", "sweep_heads"]
