"""Figure ``heads``: how many positions saturated heads attend to, and what the mask does to that.

A mask may multiply the scores of future keys by zero. Such a score becomes zero, not -inf, and the
softmax gives it weight. When all scores grow without bound, a row whose visible scores are all
negative attends to the future alone, and to all of it equally: the head seems to average over many
positions. Two small networks that differ in their mask show it.

The code published with Merrill et al. 2021 (viking-sudo-rm/norm-growth at bca0576) masks so in
src/si_transformer.py, and src/saturate.py multiplies the parameters of such models by 1000.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from paper.claims import Claim, Reproduction, verdict
from paper.language import LanguageRun, trained_run
from paper.network import (
    MIN_KEYS,
    Mask,
    Shape,
    SmallTransformer,
    characters,
    masked,
    new_network,
    next_token_cross_entropy,
    scores_of,
    windows,
)
from sat_lens.demo.corpus import held_out_texts, training_texts
from sat_lens.figures import headline, label, panels
from sat_lens.figures.drawing import logarithmic
from sat_lens.norms import scaled_parameters
from sat_lens.roles import head_roles
from sat_lens.vocabulary import LINES

# Parameters are multiplied by this, as in the paper; a key with more weight than the other number
# is attended to.
LARGE, ATTENDED = 1000.0, 1e-5
# Which network was trained, and how its scores were masked when they were measured.
LANGUAGE = "language model"
MASKS: tuple[Mask, ...] = get_args(Mask)
OWN, RIGHT, RIGHT_THROUGHOUT = "own mask", "right mask, same scores", "right mask throughout"
# The rules of the verdicts: many is a share of the visible keys, few a number of positions; a mask
# hides the future if another future changes the loss by less than this, in nats.
MANY, FEW = 0.25, 2.0
LEAKED = 0.01
PUBLISHED = "viking-sudo-rm/norm-growth, src/si_transformer.py and src/saturate.py at bca0576"


@dataclasses.dataclass(frozen=True)
class MaskSetting:
    """The two networks and how long they train."""

    shape: Shape
    steps: int
    batch: int
    held_out: int = 32
    learning_rate: float = 2e-3

    def __str__(self) -> str:
        return (
            f"two networks of {self.shape.layers} layers of {self.shape.heads} heads, width "
            f"{self.shape.width}, context {self.shape.context}, {self.steps} steps of {self.batch} "
            f"windows of characters, AdamW at {self.learning_rate:g} without weight decay"
        )


FULL = MaskSetting(Shape(width=64, context=64), steps=1500, batch=16)
QUICK = MaskSetting(Shape(width=32, context=32), steps=150, batch=8)


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Count positions per saturated head, in the language model and under either mask."""
    run = trained_run(quick, seed, progress)
    setting = QUICK if quick else FULL
    networks = {mask: trained_network(setting, mask, seed, progress) for mask in MASKS}
    table, losses = measured(run, networks, held_out_windows(setting, seed))
    return Reproduction(
        name="heads",
        title="Positions that saturated heads attend to, and the mask",
        claims=judged(table, losses),
        frame=table,
        figure=_drawn(table),
        note=f"Language model: {run.setting}. Mask: {setting}. Positions are keys with weight "
        f"above {ATTENDED:g} once parameters are multiplied by {LARGE:g}, over rows "
        f"of at least {MIN_KEYS} visible keys. Small networks, short training, one seed, our data "
        "and tokeniser. Multiplying by zero suffices for such heads in small models; it does not "
        "follow that every published head that averages is made by it.",
    )


def measured(
    run: LanguageRun,
    networks: dict[Mask, SmallTransformer],
    tokens: Int[Tensor, "batch position"],
) -> tuple[pd.DataFrame, dict[Mask, tuple[float, float]]]:
    """Count positions per saturated head, and test whether either mask hides the future.

    Args:
        run: The language model's run; its last checkpoint is measured on its own text.
        networks: A network trained with each mask.
        tokens: Held-out windows for these networks.

    Returns:
        One row per head of the language model, and one per head of each network and way to mask it
        (:func:`mask_table`), with ``visible``, the mean number of visible keys; and by mask the
        losses of :func:`future_losses`.
    """
    tables = [mask_table(network, mask, tokens) for mask, network in networks.items()]
    table = pd.concat([language_heads(run), *tables], ignore_index=True)
    visible = {LANGUAGE: run.setting.context} | dict.fromkeys(MASKS, tokens.shape[1])
    table["visible"] = table["trained_with"].map(visible).add(MIN_KEYS) / 2
    losses = {mask: future_losses(network, tokens) for mask, network in networks.items()}
    return table, losses


@torch.no_grad()
def language_heads(run: LanguageRun) -> pd.DataFrame:
    """Count positions per head of the trained language model; add each head's role."""
    model: Any = run.lens(run.last)
    roles = head_roles(model, run.tokens, progress=False).frame()
    with scaled_parameters(model, LARGE):
        _, cache = model.run_with_cache(
            run.tokens, names_filter=lambda name: name.endswith("hook_pattern")
        )
    counts = torch.stack(
        [
            (cache[f"blocks.{layer}.attn.hook_pattern"] > ATTENDED).sum(-1)
            for layer in range(run.setting.layers)
        ],
        dim=1,
    )[..., MIN_KEYS - 1 :].double()
    columns = {
        "positions": counts.mean((0, 3)).flatten().tolist(),
        "single": (counts == 1).double().mean((0, 3)).flatten().tolist(),
        "future": 0.0,
        "future_soft": 0.0,
        "role": roles["role"].tolist(),
        "lean": roles["lean"].tolist(),
    }
    return pd.DataFrame(
        {"trained_with": LANGUAGE, "masked_by": OWN, "head": list(roles.index)} | columns
    )


def trained_network(
    setting: MaskSetting, mask: Mask, seed: int = 0, progress: bool = True
) -> SmallTransformer:
    """Train one network; its initial parameters and its batches depend on the seed alone."""
    model = new_network(setting.shape, mask, seed)
    text = characters(training_texts())
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    named = f"mask {mask}"
    for step in tqdm(range(setting.steps), desc=named, unit="step", disable=not progress):
        batch = windows(text, setting.shape.context, setting.batch, seed * 1_000_003 + step)
        loss = next_token_cross_entropy(model(batch), batch)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return model.eval()


def mask_table(
    model: SmallTransformer, mask: Mask, tokens: Int[Tensor, "batch position"]
) -> pd.DataFrame:
    """Count the positions that each head of a network attends to when its parameters are large.

    Returns:
        One row per head and way to mask the large scores: the network's own mask; ``-inf`` put on
        the very same scores; ``-inf`` in every layer, with the same weights. Columns:
        ``positions``, the mean number of keys with weight above 1e-5 in rows of at least 8 visible
        keys; ``single``, the share of such rows with exactly one; ``future``, the mean weight on
        future keys, and ``future_soft``, that of the network as trained.
    """
    soft = scores_of(model, tokens)
    with scaled_parameters(model, LARGE):
        own = scores_of(model, tokens)
    right = new_network(model.shape, "infinite")
    right.load_state_dict(model.state_dict())
    with scaled_parameters(right, LARGE):
        throughout = scores_of(right, tokens)
    ways = {
        OWN: own,
        RIGHT: [masked(layer, "infinite") for layer in own],
        RIGHT_THROUGHOUT: throughout,
    }
    rows = [
        {"trained_with": mask, "masked_by": way, "head": f"L{layer}H{head}"} | counts
        for way, layers in ways.items()
        for layer, scores in enumerate(layers)
        for head, counts in enumerate(_counts(scores.softmax(-1), soft[layer].softmax(-1)))
    ]
    return pd.DataFrame(rows)


def _counts(
    large: Float[Tensor, "batch head query key"], soft: Float[Tensor, "batch head query key"]
) -> list[dict[str, float]]:
    """Return the columns of :func:`mask_table` for each head."""
    positions = (large > ATTENDED).sum(-1)[..., MIN_KEYS - 1 :].double()
    future = torch.ones(large.shape[-2:], dtype=torch.bool).triu(1)
    on_future, on_future_soft = (
        (pattern * future).sum(-1)[..., MIN_KEYS - 1 :] for pattern in (large, soft)
    )
    return [
        {
            "positions": float(positions[:, head].mean()),
            "single": float((positions[:, head] == 1).double().mean()),
            "future": float(on_future[:, head].mean()),
            "future_soft": float(on_future_soft[:, head].mean()),
        }
        for head in range(large.shape[1])
    ]


@torch.no_grad()
def future_losses(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"]
) -> tuple[float, float]:
    """Return the loss at some positions with each row's own future, and with that of another row.

    The predicted token and all that follows it are taken from the next row. A network that cannot
    see the future gives the same loss twice.
    """
    length = tokens.shape[1]
    own: list[Tensor] = []
    other: list[Tensor] = []
    for place in range(MIN_KEYS, length - 1, max(1, length // 8)):
        spliced = torch.cat([tokens[:, : place + 1], tokens.roll(1, 0)[:, place + 1 :]], 1)
        for inputs, losses in ((tokens, own), (spliced, other)):
            logits = model(inputs)[:, place]
            losses.append(F.cross_entropy(logits, tokens[:, place + 1]))
    return float(torch.stack(own).mean()), float(torch.stack(other).mean())


def held_out_windows(setting: MaskSetting, seed: int) -> Int[Tensor, "batch position"]:
    """Return held-out windows to measure on."""
    text = characters(held_out_texts())
    return windows(text, setting.shape.context, setting.held_out, seed)


def judged(table: pd.DataFrame, losses: dict[Mask, tuple[float, float]]) -> tuple[Claim, ...]:
    """Judge the two kinds of heads, where they come from, and what the mask hides."""
    language, multiplied, repaired, infinite = (
        table[(table["trained_with"] == trained) & (table["masked_by"] == way)]
        for trained, way in (
            (LANGUAGE, OWN),
            ("multiplied", OWN),
            ("multiplied", RIGHT),
            ("infinite", OWN),
        )
    )
    own, other = losses["multiplied"]
    roles = language["role"].value_counts()
    return (
        Claim(
            "Saturated heads are of two kinds: some attend to a few positions, some average over "
            "many.",
            verdict(_many(language) > 0 and _few(language) > 0),
            f"Of {len(language)} heads of the language model {_many(language)} attend to many "
            f"positions and {_few(language)} to few; {_positions(language)}. Soft, their roles "
            f"are {', '.join(f'{n} {role}' for role, n in roles.items())}. Rule: many is at least "
            f"{MANY:.0%} of the visible keys, few at most {FEW:g}; there has to be one of each.",
        ),
        Claim(
            "Heads that average over many positions once saturated are the network's own, not an "
            "effect of its mask.",
            verdict(_many(multiplied) == 0 or _many(repaired) > 0),
            f"A network trained and run with scores multiplied by zero has {_many(multiplied)} "
            f"such heads of {len(multiplied)} ({_positions(multiplied)}); its very scores with "
            f"-inf in place of the zeros {_many(repaired)} ({_positions(repaired)}); a network "
            f"trained with -inf {_many(infinite)} ({_positions(infinite)}). Rule: it holds if such "
            "heads outlive the right mask. The mask alone suffices here; this does not show that "
            f"it made every published head of the kind. Published code: {PUBLISHED}.",
        ),
        Claim(
            "Multiplying the scores of future keys by zero hides the future (implied by that "
            "code).",
            verdict(other - own < LEAKED),
            f"Loss with the row's own future {own:.3f}, with the future of another row "
            f"{other:.3f}; for -inf {losses['infinite'][0]:.3f} and {losses['infinite'][1]:.3f}. "
            f"Soft mass on future keys {multiplied['future_soft'].min():.2f} to "
            f"{multiplied['future_soft'].max():.2f} by head. Rule: hidden if another future costs "
            f"less than {LEAKED} nats.",
        ),
    )


def _many(part: pd.DataFrame) -> int:
    return int((part["positions"] >= MANY * part["visible"]).sum())


def _few(part: pd.DataFrame) -> int:
    return int((part["positions"] <= FEW).sum())


def _positions(part: pd.DataFrame) -> str:
    return f"{part['positions'].min():.1f} to {part['positions'].max():.1f} positions by head"


def _drawn(table: pd.DataFrame) -> Figure:
    figure, (language, networks) = panels(
        2, "Positions that saturated heads attend to", across=2, size=(3.6, 3.3)
    )
    _dots(language, {"language model, -inf": table[table["trained_with"] == LANGUAGE]})
    headline(language, "heads of the language model")
    parts = {
        "multiplied by zero": ("multiplied", OWN),
        "same scores, -inf": ("multiplied", RIGHT),
        "trained with -inf": ("infinite", OWN),
    }
    _dots(
        networks,
        {
            words: table[(table["trained_with"] == trained) & (table["masked_by"] == way)]
            for words, (trained, way) in parts.items()
        },
    )
    headline(networks, "two networks, two masks")
    return figure


def _dots(axes: Axes, parts: dict[str, pd.DataFrame]) -> None:
    """Draw one dot per head, and a line at the mean number of visible keys."""
    for number, (words, part) in enumerate(parts.items()):
        heads = [str(name) for name in part["head"]]
        color, style, size = LINES[number], "osD"[number], 5 - number
        axes.plot(heads, part["positions"].to_numpy(), style, ms=size, color=color, label=words)
    visible = float(next(iter(parts.values()))["visible"].iloc[0])
    axes.axhline(visible, color="#BBBBBB", lw=0.9, ls="--", label="visible keys, mean")
    logarithmic(axes, "y")
    label(axes, y="positions per row")
    axes.tick_params(axis="x", labelrotation=90, labelsize=6)
    axes.legend(frameon=False, fontsize=7)
