"""The common sweep for the command line: a logit difference after one prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.figures import figure_bytes
from sat_lens.metrics import logit_difference
from sat_lens.models import load_model, load_tokenizer
from sat_lens.patching.result import HeadSweep
from sat_lens.patching.sweep import Direction, sweep_heads
from sat_lens.results import write_csv, write_whole
from sat_lens.viz.page import inline_svg, render

N_SHOWN = 20
COLUMNS = ["effect", "normalised", "random_effect", "random_spread"]


@dataclasses.dataclass(frozen=True)
class SweepFiles:
    """Where :func:`run_sweep` has put what."""

    table: Path
    figure: Path
    page: Path
    result: Path


def run_sweep(
    model: str,
    prompt: str,
    answer: str,
    wrong: str,
    out: str | Path,
    *,
    direction: Direction = "noising",
    figure_format: str = "svg",
    progress: bool = True,
) -> tuple[HeadSweep, SweepFiles]:
    """Saturate head after head, and write what that does to "answer rather than wrong".

    Args:
        model: What :func:`sat_lens.load_model` takes.
        prompt: The prompt; the metric is read at its last token.
        answer: The right next token, as text (with its leading space, if it has one).
        wrong: The wrong next token, likewise.
        out: A folder; it is made if it is not there.
        direction: As for :func:`sat_lens.sweep_heads`.
        figure_format: ``"svg"`` or ``"png"``.
        progress: Whether to show a progress bar.

    Returns:
        The result, and the files: a table (CSV), a figure, a page (HTML) with both, and the result
        itself (safetensors).

    Raises:
        ArgumentError: An answer is not one token, or the two are the same.
        FileFormatError: The folder cannot be written.
        ModelError: The model cannot be loaded.
    """
    if figure_format not in ("svg", "png"):
        raise ArgumentError(f'The figure is an "svg" or a "png"; {figure_format!r} was asked for.')
    tokenizer = load_tokenizer(model)
    ids = [single_token(tokenizer, text) for text in (answer, wrong)]
    if ids[0] == ids[1]:
        raise ArgumentError(f"The answer and the wrong answer are the same token, {answer!r}.")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileFormatError(f"{folder} cannot be made a folder: {error.strerror}.") from error
    loaded = load_model(model)
    sweep = sweep_heads(
        loaded,
        prompt,
        logit_difference(*ids),
        direction=direction,
        baseline="random",
        progress=progress,
    )
    files = SweepFiles(
        table=folder / "sweep.csv",
        figure=folder / f"sweep.{figure_format}",
        page=folder / "sweep.html",
        result=folder / "sweep.safetensors",
    )
    write_csv(files.table, sweep.frame())
    write_whole(files.figure, figure_bytes(sweep.plot(), figure_format))
    write_whole(files.page, _page(sweep, prompt, answer, wrong).encode())
    sweep.save(files.result)
    return sweep, files


def single_token(tokenizer: Any, text: str) -> int:
    """Return the id of a text that is one token.

    Raises:
        ArgumentError: It is none, or several.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ArgumentError(
            f"{text!r} must be one token of this model; it is {pieces}. Name the first token in "
            "which the answers differ, with its leading space if it has one."
        )
    return int(ids[0])


def _page(sweep: HeadSweep, prompt: str, answer: str, wrong: str) -> str:
    frame = sweep.frame()
    order = frame["effect"].abs().sort_values(ascending=False).index[:N_SHOWN]
    versions = sweep.provenance.versions.items()
    return render(
        "sweep.html",
        styles=["base.css", "sweep.css"],
        scripts=[],
        title="What single heads do to the answer",
        facts={
            "Model": sweep.provenance.model,
            "Prompt": prompt,
            "Metric": f"logit of {answer!r} minus logit of {wrong!r} after the prompt",
            "Soft model": f"{float(sweep.soft):.3f}",
            "All heads saturated": f"{float(sweep.saturated):.3f}",
            "Versions": ", ".join(f"{name} {version}" for name, version in versions),
        },
        drawing=inline_svg(sweep.plot(), "The effect of every head"),
        into="soft" if sweep.direction == "noising" else "saturated",
        direction=sweep.direction,
        draws=sweep.arguments["controls"],
        notes=sweep.notes,
        columns=COLUMNS,
        rows=[(label, list(frame.loc[label, COLUMNS])) for label in order],
    )
