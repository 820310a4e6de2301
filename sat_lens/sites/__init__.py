"""Where a model's attention can be touched, at which level, and what its heads are called.

A model is touched through one door (:mod:`sat_lens.sites.door`), at one of two levels, which are
found by running the model (:mod:`sat_lens.sites.probe`).
"""

from sat_lens.sites.discovery import attention_sites, has_several_stacks
from sat_lens.sites.door import Edit, open_door
from sat_lens.sites.naming import AttentionSite
from sat_lens.sites.selection import Heads, Selection, labels_of, select_heads

__all__ = [
    "AttentionSite",
    "Edit",
    "Heads",
    "Selection",
    "attention_sites",
    "has_several_stacks",
    "labels_of",
    "open_door",
    "select_heads",
]
