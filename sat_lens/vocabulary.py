"""The names of head roles, and what they mean in words; shared by measurements and pictures."""

from __future__ import annotations

# Said wherever a role is shown.
CAUTION = "A role describes the shape of attention only: an untrained model labels every head mean."
ROLES = ("argmax", "subset", "argmax-lean", "soft", "mean-lean", "mean")
# A head of which no row was counted has no role; its name is the empty string.
DESCRIPTIONS = {
    "argmax": "attends to one key at a time",
    "subset": "attends to some keys equally",
    "argmax-lean": "nearer to one key than to all",
    "soft": "between one key and all",
    "mean-lean": "nearer to all keys than to one",
    "mean": "averages over all visible keys",
    "": "no row counted",
}
