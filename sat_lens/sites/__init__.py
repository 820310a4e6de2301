"""Where a model's attention can be touched, at which level, and what its heads are called.

A site is one attention module (:class:`AttentionSite`). Sites are found by running the model once
and watching what happens (:func:`attention_sites`), never assumed from a name.
"""

from sat_lens.sites.discovery import attention_sites, has_several_stacks
from sat_lens.sites.selection import (
    Heads,
    ScaleLike,
    ScaleOfHead,
    Selection,
    labels_of,
    select_heads,
    select_with_scales,
)
from sat_lens.sites.site import AttentionSite, Place, head_label, places

__all__ = [
    "AttentionSite",
    "Heads",
    "Place",
    "ScaleLike",
    "ScaleOfHead",
    "Selection",
    "attention_sites",
    "has_several_stacks",
    "head_label",
    "labels_of",
    "places",
    "select_heads",
    "select_with_scales",
]
