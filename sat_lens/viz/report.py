"""The report: one HTML file about one model, to look at, to send, and to open without a network."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from markupsafe import Markup

from sat_lens import figures
from sat_lens.caching import SaturationPair
from sat_lens.errors import ArgumentError
from sat_lens.figures.drawing import head_stacks, measure_groups, panels_of_a_run, records_of
from sat_lens.results import csv_text, write_whole
from sat_lens.roles.result import HeadRoles
from sat_lens.viz.page import inline_svg, render
from sat_lens.viz.patterns import (
    Patterns,
    Tokens,
    check_roles,
    packed,
    patterns_of,
    scale_of,
)
from sat_lens.vocabulary import (
    CAUTION,
    DESCRIPTIONS,
    OFFSET_MARK,
    TARGET_MARKS,
    TARGET_WORDS,
    TIMES,
    clarity,
    counted,
    target_kinds,
    target_mark,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MOST_POSITIONS = 256
SHADES = 5  # of a role's colour, l1 to l5 in report.css
# The name of every model that was built in memory, so that it tells nothing.
_NAMELESS = ("", "external")
_EFFECTS = ("effect", "random_effect", "random_spread")


def write_report(
    path: str | Path,
    *,
    roles: HeadRoles,
    pair: SaturationPair,
    tokens: Tokens | None = None,
    curve: Any = None,
    sweep: Any = None,
    growth: Any = None,
    title: str | None = None,
) -> Path:
    """Write the report of a model as one self-contained HTML file.

    The page makes no request to any network; its Content-Security-Policy forbids them. Its numbers
    are a corpus's (``roles``), its patterns those of one short text (``pair``).

    Args:
        path: Where the page goes; the file appears whole or not at all.
        roles: The roles of all heads.
        pair: Both runs of one text; a batch of 1 of at most 256 positions.
        tokens: What stands at each position, from :func:`sat_lens.viz.token_strings`; with several
            stacks a dict ``{"encoder": [...], "decoder": [...]}``; None numbers the positions.
        curve: A scaling curve, for the section on the spectrum.
        sweep: A result whose ``frame()`` has one row per head (index: label) with the column
            ``effect``, and ``random_effect`` where a random control was run.
        growth: A result whose ``frame()`` has one row per checkpoint, with the column ``step``.
        title: The page's title; None names the model.

    Returns:
        The path of the page.

    Raises:
        ArgumentError: The pair holds no pattern or more than one text, the tokens do not fit it, a
            result lacks a column, or results are of models with other layers or heads. Results of
            models with other names get a note on the page.
        FileFormatError: The file cannot be written.

    Example:
        >>> from pathlib import Path
        >>> import sat_lens as sl, tempfile
        >>> model, text = sl.load_model("demo"), "def area(width, height): return width * height"
        >>> tokens = model.to_tokens(text)
        >>> page = sl.viz.write_report(
        ...     Path(tempfile.mkdtemp()) / "report.html",
        ...     roles=sl.head_roles(model, [text], progress=False),
        ...     pair=sl.run_with_saturation_cache(model, tokens),
        ...     tokens=sl.viz.token_strings(model, tokens),
        ... )
        >>> page.stat().st_size < 2_500_000
        True
    """
    check_roles(roles)
    found = patterns_of(pair)
    _check_size(found)
    _check_same_heads(roles, found, sweep)
    frame = _head_table(roles, sweep)
    maps = _role_maps(frame)
    page = render(
        "report.html",
        styles=["base.css", "patterns.css", "report.css"],
        scripts=["patterns.js", "heads.js", "table.js", "report.js"],
        title=title or f"Head roles of {roles.provenance.model}",
        line=_one_line(roles, pair, frame, maps),
        notes=_names_that_differ(roles, patterns=pair, spectrum=curve, sweep=sweep),
        versions=roles.provenance.versions,
        complete=roles.complete,
        maps=maps,
        legend=_legend(frame),
        caution=CAUTION,
        start=clearest(frame),
        charts=_scale_charts(_frame_of("curve", curve)) if curve is not None else [],
        ranges=_ranges(frame),
        sweep=_sweep(frame, sweep) if sweep is not None else None,
        growth=_step_charts(_frame_of("growth", growth)) if growth is not None else [],
        data=_data(frame, found, tokens, pair, roles),
        csv=csv_text(frame.rename_axis("label")),
    )  # fmt: skip
    write_whole(path, page.encode())
    return Path(path)


def _frame_of(name: str, result: Any) -> pd.DataFrame:
    """Return the table of a result, which must not be empty."""
    frame = result.frame() if callable(getattr(result, "frame", None)) else None
    if not isinstance(frame, pd.DataFrame) or frame.empty:
        raise ArgumentError(
            f"{name} must be a result with a frame() of at least one row; found "
            f"{type(result).__name__}."
        )
    return frame


def _check_same_heads(roles: HeadRoles, found: Sequence[Patterns], sweep: Any) -> None:
    """Raise an ArgumentError if the results are of models with other layers or heads."""
    heads = {(site.stack, site.layer): site.n_heads for site in roles.sites}
    shapes: dict[str, tuple[int, int]] = {}
    for (stack, layer), count in heads.items():
        layers, most = shapes.get(stack, (0, 0))
        shapes[stack] = max(layers, layer + 1), max(most, count)
    others = [
        ("pair", f"{p.site.n_heads} heads in {p.site.path}")
        for p in found
        if heads.get((p.site.stack, p.site.layer)) != p.site.n_heads
    ] + [
        ("sweep", "{} layers of {} heads".format(*shape))
        for stack, shape in getattr(sweep, "shapes", {}).items()
        if shapes.get(stack) != shape
    ]
    for what, other in others:
        own = ", ".join(f"{n} layers of {h} heads{stack and ' in the '}{stack}"
                        for stack, (n, h) in shapes.items())  # fmt: skip
        raise ArgumentError(
            f"The {what} and the roles are of different models: the {what} has {other}, and the "
            f"roles have {own}. Measure both on one model."
        )


def _names_that_differ(roles: HeadRoles, **results: Any) -> list[str]:
    """Note the results that carry the name of another model than the roles do.

    A name is no proof: one model can be loaded from two places, and all models built in memory
    share theirs. So the reader of the page has to judge.
    """
    own = _plain_name(roles)
    names = {what: _plain_name(result) for what, result in results.items()}
    notes = [
        f"The roles were measured on a model called {own}, the {what} on one called {name}."
        for what, name in names.items()
        if own and name and name != own
    ]
    for note in notes:
        log.warning(note)
    return notes


def _plain_name(result: Any) -> str:
    """The last part of a model's name, or nothing where it tells nothing."""
    name = str(getattr(getattr(result, "provenance", None), "model", ""))
    return "" if name in _NAMELESS else PurePath(name).name


def _head_table(roles: HeadRoles, sweep: Any) -> pd.DataFrame:
    frame = roles.frame()
    if sweep is None:
        return frame
    effects = _frame_of("sweep", sweep)
    if "effect" not in effects.columns or not set(effects.index) <= set(frame.index):
        raise ArgumentError(
            "The sweep's frame() needs one row per head, with the labels of the roles and the "
            f"column 'effect'; found the columns {', '.join(map(str, effects.columns))} and labels "
            f"such as {', '.join(map(str, effects.index[:3]))}."
        )
    if effects.index.has_duplicates:
        # A sweep over positions has several rows per head: the largest is shown, as the page says.
        effects = effects.assign(size=effects["effect"].abs()).sort_values(
            "size", ascending=False, kind="stable"
        )
        effects = effects[~effects.index.duplicated()]
    names = [name for name in _EFFECTS if name in effects.columns]
    wanted = [name for name in names if effects[name].notna().any()]
    if "effect" not in wanted:
        raise ArgumentError("The sweep holds no finite effect. Run it on heads that it can patch.")
    return frame.join(effects[wanted])


def _check_size(found: list[Patterns]) -> None:
    longest = max((max(p.soft.shape[-2:]) for p in found), default=0)
    if longest > MOST_POSITIONS:
        raise ArgumentError(
            f"The report shows one short text of at most {MOST_POSITIONS} positions; the pair's "
            f"has {longest}. Run the pair on its beginning."
        )


def _role_maps(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Lay out the clickable map of heads, one panel per stack, as the template reads it."""
    # Stacks may alternate in the table; a cell's index is its place there.
    index = {label: place for place, label in enumerate(frame.index)}
    maps = []
    for stack, part in head_stacks(frame):
        layers = sorted(int(layer) for layer in part["layer"].unique())
        heads = int(part["head"].max()) + 1
        cells = [
            {
                "index": index[label],
                "row": layers.index(int(record["layer"])),
                "column": int(record["head"]),
                "classes": f"r-{record['role'] or 'none'} "
                f"l{max(1, math.ceil(clarity(record) * SHADES))}",
                "mark": target_mark(record["target"]),
                "text": f"{label}: {_role_in_words(record['role'], record['target'])}",
            }
            for label, record in zip(part.index, records_of(part), strict=True)
        ]
        # Numbers of rows and columns are written at every step.
        step = 1 if heads <= 20 else 2
        maps.append(
            {"stack": stack, "layers": layers, "heads": heads, "step": step, "cells": cells}
        )
    return maps


def _role_in_words(role: str, target: str) -> str:
    words = f"{role}, {DESCRIPTIONS[role]}" if role else DESCRIPTIONS[role]
    looks = TARGET_WORDS.get(target) or target.removeprefix("offset ")
    return f"{words}; looks at {looks}" if role and looks else words


def clearest(frame: pd.DataFrame) -> int:
    """Return which row holds the clearest head: the argmax side first, where a head does most."""
    records = records_of(frame)

    def key(index: int) -> tuple[bool, bool, float]:
        record = records[index]
        settled = record["role"] in ("argmax", "subset")
        return settled, settled and bool(record["target"]), clarity(record)

    return max(range(len(records)), key=key)


def _one_line(
    roles: HeadRoles, pair: SaturationPair, frame: pd.DataFrame, maps: list[dict[str, Any]]
) -> str:
    rows = f"{int(frame['n_rows'].max()):,} rows per head"
    sequences = counted(roles.n_sequences, "sequence")
    source = f" of {roles.provenance.data}" if roles.provenance.data else ""
    shape = ", ".join(
        f"{len(each['layers'])} layers {TIMES} {each['heads']} heads"
        + (f" ({each['stack']})" if each["stack"] else "")
        for each in maps
    )
    return (
        f"{roles.provenance.model}: {shape}, measured on {sequences}{source}"
        f" ({rows}, each with {roles.min_keys} keys or more). "
        f"Patterns: one text, soft and at c = {scale_of(pair)}, ties {pair.provenance.ties}."
    )


def _legend(frame: pd.DataFrame) -> dict[str, Any]:
    counts = frame["role"].value_counts()
    return {
        "roles": [
            (role, words, int(counts.get(role, 0)))
            for role, words in DESCRIPTIONS.items()
            if role or role in counts
        ],
        "targets": [
            (TARGET_MARKS.get(name, OFFSET_MARK), name, TARGET_WORDS[name])
            for name in target_kinds(frame["target"])
        ],
    }


def _scale_charts(frame: pd.DataFrame) -> list[Markup]:
    """Draw one small chart per measure against the inverse temperature."""
    return [
        _chart(figures.scaling_curve_figure(frame[names], None), f"{words} against c")
        for words, names in measure_groups(map(str, frame.columns)).items()
    ]


def _step_charts(frame: pd.DataFrame) -> list[Markup]:
    """Draw norms, saturation and losses against steps; of another table every column by itself."""
    table = frame.set_index("step") if "step" in frame.columns else frame
    numeric = table.select_dtypes("number").dropna(axis="columns", how="all")
    drawn = {
        words: figures.training_figure(numeric[names], None)
        for words, names in panels_of_a_run(numeric).items()
    } or {
        str(name): figures.growth_figure(numeric, None, columns=[str(name)], log_y=False)
        for name in numeric
    }
    return [_chart(figure, f"{words} against steps") for words, figure in drawn.items()]


def _chart(figure: Figure, label: str) -> Markup:
    figure.set_size_inches(3.7, 2.5)
    return inline_svg(figure, label)


def _ranges(frame: pd.DataFrame) -> Markup | None:
    """Draw the range of c of each head, unless no head has one."""
    if frame[["c_lo", "c_hi"]].isna().any(axis=1).all():
        return None
    return inline_svg(figures.scale_range_figure(frame, None), "Range of c of every head")


def _sweep(frame: pd.DataFrame, sweep: Any) -> dict[str, Any]:
    effects = frame["effect"].dropna()
    ranked = effects.reindex(effects.abs().sort_values(ascending=False, kind="stable").index)
    rows = sweep.frame().index.value_counts()
    maps = []
    for stack, part in head_stacks(frame):
        grid = part.pivot(index="layer", columns="head", values="effect")
        if grid.notna().any(axis=None):
            full = grid.reindex(range(int(part["layer"].max()) + 1))
            drawn = figures.sweep_figure(
                torch.tensor(full.to_numpy()), None, "effect on the metric"
            )
            maps.append((stack, inline_svg(drawn, f"Effect of saturating each head {stack}")))
    return {
        "maps": maps,
        "ranked": [
            {"label": label, "role": frame.loc[label, "role"], "effect": f"{value:+.3g}"}
            for label, value in ranked.head(12).items()
        ],
        "control": _control(frame),
        "positions": int(rows.max()),
        "notes": getattr(sweep, "notes", []),
    }


def _control(frame: pd.DataFrame) -> str:
    """The size of a random effect: its mean over draws and its spread, taken together."""
    if "random_effect" not in frame.columns:
        return ""
    squares = frame["random_effect"] ** 2
    if "random_spread" in frame.columns:
        squares += frame["random_spread"].fillna(0.0) ** 2
    return f"{math.sqrt(squares.mean()):.3g}"


def _data(
    frame: pd.DataFrame,
    found: list[Patterns],
    tokens: Tokens | None,
    pair: SaturationPair,
    roles: HeadRoles,
) -> dict[str, Any]:
    texts: list[list[str]] = []
    sites: list[dict[str, Any]] = []
    where: dict[str, list[int]] = {}
    for patterns in found:
        for head, label in enumerate(patterns.site.labels):
            where[label] = [len(sites), head]
        sites.append(packed(patterns, range(patterns.site.n_heads), tokens, texts))
    return {
        "labels": [str(label) for label in frame.index],
        "columns": frame.to_dict("list"),
        "masses": list(TARGET_MARKS),
        "descriptions": DESCRIPTIONS,
        "targets": TARGET_WORDS,
        "where": [where.get(str(label)) for label in frame.index],
        "sites": sites,
        "texts": texts,
        "start": clearest(frame),
        "scale": scale_of(pair),
        "ties": pair.provenance.ties,
        "provenance": dataclasses.asdict(roles.provenance),
    }
