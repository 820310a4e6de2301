"""``sat-lens grid``: map where norms grow, by learning rate and weight decay."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from sat_lens.cli.arguments import add_command, add_quiet
from sat_lens.cli.axes import AXIS_HELP, read_axis
from sat_lens.cli.checks import check_folder
from sat_lens.cli.output import status_of


def add(chosen: Any) -> None:
    """Add the command and its arguments."""
    command = add_command(
        chosen, "grid", run, "train many small models, and map where norms grow or shrink"
    )
    add = command.add_argument
    add("--lr", default="1e-4:1e-1:10", metavar="AXIS", help=f"learning rates: {AXIS_HELP}")
    add("--wd", default="0:1:10", metavar="AXIS", help="weight decays, written likewise")
    add("--optimiser", choices=("adamw", "sgd"), default="adamw")
    add("--momentum", type=float, default=0.0, help="of sgd (default: %(default)s)")
    add("--steps", type=int, default=500, help="training steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="of parameters and batches (default: %(default)s)")
    add("--out", type=Path, default=Path("grid"), help="the folder to write (default: grid)")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    """Train the grid; write its table, its figure and the result."""
    check_folder(options.out)
    rates, decays = read_axis(options.lr, "--lr"), read_axis(options.wd, "--wd")
    from sat_lens.paper.grid import growth_grid
    from sat_lens.results import write_csv, write_whole

    grid = growth_grid(
        rates,
        decays,
        optimiser=options.optimiser,
        momentum=options.momentum,
        steps=options.steps,
        seed=options.seed,
        progress=not options.quiet,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table, figure, result = (options.out / f"grid.{kind}" for kind in ("csv", "svg", "safetensors"))
    drawn = io.BytesIO()
    grid.plot().savefig(drawn, format="svg")
    write_csv(table, grid.frame())
    write_whole(figure, drawn.getvalue())
    grid.save(result)
    cells = grid.frame().pivot(index="wd", columns="lr", values="outcome")
    print(cells.to_string(float_format="{:.2g}".format))
    print(f"\nThe table is {table}, the figure {figure}, the result {result}")
    return status_of(grid.complete)
