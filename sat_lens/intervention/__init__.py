"""Saturate attention, or replace it by any transform, while a block of code runs.

The model is as it was when the block ends, also after an exception or an interrupt. Hooks of
others keep working: one that is added later sees, and may act on, the changed values.

To compare soft and saturated activations, :func:`sat_lens.run_with_saturation_cache` does both runs
in one call; to try one head after the other, :func:`sat_lens.sweep_heads` is faster.
"""

from sat_lens.intervention.attach import attach_edits, edits_on
from sat_lens.intervention.edits import (
    Edit,
    NewScores,
    TransformOfHeads,
    bind_transform,
    transform_for,
)
from sat_lens.intervention.managers import (
    attach_transforms,
    observe_attention,
    replace_attention,
    saturate,
    saturation_hooks,
)
from sat_lens.intervention.verify import BridgeTrial, SiteTrial, verify_bridge, verify_sites

__all__ = [
    "BridgeTrial",
    "Edit",
    "NewScores",
    "SiteTrial",
    "TransformOfHeads",
    "attach_edits",
    "attach_transforms",
    "bind_transform",
    "edits_on",
    "observe_attention",
    "replace_attention",
    "saturate",
    "saturation_hooks",
    "transform_for",
    "verify_bridge",
    "verify_sites",
]
