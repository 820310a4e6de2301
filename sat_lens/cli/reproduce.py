"""``sat-lens reproduce``: redo figures of the paper on norm growth, and judge their claims."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.cli.arguments import add_command, add_quiet
from sat_lens.cli.checks import check_folder
from sat_lens.cli.output import status_of

if TYPE_CHECKING:
    from sat_lens.paper import Reproduction

NAMES = (
    "norm-growth",
    "direction",
    "saturation",
    "scaling",
    "heads",
    "grid",
    "rescaling",
    "threshold",
    "narrowing",
)


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(
        chosen, "reproduce", run, "redo figures of the paper on norm growth, and judge its claims"
    )
    add = command.add_argument
    add("figures", nargs="+", choices=(*NAMES, "all"), metavar="FIGURE",
        help=f"{', '.join(NAMES)}, or all; several share one trained model")  # fmt: skip
    add("--out", type=Path, default=Path("paper"), help="the folder to write (default: paper)")
    add("--quick", action="store_true", help="smaller models and fewer steps: a trial of a minute")
    add("--seed", type=int, default=0, help="of models and data (default: %(default)s)")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    """Redo the figures; write each with its table, and one page with all verdicts."""
    check_folder(options.out)
    from sat_lens.paper.page import write_page, write_reproduction
    from sat_lens.paper.registry import reproductions

    names = NAMES if "all" in options.figures else tuple(dict.fromkeys(options.figures))
    options.out.mkdir(parents=True, exist_ok=True)
    done: list[Reproduction] = []
    found = reproductions(names, quick=options.quick, seed=options.seed, progress=not options.quiet)
    complete = True
    try:
        for figure in found:
            done.append(figure)
            write_reproduction(options.out, figure)
            _show(figure)
            if not figure.complete:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not done:
            raise
        complete = False
    page = write_page(options.out, done, complete=complete, quick=options.quick)
    print(f"\nThe page is {page}")
    return status_of(complete)


def _show(figure: Reproduction) -> None:
    print(f"\n{figure.title}")
    for claim in figure.claims:
        print(f"  {claim.verdict}: {claim.text}\n    {claim.why}")
