"""The names of head roles, and what they mean in words; shared by measurements and pictures."""

from __future__ import annotations

ROLES = ("argmax", "subset", "argmax-lean", "soft", "mean-lean", "mean")
DESCRIPTIONS = {
    "argmax": "attends to one key at a time",
    "subset": "attends equally to a few keys",
    "argmax-lean": "nearer to one key than to all",
    "soft": "between one key and all",
    "mean-lean": "nearer to all keys than to one",
    "mean": "averages over all visible keys",
}
