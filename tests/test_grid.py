from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from paper.cells import (
    AT_ONCE,
    SGD,
    AdamW,
    cell,
    losses_and_gradients,
    stacked,
    train_cells,
)
from paper.grid import GrowthGrid, growth_grid
from paper.network import Shape, new_network, next_token_cross_entropy
from sat_lens.errors import ArgumentError, FileFormatError

SHAPE = Shape(vocabulary=11, context=9, width=8, layers=2, heads=2)
RATES = torch.tensor([1e-3, 1e-3, 3e-2, 1e-1])
DECAYS = torch.tensor([0.0, 0.5, 0.1, 1.0])
STEPS = 20


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(11, (3, 9), generator=draw) for _ in range(STEPS)]


def trained_alone(make, batches):
    model = new_network(SHAPE, seed=3)
    optimiser = make(model.parameters())
    for tokens in batches:
        optimiser.zero_grad()
        next_token_cross_entropy(model(tokens), tokens).backward()
        optimiser.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def trained_together(rule, batches):
    model = new_network(SHAPE, seed=3)
    start = stacked(model, len(RATES))
    return train_cells(model, start, rule, batches, next_token_cross_entropy, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "alone"),
    [
        (AdamW(RATES, DECAYS), lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd)),
        (SGD(RATES, DECAYS), lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd)),
        (
            SGD(RATES, DECAYS, momentum=0.9),
            lambda p, lr, wd: torch.optim.SGD(p, lr=lr, weight_decay=wd, momentum=0.9),
        ),
    ],
    ids=["adamw", "sgd", "momentum"],
)
def test_a_cell_is_the_model_trained_alone(rule, alone, batches):
    run = trained_together(rule, batches)
    assert (run.steps, run.complete) == (STEPS, True)
    for index, (lr, wd) in enumerate(zip(RATES.tolist(), DECAYS.tolist(), strict=True)):
        single = trained_alone(lambda p, lr=lr, wd=wd: alone(p, lr, wd), batches)
        start = dict(new_network(SHAPE, seed=3).named_parameters())
        for name, tensor in cell(run.parameters, index).items():
            moved = float((single[name] - start[name].detach()).norm())
            assert moved > 0
            assert float((tensor - single[name]).norm()) < 1e-3 * moved, (index, name)


@pytest.mark.slow
def test_more_cells_than_are_done_at_once_have_the_same_gradients(batches):
    model = new_network(SHAPE)
    many = stacked(model, AT_ONCE + 3)
    losses, gradients = losses_and_gradients(model, many, batches[0], next_token_cross_entropy)
    loss = next_token_cross_entropy(model(batches[0]), batches[0])
    loss.backward()
    torch.testing.assert_close(losses, loss.detach().expand(AT_ONCE + 3))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name][-1], parameter.grad)
        assert not many[name].requires_grad


@pytest.mark.slow
def test_a_cell_that_breaks_leaves_its_neighbours_alone(batches):
    rates = torch.tensor([1e-2, 1e30])
    model = new_network(SHAPE, seed=3)
    rule = SGD(rates, torch.zeros(2))
    run = train_cells(
        model, stacked(model, 2), rule, batches, next_token_cross_entropy, progress=False
    )
    alone = trained_alone(lambda p: torch.optim.SGD(p, lr=1e-2), batches)
    assert run.broke_at.tolist()[0] == 0
    assert 1 <= run.broke_at.tolist()[1] <= 3
    for name, tensor in cell(run.parameters, 0).items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def grid():
    return growth_grid([1e-3, 1e-1, 1e25], [0.0, 0.5, 20.0], steps=6, shape=SMALL, progress=False)


SMALL = Shape(width=8, layers=1, heads=2, context=16)


@pytest.mark.slow
def test_norms_follow_from_rate_and_decay_where_they_must(grid):
    frame = grid.frame().set_index(["lr", "wd"])
    assert len(frame) == 9
    norm = math.sqrt(
        sum(float(p.detach().double().square().sum()) for p in new_network(SMALL).parameters())
    )
    assert frame["start_norm"].to_numpy() == pytest.approx(norm)
    # At rate .1 a decay of 20 takes 2 = .1 * 20 times the parameters off them: their signs turn,
    # their norm stays, and what is left is Adam's own step, at most .1 an entry and step.
    decayed = frame.xs(20.0, level="wd").iloc[0]
    n = sum(p.numel() for p in new_network(SMALL).parameters())
    assert abs(decayed["end_norm"] - 0.98**6 * norm) <= 6 * 1e-3 * math.sqrt(n) * 1.01
    assert decayed["outcome"] == "shrinks"


@pytest.mark.slow
def test_what_diverged_is_marked(grid):
    frame = grid.frame()
    lost = frame[frame["lr"] > 1]
    assert set(lost["outcome"]) == {"diverged"}
    assert not frame[frame["outcome"] != "diverged"][["growth", "loss", "lean"]].isna().any().any()


@pytest.mark.slow
def test_the_figure_hatches_what_diverged_and_centres_the_colours(grid):
    figure = grid.plot()
    panel, bar = figure.axes[:2]
    image = panel.images[0]
    assert image.norm.vmin == -image.norm.vmax
    drawn = image.get_array()
    table = grid.frame().pivot(index="wd", columns="lr", values="outcome")
    assert (drawn.mask == (table == "diverged").to_numpy()).all()
    assert len(panel.patches) == int((table == "diverged").to_numpy().sum())
    assert "end norm" in bar.get_ylabel()


@pytest.mark.slow
def test_a_grid_in_which_everything_diverged_is_drawn_too():
    lost = growth_grid([1e25], [0.0], steps=3, shape=SMALL, progress=False)
    assert lost.frame()["outcome"].tolist() == ["diverged"]
    assert len(lost.plot().axes[0].patches) == 1


def test_save_and_load(grid, tmp_path):
    grid.save(tmp_path / "grid.safetensors")
    again = GrowthGrid.load(tmp_path / "grid.safetensors")
    pd.testing.assert_frame_equal(again.frame(), grid.frame())
    assert again.complete
    assert again.provenance == grid.provenance
    with pytest.raises(FileFormatError, match="no file"):
        GrowthGrid.load(tmp_path / "nowhere")


@pytest.mark.slow
def test_an_interrupt_keeps_the_steps_that_were_taken(monkeypatch):
    from paper import grid as room

    real = room.windows

    def interrupted(stream, context, batch, seed):
        if seed == 4:
            raise KeyboardInterrupt
        return real(stream, context, batch, seed)

    monkeypatch.setattr(room, "windows", interrupted)
    cut = growth_grid([1e-2], [0.0], steps=9, shape=SMALL, progress=False)
    monkeypatch.setattr(room, "windows", real)
    whole = growth_grid([1e-2], [0.0], steps=4, shape=SMALL, progress=False)
    assert (cut.steps, cut.planned, cut.complete, whole.complete) == (4, 9, False, True)
    assert cut.frame()["end_norm"].tolist() == whole.frame()["end_norm"].tolist()
    assert "interrupted" in cut.plot().axes[0].get_title(loc="left")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [0.0]), "learning rate"),
        (([0.0], [0.0]), "above 0"),
        (([1e-3], [-1.0]), "weight decay"),
        (([1e-3, 1e-3], [0.0]), "given once"),
        (([math.nan], [0.0]), "nan"),
        ((1e-3, [0.0]), "found 0.001"),
        (([1e-3], ["high"]), "high"),
        (("1e-3", [0.0]), "in a list"),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_axes_that_cannot_be(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        growth_grid(*arguments, steps=1, progress=False)


@pytest.mark.usefixtures("types_unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimiser": "lion"}, "'lion'"),
        ({"momentum": 0.9}, "SGD's alone"),
        ({"optimiser": "sgd", "momentum": 1.0}, "Momentum"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "1.5"),
        ({"seed": "a"}, "seed"),
        ({"shape": (16, 2)}, "Shape"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ArgumentError, match=words):
        growth_grid([1e-3], [0.0], progress=False, **options)


@pytest.mark.parametrize(
    ("sizes", "words"), [({"width": 15}, "multiple"), ({"layers": 0}, "layer")]
)
def test_shapes_that_cannot_be(sizes, words):
    with pytest.raises(ArgumentError, match=words):
        Shape(**sizes)
