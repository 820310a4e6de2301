"""Static figures: what they show, that nothing overlaps, and that files are vectors."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pandas as pd
import pytest
import torch
from everyday import everyday
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from text_attacks import ATTACKS

from sat_lens import figures
from sat_lens.errors import ArgumentError
from sat_lens.figures import drawing
from sat_lens.vocabulary import CAUTION, DESCRIPTIONS, ROLES, visible

TARGETS = ["", "previous", "offset -3", "first", "induction", "self"]


def frame_of(layers, heads, stacks=("",)):
    cells = itertools.product(stacks, range(layers), range(heads))
    rows = [
        {
            "stack": stack,
            "layer": layer,
            "head": head,
            "role": ROLES[(layer + head) % len(ROLES)],
            "target": TARGETS[(layer * 7 + head) % len(TARGETS)],
            "agreement": ((layer * 5 + head * 3) % 11) / 10,
        }
        for stack, layer, head in cells
    ]
    return pd.DataFrame(rows)


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in drawn_texts(figure)]


def drawn_texts(figure: Figure):
    FigureCanvasAgg(figure).draw()
    found = list(figure.texts)
    for legend in figure.legends:
        found += [legend.get_title(), *legend.get_texts()]
    for axes in figure.axes:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        if axes.axison:
            found += [*labels_in_view(axes.xaxis), *labels_in_view(axes.yaxis)]
    return [text for text in found if text.get_visible() and text.get_text()]


def labels_in_view(axis):
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return [label for place, label in pairs if low <= place <= high]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    texts = drawn_texts(figure)
    boxes = [text.get_window_extent().shrunk(0.9, 0.8) for text in texts]
    return [
        (texts[i].get_text(), texts[j].get_text())
        for i, j in itertools.combinations(range(len(texts)), 2)
        if boxes[i].overlaps(boxes[j])
    ]


def outside(figure: Figure) -> list[str]:
    page = figure.bbox
    boxes = [(text, text.get_window_extent()) for text in drawn_texts(figure)]
    return [
        text.get_text()
        for text, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > page.x1 + 1 or box.y1 > page.y1 + 1
    ]


def on_paper(cell):
    """The colour that a cell of some opacity has on white."""
    *color, opacity = cell.get_facecolor()
    return [1 - opacity + opacity * part for part in color]


def growth():
    return pd.DataFrame(
        {"step": [0, 1, 10, 100], "norm": [1.0, 1.1, 2, 4], "mlp": [0.5, 0.5, 1, 2]}
    )


def training_run():
    return pd.DataFrame(
        {
            "norm": [10.0, 10.1, 12, 20],
            "cos_saturated": [0.6, math.nan, 0.9, 0.8],
            "cos_random": [0.7, math.nan, 0.9, 0.5],
            "S": [-0.3, math.nan, 0.0, 0.6],
            "loss": [math.nan] * 4,
        },
        index=pd.Index([0, 1, 10, 100], name="step"),
    )


def curve():
    scales = pd.Index(
        [0.0, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0, 32.0, math.inf], name="scale"
    )
    layers = {f"S_L{layer}": [0.1 * layer] * len(scales) for layer in range(4)}
    return pd.DataFrame({"loss": range(11), "kl": range(11), **layers}, index=scales)


DRAWINGS = {
    "roles 4 x 4": lambda: figures.role_figure(frame_of(4, 4), "Four by four"),
    "roles 24 x 32": lambda: figures.role_figure(frame_of(24, 32), "A long title " * 20),
    "roles of three stacks": lambda: figures.role_figure(
        frame_of(6, 8, ("encoder", "decoder", "cross")), "Stacks"
    ),
    "roles of one head": lambda: figures.role_figure(frame_of(1, 1), "One"),
    "sweep 4 x 4": lambda: figures.sweep_figure(
        torch.randn(4, 4), "Sweep", "effect", reference=0.3
    ),
    "sweep 24 x 32": lambda: figures.sweep_figure(torch.randn(24, 32), "Sweep", "effect (nats)"),
    "curve": lambda: figures.scaling_curve_figure(curve(), "Curve"),
    "growth": lambda: figures.growth_figure(growth(), "Growth"),
    "a training run": lambda: figures.training_figure(training_run(), "A run"),
    "one line": lambda: figures.growth_figure(growth(), "Growth", columns=["norm"], log_y=False),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", everyday(DRAWINGS, "roles 4 x 4", "sweep 4 x 4", "curve", "growth")
)
def test_no_text_overlaps_or_leaves_the_page(name):
    torch.manual_seed(0)
    figure = DRAWINGS[name]()
    assert overlaps(figure) == []
    assert outside(figure) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", everyday([name for name in DRAWINGS if "24 x 32" not in name], "sweep 4 x 4", "growth")
)
@pytest.mark.parametrize("ending", everyday(["svg", "pdf"], "svg"))
def test_every_figure_can_be_kept(name, ending, tmp_path):
    path = tmp_path / f"figure.{ending}"
    DRAWINGS[name]().savefig(path)
    assert path.read_bytes().startswith({"svg": b"<?xml", "pdf": b"%PDF"}[ending])


@pytest.mark.slow
def test_the_legend_says_every_role_in_words():
    texts = texts_of(figures.role_figure(frame_of(4, 4), "t"))
    assert all(f"{role}: {DESCRIPTIONS[role]}" in texts for role in ROLES)
    assert CAUTION.split()[-1] in " ".join(texts)


@pytest.mark.slow
def test_a_head_without_a_counted_row_is_grey_and_named():
    frame = frame_of(2, 2)
    assert DESCRIPTIONS[""] not in texts_of(figures.role_figure(frame, "t"))
    frame.loc[1, ["role", "target", "agreement"]] = ["", "", math.nan]
    figure = figures.role_figure(frame, "t")
    assert DESCRIPTIONS[""] == "no row counted"
    assert DESCRIPTIONS[""] in texts_of(figure)
    assert overlaps(figure) == outside(figure) == []
    red, green, blue, _ = figure.axes[0].patches[1].get_facecolor()
    assert red == green == blue
    assert [bool(patch.get_hatch()) for patch in figure.axes[0].patches] == [False, True] + [
        False
    ] * 2


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 128])
def test_step_0_stands_at_the_left_end(first):
    frame = growth().assign(step=[0, first, 10 * first, 100 * first])
    figure = figures.growth_figure(frame, "t")
    axes = figure.axes[0]
    x, y = axes.lines[0].get_data()
    assert (x[0], y[0]) == (0, 1.0)
    at = axes.transData.transform([(step, 1.0) for step in x])[:, 0]
    left, right = axes.get_window_extent().x0, axes.get_window_extent().x1
    assert left <= at[0] < at[1] - 10
    assert at[3] <= right
    assert at[2] - at[1] == pytest.approx(at[3] - at[2], rel=1e-3)
    assert "0" in texts_of(figure)
    assert overlaps(figure) == outside(figure) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("largest", "words"),
    [(4.0, {"1", "2", "3"}), (1e3, {"1", "20", "500"}), (1e6, {"1", "1000"}), (1e15, {"1"})],
)
def test_a_logarithmic_axis_has_enough_numbers_to_be_read(largest, words):
    frame = growth().assign(norm=[0.9, 1.0, 2.0, largest], mlp=1.0)
    figure = figures.growth_figure(frame, "t")
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    inside = {
        label.get_text()
        for place, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        if low <= place <= high and label.get_text()
    }
    assert len(inside) >= 3
    assert words <= inside
    assert overlaps(figure) == []


@pytest.mark.slow
def test_a_training_run_shows_s_with_its_control_and_all_that_was_measured():
    norms, saturation = figures.training_figure(training_run(), "t").axes
    assert norms.get_yscale() == "log"
    assert saturation.get_yscale() == "linear"
    lines = {line.get_label(): line for line in saturation.lines}
    assert set(lines) == {"cos saturated", "cos random", "S"}
    assert lines["S"].get_ydata().tolist() == [-0.3, 0.0, 0.6]
    assert lines["cos random"].get_linestyle() == "--"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn(dtype):
    values = torch.tensor([[1.0, -0.5], [0.0, math.nan]], dtype=dtype)
    assert figures.sweep_figure(values, "t", "effect").axes


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.role_figure([1], "t"),
        lambda: figures.growth_figure({"step": [1]}, "t"),
        lambda: figures.scaling_curve_figure(None, "t"),
        lambda: figures.sweep_figure([[1.0]], "t", "l"),
        lambda: figures.sweep_figure(torch.ones(3), "t", "l"),
    ],
)
def test_arguments_of_another_kind(draw, types_unchecked):
    with pytest.raises(ArgumentError, match="Needed a"):
        draw()


@pytest.mark.slow
def test_layers_go_down_and_keep_their_own_numbers():
    frame = frame_of(4, 2)
    frame = frame[frame["layer"].isin([1, 3])]
    axes = figures.role_figure(frame, "t").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


@pytest.mark.slow
def test_a_clearer_role_has_a_stronger_colour():
    frame = pd.DataFrame(
        {"layer": [0, 0], "head": [0, 1], "role": ["mean"] * 2, "agreement": [0.1, 1.0]}
    )
    cells = figures.role_figure(frame, "t").axes[0].patches
    pale, strong = [on_paper(cell) for cell in cells]
    assert sum(pale[:3]) > sum(strong[:3])


@pytest.mark.slow
def test_effects_are_centred_on_zero_and_gaps_stay_empty():
    values = torch.tensor([[1.0, -0.5], [0.0, math.nan]])
    cells = figures.sweep_figure(values, "t", "effect").axes[0].patches
    (r1, _, b1), (r2, _, b2), zero = (cell.get_facecolor()[:3] for cell in cells[:3])
    assert r1 > b1
    assert b2 > r2
    assert zero == (1.0, 1.0, 1.0)
    assert cells[3].get_hatch()


@pytest.mark.slow
@pytest.mark.parametrize("text", everyday([t for t in ATTACKS if len(t) < 100], *ATTACKS[:2]))
def test_titles_are_data(text, tmp_path):
    figure = figures.role_figure(frame_of(2, 2), text)
    figure.savefig(tmp_path / "figure.svg")
    assert visible(text).replace(" ", "") in "".join(texts_of(figure)).replace("\n", "").replace(
        " ", ""
    )


@pytest.mark.slow
def test_importing_leaves_matplotlib_alone():
    code = (
        "import sys, sat_lens.figures; assert 'matplotlib' not in sys.modules;"
        "import matplotlib; before = matplotlib.rcParams.copy();"
        "from sat_lens.figures import growth_figure, role_figure;"
        "assert matplotlib.rcParams.copy() == before;"
        "assert 'matplotlib.pyplot' not in sys.modules;"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_scales_stand_in_order_with_the_ends_apart():
    scales = [0.0, 0.5, 1.0, 2.0, math.inf]
    places = drawing.scale_places(scales)
    assert places == sorted(places)
    assert drawing.scale_places([1.0]) == [0.0]
    assert drawing.scale_places([0.0, math.inf]) == [-1.5, 1.5]


@pytest.mark.parametrize(
    ("draw", "found"),
    [
        (lambda: figures.role_figure(pd.DataFrame(), "t"), "layer, head, role"),
        (lambda: figures.role_figure(pd.DataFrame({"layer": [0], "head": [0]}), "t"), "role"),
        (lambda: figures.sweep_figure(torch.full((2, 2), math.nan), "t", "l"), r"\[2, 2\]"),
        (lambda: figures.scaling_curve_figure(pd.DataFrame(), "t"), "empty"),
        (lambda: figures.growth_figure(growth(), "t", columns=["nothing"]), "nothing"),
        (lambda: figures.training_figure(pd.DataFrame({"mine": [1.0]}), "t"), "found mine"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, found):
    with pytest.raises(ArgumentError, match=found):
        draw()


def test_any_column_of_numbers_can_be_drawn():
    frame = frame_of(4, 4)
    frame["induction"] = [i / 16 for i in range(15)] + [math.nan]
    frame["damage"] = [-0.5] + [2.0] * 15
    for column, ticks in (("induction", ["0", "1"]), ("damage", ["-2", "0", "2"])):
        figure = figures.column_figure(frame, column, "t")
        cells, bar = figure.axes
        assert len(cells.patches) == 16
        assert [text.get_text() for text in bar.get_xticklabels()] == ticks
        assert bar.get_xlabel() == column
    for bad in ("role", "none"):
        with pytest.raises(ArgumentError, match=bad):
            figures.column_figure(frame, bad, "t")
