"""Words, marks and colours that measurements, figures and pages share."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

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

# Okabe and Ito's colours, warm on the argmax side and blue on the mean side; grey lies between.
ROLE_COLORS = dict(
    zip(ROLES, ("#D55E00", "#CC79A7", "#E69F00", "#8C8C8C", "#56B4E9", "#0072B2"), strict=True)
)
OTHER_COLOR = "#CFCFCF"  # of heads without a role
# Letters, lesser letters, axes, and the ground; pages put their own light and dark ones in place.
INK, QUIET, RULE, PAPER = "#222222", "#666666", "#BBBBBB", "#FFFFFF"
HATCHED = "#999999"  # what was not measured
ON_COLOR, ON_BLUE = "#16191D", "#FEFEFE"  # letters on strong colours, on light and dark pages
NEGATIVE, POSITIVE = "#0072B2", "#D55E00"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")

MINUS, TIMES = "\u2212", "\u00d7"
OFFSET_MARK = "±k"  # of all offsets together, in a legend
TARGET_MARKS = {
    "previous": "←",
    "self": "•",
    "next": "→",
    "first": "⇤",
    "special": "◇",
    "induction": "↻",
    "duplicate": "=",
}
TARGET_WORDS = {
    "previous": "the token before",
    "self": "the token itself",
    "next": "the token after",
    "first": "the first token (a sink)",
    "special": "a special token (a sink)",
    "induction": "what followed this token earlier",
    "duplicate": "an earlier copy of this token",
    "offset": "a fixed distance, in tokens",
}


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless there is one.

    Example:
        >>> counted(1, "sequence"), counted(1200, "sequence")
        ('1 sequence', '1,200 sequences')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def target_mark(target: str) -> str:
    """Return the short mark of a target: a symbol, or the distance of an offset.

    Example:
        >>> target_mark("previous"), target_mark("offset +3"), target_mark("")
        ('←', '+3', '')
    """
    if target.startswith("offset "):
        return target.removeprefix("offset ").replace("-", MINUS)
    return TARGET_MARKS.get(target, target[:1].upper())


def target_kinds(targets: Iterable[str]) -> list[str]:
    """Return which kinds of targets occur, in the order of ``TARGET_WORDS``; offsets are one kind.

    Example:
        >>> target_kinds(["", "offset -3", "self", "offset +2"])
        ['self', 'offset']
    """
    kinds = {target.partition(" ")[0] for target in targets}
    return [name for name in TARGET_WORDS if name in kinds]


def clarity(row: Mapping[str, Any]) -> float:
    """Return how clear a head's role is: the share of its rows that have it alone, in [0, 1].

    A table without the column ``agreement`` gives 1, one where it was not measured 0.

    Example:
        >>> clarity({"agreement": 0.25}), clarity({})
        (0.25, 1.0)
    """
    share = float(row.get("agreement", 1.0))
    return min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0


def visible(text: str) -> str:
    """Return a text in which every character shows: none vanishes, reorders or breaks a line.

    Line ends and tabs become arrows, a text of nothing but white space shows its spaces, and
    control characters, bidirectional marks, odd spaces and lone surrogates are named by number.

    Example:
        >>> visible("\\n  "), visible(" def"), visible("a\\x00b"), visible("\\u202e")
        ('⏎␣␣', ' def', 'a⟨U+0000⟩b', '⟨U+202E⟩')
    """
    if not text:
        return "⟨empty⟩"
    # A joiner shows only between the letters or pictures that it joins.
    blank = not text.strip(_BLANK)
    seen = "".join(_visible_character(character, blank) for character in text)
    return _RUN.sub(lambda run: f"␣{TIMES}{len(run[0])}", seen) if blank else seen


_SHOWN = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_RUN = re.compile("␣{5,}")
_JOINERS = "\u200c\u200d"  # part of words and emoji
_BLANK = " \n\t\r" + _JOINERS


def _visible_character(character: str, blank: bool) -> str:
    if character == " ":
        return "␣" if blank else " "
    if character in _SHOWN:
        return _SHOWN[character]
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"}
    if hidden and (blank or character not in _JOINERS):
        return f"⟨U+{ord(character):04X}⟩"
    return character
