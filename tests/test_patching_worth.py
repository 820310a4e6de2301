"""What estimates and screens are worth: the figures of docs/patching.md, measured again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_minilm import bridge, folder, sentences

import sat_lens as sl
from sat_lens.data import text_windows
from sat_lens.demo.corpus import held_out_texts
from sat_lens.patching import HeadSweep, sweep_heads

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs" / "patching.md").read_text()
DIRECTIONS = ("noising", "denoising")
Measured = dict[str, dict[str, HeadSweep]]


def swept(model: Any, inputs: Any, metric: Any) -> Measured:
    return {
        direction: {
            method: sweep_heads(
                model, inputs, metric, direction=direction, method=method, progress=False
            )
            for method in ("exact", "attribution", "screen")
        }
        for direction in DIRECTIONS
    }


@pytest.fixture(scope="module")
def on_demo(demo: Any) -> Measured:
    windows = text_windows(demo, held_out_texts(), 96, limit=4)
    return swept(demo, windows, sl.metrics.next_token_loss(windows))


@pytest.fixture(scope="module")
def on_minilm() -> Measured:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder())
    with torch.random.fork_rng():
        # The package holds a bare encoder; the head is drawn.
        torch.manual_seed(0)
        hf = transformers.BertForMaskedLM.from_pretrained(folder(), attn_implementation="eager")
    found = tokenizer(sentences(), truncation=True, max_length=24).input_ids
    ids = torch.tensor([tokens for tokens in found if len(tokens) == 24][:4])
    direction = torch.randn(hf.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def at_first_position(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 0] @ direction).mean()

    return swept(bridge(hf, tokenizer), ids, at_first_position)


def row_of(sweeps: dict[str, HeadSweep]) -> tuple[float, float, int, int]:
    """Correlation, relative error, and the largest tenth: how many were found, of how many."""
    exact, guess = (sweeps[name].item_effects for name in ("exact", "attribution"))
    n_top = len(exact) // 10
    found = set(_largest(exact, n_top)) & set(_largest(guess, n_top))
    correlation = torch.corrcoef(torch.stack([exact, guess]))[0, 1]
    return float(correlation), float((guess - exact).norm() / exact.norm()), len(found), n_top


def _largest(effects: torch.Tensor, count: int) -> list[int]:
    return effects.abs().argsort(descending=True)[:count].tolist()


@pytest.mark.parametrize("which", ["demo", "MiniLM"])
def test_the_page_says_what_is_measured(which: str, request: pytest.FixtureRequest) -> None:
    measured = request.getfixturevalue(f"on_{which.lower()}")
    table = PAGE.split(f"\n| {which}, ")[1].splitlines()[: len(DIRECTIONS)]
    for direction, line in zip(DIRECTIONS, table, strict=True):
        *_, said, correlation, error, found, _ = (cell.strip() for cell in line.split("|"))
        row = row_of(measured[direction])
        assert said == direction
        # The texts are those of the Python at hand, which differ a little from version to version.
        assert [float(correlation), float(error)] == pytest.approx(row[:2], abs=0.05)
        n_found, n_top = map(int, found.split(" of "))
        assert abs(n_found - row[2]) <= 1
        assert n_top == row[3]


def test_the_page_says_what_screens_found(on_demo: Measured, on_minilm: Measured) -> None:
    said = " ".join(PAGE.split())
    found = re.search(
        r"was ([\d.]+) \(demo\) and ([\d.]+) \(MiniLM\) for noising, ([\d.]+) and ([\d.]+) for "
        r"denoising, from samples of (\d+) and (\d+) heads",
        said,
    )
    assert found is not None
    screens = [
        m[direction]["screen"].checks for direction in DIRECTIONS for m in (on_demo, on_minilm)
    ]
    numbers = [float(number) for number in found.groups()]
    assert numbers[:4] == pytest.approx([checks.recall for checks in screens], abs=0.35)
    assert numbers[4:] == [checks.recall_sample for checks in screens[:2]]
