"""``python -m paper``: redo figures of the paper, and judge their claims.

An error of the library becomes one line on standard error and exit status 2, without a traceback.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from paper import FIGURES, Reproduction, reproductions
from paper.claims import PAGE, write_page, write_reproduction
from sat_lens.cli.shared import check_folder, status_of, status_of_work
from sat_lens.errors import ArgumentError

EPILOG = """examples:
  python -m paper all --quick                  a trial of every figure, on the smallest models
  python -m paper norm-growth direction        two figures that share one trained model
  python -m paper grid --optimiser sgd --momentum 0.9 --lr 1e-3:1:10 --wd 0:1:10
                                               a map of where norms grow, of settings of yours
"""
_AXIS = "first:last:count in equal ratios, in equal steps if the first is 0; or a,b,c"
_MOST_VALUES = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    return status_of_work("paper", lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paper",
        description="Redo figures of the paper on norm growth, and judge its claims.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("figures", nargs="+", choices=(*FIGURES, "all"), metavar="FIGURE",
        help=f"{', '.join(FIGURES)}, or all; several share one trained model")  # fmt: skip
    add("--out", type=Path, default=Path("build/paper"),
        help="the folder to write (default: %(default)s)")  # fmt: skip
    add("--quick", action="store_true", help="smaller models and fewer steps: a trial of a minute")
    add("--seed", type=int, default=0, help="of models and data (default: %(default)s)")
    add("--quiet", action="store_true", help="show no progress bars")
    grid = parser.add_argument_group(
        "grid", "Any of these draws one map of your own in place of the two of the figure grid."
    )
    add = grid.add_argument
    add("--lr", metavar="AXIS", help=f"learning rates (1e-4:1e-1:10): {_AXIS}")
    add("--wd", metavar="AXIS", help="weight decays (0:1:10), written likewise")
    add("--optimiser", choices=("adamw", "sgd"), help="(adamw)")
    add("--momentum", type=float, help="of sgd (0)")
    add("--steps", type=int, help="training steps (500)")
    return parser


def _run(options: argparse.Namespace) -> int:
    """Redo the figures; write each with its table, and one page with all verdicts."""
    check_folder(options.out)
    names = tuple(FIGURES) if "all" in options.figures else tuple(dict.fromkeys(options.figures))
    done: list[Reproduction] = []
    complete = True
    try:
        for figure in _figures(names, options):
            options.out.mkdir(parents=True, exist_ok=True)
            done.append(figure)
            write_reproduction(options.out, figure)
            print(f"\n{figure.title}")
            for claim in figure.claims:
                print(f"  {claim.verdict}: {claim.text}\n    {claim.why}")
            if not figure.complete:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        if not done:
            raise
        complete = False
    write_page(options.out, done, complete=complete, quick=options.quick)
    print(f"\nThe page is {options.out / PAGE}")
    return status_of(complete)


def _figures(names: Sequence[str], options: argparse.Namespace) -> Iterator[Reproduction]:
    """Redo the figures of these names, or draw the one map that the options describe."""
    own = {
        name: value
        for name in ("lr", "wd", "optimiser", "momentum", "steps")
        if (value := getattr(options, name)) is not None
    }
    if not own:
        yield from reproductions(
            names, quick=options.quick, seed=options.seed, progress=not options.quiet
        )
        return
    if names != ("grid",):
        raise ArgumentError(f"--{next(iter(own))} is an option of the figure grid alone.")
    from paper.grid import QUICK_SHAPE, QUICK_STEPS, STEPS, growth_grid, reproduction

    grid = growth_grid(
        read_axis(own.get("lr", "1e-4:1e-1:10"), "--lr"),
        read_axis(own.get("wd", "0:1:10"), "--wd"),
        optimiser=own.get("optimiser", "adamw"),
        momentum=own.get("momentum", 0.0),
        steps=own.get("steps", QUICK_STEPS if options.quick else STEPS),
        shape=QUICK_SHAPE if options.quick else None,
        seed=options.seed,
        progress=not options.quiet,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    grid.save(options.out / "grid.safetensors")
    cells = grid.frame().pivot(index="wd", columns="lr", values="outcome")
    print(cells.to_string(float_format="{:.2g}".format))
    yield reproduction([grid])


def read_axis(text: str, option: str) -> list[float]:
    """Return the values of an axis, rounded to six digits.

    Args:
        text: ``first:last:count``, spaced in equal ratios or, where the first is 0, in equal steps;
            or values with commas between them.
        option: What the axis is called on the command line.

    Raises:
        ArgumentError: It is written otherwise, or its values could not be spaced so.

    Example:
        >>> read_axis("1e-4:1e-2:3", "--lr"), read_axis("0:1:3", "--wd"), read_axis("0,2", "--wd")
        ([0.0001, 0.001, 0.01], [0.0, 0.5, 1.0], [0.0, 2.0])
    """
    wrong = ArgumentError(
        f"{option} is first:last:count with 0 <= first < last and a count from 2 to "
        f"{_MOST_VALUES}, such as 1e-4:1e-1:10, or numbers with commas between them; {text!r} was "
        "given."
    )
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first_text, last_text, count_text = text.split(":")
        first, last, count = float(first_text), float(last_text), int(count_text)
    except ValueError as error:
        raise wrong from error
    if not (0 <= first < last < math.inf and 2 <= count <= _MOST_VALUES):
        raise wrong
    shares = [i / (count - 1) for i in range(count)]
    spaced = (last * s if first == 0 else first * (last / first) ** s for s in shares)
    return [float(f"{value:.6g}") for value in spaced]


if __name__ == "__main__":
    sys.exit(main())
