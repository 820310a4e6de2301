"""The ``sat-lens`` command.

Nothing heavy is imported before a command is chosen, so ``--help`` answers at once. An error of
the library becomes one line on standard error and exit status 2; nothing shows a traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.errors import ArgumentError, SatLensError
from sat_lens.version import __version__

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = """examples:
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens check bert-base-uncased         which attention modules can be saturated
"""
MODEL_HELP = (
    'the bundled "demo" (default), a local directory in Hugging Face format, or a hub name such as '
    "gpt2, with an optional @revision"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except SatLensError as error:
        print(f"sat-lens: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sat-lens: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sat-lens",
        description="Saturate the attention of a transformer and see what its softness is for.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sat-lens {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_report(commands)
    _add_roles(commands)
    _add_check(commands)
    return parser


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", _report, "write a page about a model's heads")
    _add_model_and_data(command)
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")


def _add_roles(commands: Any) -> None:
    command = _command(commands, "roles", _roles, "print the role of every head")
    _add_model_and_data(command)
    command.add_argument("--csv", type=Path, help="write the whole table here")
    command.add_argument("--out", type=Path, help="write the result (safetensors) here")
    command.add_argument("--figure", type=Path, help="write the role map (PNG, SVG, PDF) here")


def _add_check(commands: Any) -> None:
    command = _command(
        commands, "check", _check, "say which attention modules can be saturated, by trying"
    )
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_model_and_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=MODEL_HELP)
    command.add_argument(
        "--text", type=Path, metavar="FILE", help="a text file to measure on (default: the corpus)"
    )
    command.add_argument(
        "--sequences", type=int, default=128, help="sequences to measure on (default: %(default)s)"
    )
    command.add_argument(
        "--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress bars")


def _report(options: argparse.Namespace) -> int:
    from sat_lens.demo.job import run_report

    roles = run_report(_load(options), *_windows(options), options.out, not options.quiet)
    print(_short_table(roles.frame()))
    print(f"\nThe report is in {options.out.resolve()}")
    return 0


def _roles(options: argparse.Namespace) -> int:
    from sat_lens.results import write_csv
    from sat_lens.roles import head_roles

    model = _load(options)
    windows, name = _windows(options)
    for path in (options.csv, options.out, options.figure):
        _check_folder(path)
    roles = head_roles(model, windows(model), data_name=name, progress=not options.quiet)
    if options.csv:
        write_csv(options.csv, roles.frame())
    if options.out:
        roles.save(options.out)
    if options.figure:
        from sat_lens.figures import save_figure

        save_figure(roles.plot(), options.figure)
    print(_short_table(roles.frame()))
    return 0


def _check(options: argparse.Namespace) -> int:
    from sat_lens.models import load_model
    from sat_lens.verify import verify_sites

    verdicts = verify_sites(load_model(options.model))
    for verdict in verdicts:
        print(verdict)
    return 0 if all(verdict.ok for verdict in verdicts) else 1


def _load(options: argparse.Namespace) -> Any:
    from sat_lens.models import load_model

    if options.sequences < 1 or options.context < 2:
        raise ArgumentError("--sequences must be at least 1 and --context at least 2.")
    if options.text is not None and not options.text.is_file():
        raise ArgumentError(f"There is no text file {options.text}.")
    return load_model(options.model)


def _windows(options: argparse.Namespace) -> tuple[Any, str]:
    """Give a function from the model to its token windows, and what the text is called."""
    from sat_lens.data import text_windows
    from sat_lens.demo.corpus import corpus_name, held_out_texts

    def texts() -> Any:
        if options.text is None:
            return held_out_texts()
        return [options.text.read_text(encoding="utf-8", errors="replace")]

    def windows(model: Any) -> Any:
        longest = int(getattr(model.cfg, "n_ctx", 0) or options.context)
        return text_windows(model, texts(), min(options.context, longest), options.sequences)

    return windows, corpus_name() if options.text is None else options.text.name


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise ArgumentError(f"There is no folder {path.resolve().parent} to write {path.name} in.")


def _short_table(frame: pd.DataFrame) -> str:
    shown = frame[["role", "target", "lean", "tv_argmax", "tv_mean", "tv_nearest", "agreement"]]
    return shown.to_string(float_format="{:.2f}".format)


if __name__ == "__main__":
    sys.exit(main())
