"""SmolLM2-135M, as `make smollm2` leaves it: what the small models of the other tests cannot show.

`make test-real` runs these. The numbers are of four-bit weights, and their bounds wide enough for
the original ones.
"""

from __future__ import annotations

import math
from pathlib import Path

import oracle
import pytest
import torch
from browser import chromium

import sat_lens as sl
from sat_lens.attention import Uniform
from sat_lens.cli import main
from sat_lens.models import model_name

FOLDER = Path(__file__).parents[2] / "models" / "smollm2"
TEXT = (
    "The river rises in the hills north of the town and runs south through farmland for about "
    "forty miles before it reaches the sea. In winter it floods the meadows on both banks, and "
    "for that reason the old road keeps to the ridge, half a mile to the east. The bridge was "
    "built in 1782, after the ferry had sunk twice in three years."
)
N_REPEATED = 40


@pytest.fixture(scope="module")
def model():
    assert FOLDER.is_dir(), f"{FOLDER} is missing: make smollm2"
    return sl.load_model(FOLDER)


@pytest.fixture(scope="module")
def repeated(model):
    """Random tokens, twice: what comes next in the second half can only be copied."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(1000, 40_000, (4, N_REPEATED), generator=generator)
    opening = torch.full((len(half), 1), model.tokenizer.bos_token_id)
    return torch.cat([opening, half, half], 1)


def loss(model, tokens, start=0):
    with torch.no_grad():
        logits = model(tokens)[:, start:-1].log_softmax(-1)
    return -float(logits.gather(-1, tokens[:, start + 1 :, None]).mean())


def test_it_is_the_model_that_it_should_be(model):
    assert model_name(model) == "smollm2"
    assert (model.cfg.n_layers, model.cfg.n_heads) == (30, 9)
    answer = model(model.to_tokens("The capital of France is"))[0, -1].argmax()
    assert model.tokenizer.decode(int(answer)) == " Paris"
    assert len(sl.attention_sites(model)) == 30


@pytest.mark.parametrize("scale", [3.0, math.inf])
def test_attention_is_that_of_the_oracle(model, scale):
    """The oracle knows nothing of sat_lens and computes softmax in float64."""
    tokens = model.to_tokens(TEXT)
    chosen = {site.path: range(site.n_heads) for site in sl.attention_sites(model)}
    with torch.no_grad():
        with oracle.rescaled_softmax(model, chosen, scale, n_heads=9):
            expected = model(tokens)
        with sl.saturate(model, scale=scale):
            found = model(tokens)
    assert (found - expected).abs().max() < 1e-3
    assert expected.abs().max() > 10


def test_saturation_destroys_it_and_the_nearest_rows_do_not(model):
    tokens = model.to_tokens(TEXT)
    soft = loss(model, tokens)
    with sl.saturate(model):
        exact = loss(model, tokens)
    with sl.saturate(model, ties="nearest"):
        nearest = loss(model, tokens)
    assert soft < 4
    assert exact - soft > 3
    assert nearest - soft < 1.5


def test_copying_runs_on_hard_attention(model, repeated):
    """Induction heads can attend to one key each and copy no worse; to all keys, they cannot."""
    roles = sl.head_roles(model, repeated, progress=False)
    heads = list(roles.frame()["induction"].nlargest(8).index)
    soft = loss(model, repeated, start=N_REPEATED)
    with sl.saturate(model, heads=heads):
        exact = loss(model, repeated, start=N_REPEATED)
    with sl.replace_attention(model, Uniform(), heads=heads):
        uniform = loss(model, repeated, start=N_REPEATED)
    assert exact < soft + 0.3
    assert uniform > soft + 4


def test_sweep_values_are_those_of_single_forward_passes(model):
    tokens = model.to_tokens("When Mary and John went to the store, John gave a drink to")
    answer, wrong = (model.to_single_token(name) for name in (" Mary", " John"))
    metric = sl.metrics.logit_difference(answer, wrong)
    heads = ["L0H0", "L3H4", "L10H7", "L17H4", "L18H8", "L24H4", "L29H8"]
    sweep = sl.sweep_heads(model, tokens, metric, heads=heads, progress=False)
    assert sweep.checks.route == "replay"
    for label in heads:
        with torch.no_grad(), sl.saturate(model, heads=label):
            alone = float(metric(model(tokens)))
        assert float(sweep.frame()["value"][label]) == pytest.approx(alone, abs=1e-4)


def test_every_module_passes_the_check(capsys):
    assert main(["check", str(FOLDER)]) == 0
    assert capsys.readouterr().out.count("changes the output (") == 30


def test_its_report_opens_in_a_browser(tmp_path):
    text, page = tmp_path / "text.txt", tmp_path / "report.html"
    text.write_text(TEXT * 4)
    command = ["report", str(FOLDER), "--text", str(text), "--out", str(page)]
    assert main([*command, "--sequences", "2", "--context", "64", "--quiet"]) == 0
    with chromium.running() as port:
        tab = chromium.Page(port)
        tab.open(page)
        tab.wait("document.documentElement.dataset.ready")
        n_heads = tab.run("document.querySelectorAll('#maps [data-head]').length")
        errors = list(tab.errors)
        tab.close()
    assert errors == []
    assert n_heads == 270
