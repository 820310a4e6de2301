"""``sat-lens sweep``: saturate head after head, and write what that does to an answer."""

from __future__ import annotations

import argparse
from typing import Any

from sat_lens import models
from sat_lens.cli.shared import check_folder, status_of
from sat_lens.errors import ArgumentError
from sat_lens.figures import figure_bytes
from sat_lens.metrics import logit_difference
from sat_lens.patching import HeadSweep, sweep_heads
from sat_lens.results import write_csv, write_whole
from sat_lens.viz.page import inline_svg, render

COLUMNS = ["effect", "normalised", "random_effect", "random_spread"]
PRINTED_HEADS, HEADS_ON_PAGE = 10, 20


def run(options: argparse.Namespace) -> int:
    """Saturate head after head, and write what that does to "answer rather than wrong"."""
    check_folder(options.out)
    if not options.prompt.strip():
        raise ArgumentError("--prompt holds no text to predict the next token of.")
    tokenizer = models.load_tokenizer(options.model)
    answer, wrong = (_single_token(tokenizer, text) for text in (options.answer, options.wrong))
    if answer == wrong:
        raise ArgumentError(
            f"The answer and the wrong answer are the same token, {options.answer!r}."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    sweep = sweep_heads(
        models.load_model(options.model, progress=not options.quiet),
        options.prompt,
        logit_difference(answer, wrong),
        direction=options.direction,
        baseline="random",
        progress=not options.quiet,
    )
    table, page, result = (options.out / f"sweep.{kind}" for kind in ("csv", "html", "safetensors"))
    figure = options.out / f"sweep.{options.figure_format}"
    write_csv(table, sweep.frame())
    write_whole(figure, figure_bytes(sweep.plot(), options.figure_format))
    write_whole(page, _page(sweep, options).encode())
    sweep.save(result)
    largest = sweep.frame().sort_values("effect", key=abs, ascending=False).head(PRINTED_HEADS)
    print(largest[COLUMNS].to_string(float_format="{:.3f}".format))
    print(f"\nThe page is {page}, the table {table}, the figure {figure}")
    return status_of(sweep.complete)


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ArgumentError(
            f"{text!r} must be one token of this model; it is {pieces}. Name the first token in "
            "which the answers differ, with its leading space if it has one."
        )
    return int(ids[0])


def _page(sweep: HeadSweep, options: argparse.Namespace) -> str:
    frame = sweep.frame()
    order = frame["effect"].abs().sort_values(ascending=False).index[:HEADS_ON_PAGE]
    versions = sweep.provenance.versions.items()
    metric = f"logit of {options.answer!r} minus logit of {options.wrong!r} after the prompt"
    return render(
        "sweep.html",
        styles=["base.css", "sweep.css"],
        scripts=[],
        title="What single heads do to the answer",
        facts={
            "Model": sweep.provenance.model,
            "Prompt": options.prompt,
            "Metric": metric,
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
