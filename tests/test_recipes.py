"""The recipes in hooks/ run as they are shown, and show what they say."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import runpy
import sys

import pytest
import torch
from everyday import everyday

import sat_lens as sl

FOLDER = pathlib.Path(__file__).parents[1] / "hooks"
FILES = sorted(FOLDER.glob("*.py"))


def run(monkeypatch, name, *arguments):
    """Call a recipe's ``main`` as its script would, and leave torch as it was."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with torch.enable_grad():
        return runpy.run_path(str(FOLDER / name))["main"]()


@functools.cache
def shown(name):
    """Give what a recipe returns and prints when it is run as it is; once for all tests."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        return run(patch, name), printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", everyday(FILES, FOLDER / "saturate_heads.py"), ids=lambda path: path.stem
)
def test_each_recipe_runs_is_short_and_is_listed(path):
    found, printed = shown(path.name)
    assert isinstance(found, dict)
    assert found
    assert printed.strip()
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"Run it:  python hooks/{path.name}" in text
    assert 'add_argument("--model", default="demo")' in text
    assert text.count("# --- the part to paste ---") == 1
    assert f"`{path.name}`" in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_the_table_names_no_recipe_that_is_not_there():
    rows = [line for line in (FOLDER / "README.md").read_text().splitlines() if "| `" in line]
    assert sorted(row.split("`")[1] for row in rows) == [path.name for path in FILES]


@pytest.mark.parametrize("heads", [[], ["--heads", "L0H0", "L1H2"]])
def test_saturate_heads(monkeypatch, capsys, heads):
    found = run(monkeypatch, "saturate_heads.py", *heads)
    assert found["hooks_equal_block"] < 1e-5
    assert found["largest_change"] > 1e-3
    assert found["kl"] > 0
    share = found["winning_share"]
    assert share == pytest.approx(1) if not heads else 0 < share < 1
    assert {"soft:", "saturated:"} <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_saturate_heads_at_a_scale_of_one_changes_nothing(monkeypatch):
    found = run(monkeypatch, "saturate_heads.py", "--scale", "1")
    assert found["largest_change"] < 1e-4
    assert found["kl"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("heads", [[], ["--heads", "L0H0", "L1H2"]])
def test_cache_pair(monkeypatch, capsys, heads):
    found = run(monkeypatch, "cache_pair.py", *heads)
    assert found["layers"] == 4
    assert found["largest_move"] > 1e-3
    assert found["s_last"] < 1
    # Equal keys share a row, so a saturated row's maximum is 1 over a whole number.
    shares = 1 / found["hardest_row"]
    assert heads or shares == pytest.approx(round(shares))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("S", "cos_random", "blocks.3.hook_resid_post"))


@pytest.mark.slow
def test_anneal_temperature():
    found, _ = shown("anneal_temperature.py")
    # A trained model does better soft; after the annealing it does better hard.
    assert found["soft_before"] < found["saturated_before"]
    assert found["saturated_after"] < found["soft_after"] < found["soft_before"]
    # Under the schedule the first layer is as it was, and a hard row is one over a whole number.
    assert 0 < found["first_layer"] < 0.9
    assert found["last_layer"] == pytest.approx(1)


@pytest.mark.slow
def test_annealing_is_what_makes_hard_attention_do_better(monkeypatch):
    """The control: the same steps without an intervention leave soft attention ahead."""
    real = sl.saturate

    def only_while_measuring(model, **options):
        return contextlib.nullcontext() if torch.is_grad_enabled() else real(model, **options)

    monkeypatch.setattr("sat_lens.intervention.saturate", only_while_measuring)
    found = run(monkeypatch, "anneal_temperature.py")
    assert found["soft_after"] < found["saturated_after"]


@pytest.mark.slow
def test_train_hard():
    found, _ = shown("train_hard.py")
    # Without a gradient through the patterns, queries and keys do not learn; with it they do.
    assert found["straight_through_saturated"] < found["plain_saturated"] - 0.1


@pytest.mark.slow
def test_patch_with_transformer_lens():
    found, _ = shown("patch_with_transformer_lens.py")
    assert found["noising_apart"] < 1e-4
    assert found["denoising_apart"] < 1e-4
    assert found["largest_effect"] > 0.1
    assert found["gap"] > 0.1
    # Before the first layer the two runs are the same, so patching there changes nothing.
    assert found["restored_before_any_layer"] < 1e-4


@pytest.mark.slow
def test_custom_transform():
    found, _ = shown("custom_transform.py")
    assert found["top_three_keys"] == 3
    assert 1 < found["sparsemax_keys"] < 20
    losses = {name: value for name, value in found.items() if name.endswith("loss")}
    assert len(set(losses.values())) == 4
    assert max(losses, key=losses.get) == "saturated_loss"


@pytest.mark.slow
def test_the_sparsemax_of_the_recipe_against_a_bisection():
    """The projection is (score - t), cut off at 0, for the t at which it sums to 1."""
    sparsemax = runpy.run_path(str(FOLDER / "custom_transform.py"))["sparsemax"]
    scores = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).mul(2)
    scores[:, 8:] = -torch.inf
    low, high = scores.amax(-1, keepdim=True) - 1, scores.amax(-1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (scores - middle).clamp(min=0).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    expected = (scores - low).clamp(min=0)
    torch.testing.assert_close(sparsemax(scores).softmax(-1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_generate_saturated():
    found, _ = shown("generate_saturated.py")
    assert found["saturated"] == found["without cache"]
    assert len({found["soft"], found["saturated"], found["soft prompt"]}) == 3
    # The first new token is chosen by rows of the prompt, which are soft here.
    assert found["soft prompt"][:2] == found["soft"][:2] != found["saturated"][:2]


@pytest.mark.slow
def test_permanent_hooks():
    found, _ = shown("permanent_hooks.py")
    assert found["effect"] > 0.1
    assert max(value for name, value in found.items() if name != "effect") < 1e-4


@pytest.mark.slow
def test_sae_lens_or_other_hooks():
    found, _ = shown("sae_lens_or_other_hooks.py")
    assert found["splice_error"] < 1e-4
    assert found["features_kept"] < 1
    assert found["before"] < 0.9
    assert found["inside"] == pytest.approx(1)


@pytest.mark.slow
def test_track_training():
    found, _ = shown("track_training.py")
    assert found["last_logged"] == found["last_of_trainer"] == 8
    assert found["loss_fell_by"] > 0
    # Attention of a model with random weights is flat.
    assert found["lean_at_random"] < 0.1
