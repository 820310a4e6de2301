"""The ``sat-lens`` command.

Nothing heavy is imported before a command is chosen, so ``--help`` answers at once. An error of
the library becomes one line on standard error and exit status 2; nothing shows a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_lens.errors import ArgumentError, FileFormatError, SatLensError
from sat_lens.version import __version__

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from sat_lens.roles import HeadRoles

EXAMPLES = """examples:
  sat-lens report                          the demo model over the bundled corpus
  sat-lens report gpt2 --text notes.txt    a hub model over a text of yours
  sat-lens roles ./my-model --csv out.csv  the head-role table of a local model
  sat-lens roles --shard 2/8 --out 2.st    measure the second of eight parts of the text
  sat-lens merge 1.st 2.st --out all.st    put such parts together
  sat-lens check bert-base-uncased         which attention modules can be saturated
"""
PROMPT = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, """
SHOWN_TOKENS = 64
CURVE_SEQUENCES = 8
INTERRUPTED = 130
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
        return INTERRUPTED
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
    _add_merge(commands)
    _add_check(commands)
    return parser


def _add_report(commands: Any) -> None:
    command = _command(commands, "report", _report, "write a page about a model's heads")
    _add_model_and_data(command)
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write")
    command.add_argument("--prompt", help="the short text whose attention the page shows")


def _add_roles(commands: Any) -> None:
    command = _command(commands, "roles", _roles, "print the role of every head")
    _add_model_and_data(command)
    command.add_argument("--csv", type=Path, help="write the whole table here")
    command.add_argument("--out", type=Path, help="write the result (safetensors) here")
    command.add_argument("--figure", type=Path, help="write the role map (PNG, SVG, PDF) here")
    command.add_argument(
        "--shard", metavar="I/N", help="read every N-th batch only, starting with the I-th"
    )


def _add_merge(commands: Any) -> None:
    command = _command(commands, "merge", _merge, "merge the role statistics of shards")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of roles --out")
    command.add_argument("--out", type=Path, help="write the merged result here")


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
        "--sequences", type=int, default=64, help="sequences to measure on (default: %(default)s)"
    )
    command.add_argument(
        "--context", type=int, default=256, help="tokens in a sequence (default: %(default)s)"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress bars")


def _report(options: argparse.Namespace) -> int:
    from sat_lens.caching import run_with_saturation_cache
    from sat_lens.roles import head_roles
    from sat_lens.spectrum import scaling_curve
    from sat_lens.viz import token_strings, write_report

    _check_folder(options.out)
    model = _load(options)
    windows, name = _windows(options, model)
    progress = not options.quiet
    roles = head_roles(model, windows, data_name=name, progress=progress)
    curve = scaling_curve(model, windows[:CURVE_SEQUENCES], data_name=name, progress=progress)
    shown = _shown_tokens(options, model, windows)
    pair = run_with_saturation_cache(model, shown, names_filter=_is_pattern)
    strings = token_strings(model, shown)
    write_report(options.out, roles=roles, pair=pair, tokens=strings, curve=curve)
    print(_short_table(roles.frame()))
    print(f"\nThe report is in {options.out.resolve()}")
    return 0


def _shown_tokens(options: argparse.Namespace, model: Any, windows: Tensor) -> Tensor:
    """Choose the short text whose patterns the page shows."""
    if options.prompt is None and options.text is not None:
        return windows[:1, :SHOWN_TOKENS]
    tokens: Tensor = model.to_tokens(options.prompt or PROMPT)
    return tokens[:, :SHOWN_TOKENS]


def _is_pattern(name: str) -> bool:
    return name.endswith("hook_pattern")


def _roles(options: argparse.Namespace) -> int:
    from sat_lens.roles import head_roles

    for path in (options.csv, options.out, options.figure):
        _check_folder(path)
    shard = _shard(options.shard)
    model = _load(options)
    windows, name = _windows(options, model)
    with _processes():
        progress = not options.quiet and _is_first_process()
        roles = head_roles(model, windows, shard=shard, data_name=name, progress=progress)
        return _write_roles(roles, options) if _is_first_process() else 0


def _write_roles(roles: HeadRoles, options: argparse.Namespace) -> int:
    from sat_lens.results import write_csv

    if options.csv:
        write_csv(options.csv, roles.frame())
    if options.out:
        roles.save(options.out)
    if options.figure:
        _save_figure(roles, options.figure)
    print(_short_table(roles.frame()))
    if not roles.complete:
        print("Interrupted: these are the numbers of what was read.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _save_figure(roles: HeadRoles, path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ArgumentError(f"A figure is a .png, .svg or .pdf file; {path.name} is none of these.")
    roles.plot().savefig(path, dpi=150)


def _merge(options: argparse.Namespace) -> int:
    from sat_lens.roles import HeadRoles, merge

    _check_folder(options.out)
    parts, broken = [], 0
    for path in options.files:
        try:
            parts.append(HeadRoles.load(path))
        except FileFormatError as error:
            print(f"sat-lens: left out: {error}", file=sys.stderr)
            broken += 1
    merged = merge(parts)
    if options.out:
        merged.save(options.out)
    print(_short_table(merged.frame()))
    print(f"\n{len(parts)} files merged, {merged.n_sequences} sequences in all")
    return 1 if broken else 0


@contextlib.contextmanager
def _processes() -> Iterator[None]:
    """Join the other processes where torchrun started several; each then reads its share."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ArgumentError(f"A shard is written i/n, such as 2/8; {text!r} was given.")
    return int(index), int(count)


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


def _windows(options: argparse.Namespace, model: Any) -> tuple[Tensor, str]:
    """Cut the chosen text into windows, and say what the text is called."""
    from sat_lens.data import text_windows
    from sat_lens.demo.corpus import corpus_name, held_out_texts

    texts: Iterable[str] = held_out_texts()
    if options.text is not None:
        texts = [options.text.read_text(encoding="utf-8", errors="replace")]
    context = min(options.context, int(getattr(model.cfg, "n_ctx", 0) or options.context))
    windows = text_windows(model, texts, context, options.sequences)
    return windows, corpus_name() if options.text is None else options.text.name


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise ArgumentError(f"There is no folder {path.resolve().parent} to write {path.name} in.")


def _short_table(frame: pd.DataFrame) -> str:
    shown = frame[["role", "target", "lean", "tv_argmax", "tv_mean", "tv_nearest", "agreement"]]
    return shown.to_string(float_format="{:.2f}".format)


if __name__ == "__main__":
    sys.exit(main())
