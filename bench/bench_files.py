"""Work on files: growth over checkpoints, the report; and how long things take to start."""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sat_lens as sl
from bench import by_hand
from bench.measure import Target, Way
from bench.models import bridge, forward, gpt2, tokens
from bench.sizes import MIDDLE, QUICK, SHORT, THIRD, rounds

HEAVY = "torch" if QUICK else "transformer_lens"
STEPS = (0, 8, 16, 32)
PROMPT = "def area(width, height):\n    return width * height\n\nprint(area(3, 4))"


def bench_norm_growth(compare: Any, tmp_path: Path) -> None:
    """Norms, rotation and products of heads over four checkpoints, read from files."""
    model = gpt2(THIRD)
    folders = [tmp_path / f"checkpoint-{step}" for step in STEPS]
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1.1
    x = tokens(THIRD, SHORT)
    ways = [
        Way(
            f"{len(STEPS)} checkpoints",
            lambda: sl.norm_growth(tmp_path, progress=False),
            lambda: by_hand.norm_growth(folders, THIRD.heads),
        )
    ]
    compare("Norm growth", f"{SHORT} for the forward", forward(model, x), ways, rounds=rounds(3))


def bench_report(compare: Any, tmp_path: Path) -> None:
    """Writing the page of the demo model from results that are there."""
    model = sl.load_model("demo")
    x = model.to_tokens(PROMPT)
    roles = sl.head_roles(model, x, progress=False)
    pair = sl.run_with_saturation_cache(model, x)
    strings = sl.viz.token_strings(model, x)
    soft, hard = pair.soft.cache, pair.saturated.cache

    def write() -> Path:
        return sl.write_report(tmp_path / "ours.html", roles=roles, pair=pair, tokens=strings)

    ways = [
        Way(
            "the page (beside: circuitsvis, patterns only)",
            write,
            lambda: by_hand.pattern_page(tmp_path / "theirs.html", soft, hard, strings),
        )
    ]
    compare("Report writing, demo", f"1 x {x.shape[1]}", forward(model, x), ways, rounds=rounds(5))


def bench_corpus(compare: Any) -> None:
    """A pass over more prompts takes more time, and no more memory."""
    model, size = bridge(gpt2(THIRD)), MIDDLE
    corpus = [tokens(THIRD, size).roll(i, 1) for i in range(4)]

    def roles(n: int) -> Any:
        return sl.head_roles(model, corpus[:n], progress=False)

    ways = [Way(f"head_roles, {n} of 4 batches", functools.partial(roles, n)) for n in (1, 2, 4)]
    compare(
        "Corpus",
        f"batches of {size}",
        forward(model, corpus[0]),
        ways,
        rounds=rounds(3),
        model=model,
    )


def bench_start(compare_time: Any, tmp_path: Path) -> None:
    """Imports and commands in fresh processes; the plain one imports TransformerLens."""
    every_name = f"import {HEAVY}, sat_lens as s; [getattr(s, n) for n in s.__all__]"
    report = ["report", "--quiet", "--sequences", "8", "--out", str(tmp_path / "report.html")]
    ways = [
        Way(
            "import sat_lens besides",
            _python(f"import {HEAVY}, sat_lens"),
            targets=(Target("seconds more", 0.3),),
        ),
        Way("every name of its surface besides", _python(every_name)),
        Way("sat-lens --help", _command("--help"), targets=(Target("seconds", 1.0),)),
        Way("sat-lens report, 8 sequences", _command(*(["--version"] if QUICK else report))),
    ]
    section, plain = "Start, beside import transformer_lens", _python(f"import {HEAVY}")
    compare_time(
        section, "fresh process", plain, ways, rounds=rounds(3), clock=_children, warm=False
    )


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _python(source: str) -> Callable[[], object]:
    command = [sys.executable, "-c", source]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def _command(*arguments: str) -> Callable[[], object]:
    return _python(f"from sat_lens.cli import main; raise SystemExit(main({[*arguments]!r}))")
