"""How many positions saturated heads attend to, and what the mask has to do with it."""

from __future__ import annotations

from typing import Any, get_args

import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sat_lens.norms import scaled_parameters
from sat_lens.paper import masks
from sat_lens.paper.claims import Claim, Reproduction, verdict
from sat_lens.paper.drawing import logarithmic, panels
from sat_lens.paper.language import LanguageRun, trained_run
from sat_lens.paper.measures import MIN_KEYS
from sat_lens.paper.network import Mask, SmallTransformer
from sat_lens.roles import head_roles
from sat_lens.vocabulary import INK, LINES, QUIET

MANY, FEW = 0.25, 2.0
LEAKED = 0.01
MASKS: tuple[Mask, ...] = get_args(Mask)
LANGUAGE = "language model"
PUBLISHED = "viking-sudo-rm/norm-growth, src/si_transformer.py and src/saturate.py at bca0576"


def reproduce(quick: bool = False, seed: int = 0, progress: bool = True) -> Reproduction:
    """Count positions per saturated head, in the language model and under either mask."""
    run = trained_run(quick, seed, progress)
    setting = masks.QUICK if quick else masks.FULL
    networks = {mask: masks.trained_network(setting, mask, seed, progress) for mask in MASKS}
    table, losses = measured(run, networks, masks.held_out_windows(setting, seed))
    return Reproduction(
        name="heads",
        title="Positions that saturated heads attend to, and the mask",
        claims=judged(table, losses),
        frame=table,
        figure=_drawn(table),
        note=f"Language model: {run.setting}. Mask: {setting}. Positions are keys with weight "
        f"above {masks.ATTENDED:g} once parameters are multiplied by {masks.LARGE:g}, over rows "
        f"of at least {MIN_KEYS} visible keys. Small networks, short training, one seed, our data "
        "and tokeniser. Multiplying by zero suffices for such heads in small models; it does not "
        "follow that every published head that averages is made by it.",
    )


def measured(
    run: LanguageRun,
    networks: dict[Mask, SmallTransformer],
    tokens: Int[Tensor, "batch position"],
) -> tuple[pd.DataFrame, dict[Mask, tuple[float, float]]]:
    """Count positions per saturated head, and try whether either mask hides the future.

    Args:
        run: The language model's run; its last checkpoint is measured on its own text.
        networks: A network trained with each mask.
        tokens: Held-out windows for these networks.

    Returns:
        One row a head of the language model, and one a head of each network and way of masking it
        (:func:`sat_lens.paper.masks.mask_table`), with ``visible``, the mean number of visible
        keys; and by mask the losses of :func:`sat_lens.paper.masks.future_losses`.
    """
    tables = [masks.mask_table(network, mask, tokens) for mask, network in networks.items()]
    table = pd.concat([language_heads(run), *tables], ignore_index=True)
    visible = {LANGUAGE: run.setting.context} | dict.fromkeys(MASKS, tokens.shape[1])
    table["visible"] = table["trained_with"].map(visible).add(MIN_KEYS) / 2
    losses = {mask: masks.future_losses(network, tokens) for mask, network in networks.items()}
    return table, losses


@torch.no_grad()
def language_heads(run: LanguageRun) -> pd.DataFrame:
    """Count positions per head of the trained language model, and name each head's role."""
    model: Any = run.lens(run.last)
    roles = head_roles(model, run.tokens, progress=False).frame()
    with scaled_parameters(model, masks.LARGE):
        _, cache = model.run_with_cache(
            run.tokens, names_filter=lambda name: name.endswith("hook_pattern")
        )
    counts = torch.stack(
        [
            (cache[f"blocks.{layer}.attn.hook_pattern"] > masks.ATTENDED).sum(-1)
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
        {"trained_with": LANGUAGE, "masked_by": masks.OWN, "head": list(roles.index)} | columns
    )


def judged(table: pd.DataFrame, losses: dict[Mask, tuple[float, float]]) -> tuple[Claim, ...]:
    """Judge the two kinds of heads, where they come from, and what the mask hides."""
    language, multiplied, repaired, infinite = (
        table[(table["trained_with"] == trained) & (table["masked_by"] == way)]
        for trained, way in (
            (LANGUAGE, masks.OWN),
            ("multiplied", masks.OWN),
            ("multiplied", masks.RIGHT),
            ("infinite", masks.OWN),
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
    figure, (language, networks) = panels(2, "Positions that saturated heads attend to")
    _dots(language, {"language model, -inf": table[table["trained_with"] == LANGUAGE]})
    language.set_title("heads of the language model", size=8.5, color=INK, loc="left")
    parts = {
        "multiplied by zero": ("multiplied", masks.OWN),
        "same scores, -inf": ("multiplied", masks.RIGHT),
        "trained with -inf": ("infinite", masks.OWN),
    }
    _dots(
        networks,
        {
            words: table[(table["trained_with"] == trained) & (table["masked_by"] == way)]
            for words, (trained, way) in parts.items()
        },
    )
    networks.set_title("two networks, two masks", size=8.5, color=INK, loc="left")
    return figure


def _dots(axes: Axes, parts: dict[str, pd.DataFrame]) -> None:
    """Draw one dot a head and a line at the mean number of visible keys."""
    for number, (words, part) in enumerate(parts.items()):
        heads = [str(name) for name in part["head"]]
        color, style, size = LINES[number], "osD"[number], 5 - number
        axes.plot(heads, part["positions"].to_numpy(), style, ms=size, color=color, label=words)
    visible = float(next(iter(parts.values()))["visible"].iloc[0])
    axes.axhline(visible, color="#BBBBBB", lw=0.9, ls="--", label="visible keys, mean")
    logarithmic(axes, "y")
    axes.set_ylabel("positions per row", size=8, color=QUIET)
    axes.tick_params(axis="x", labelrotation=90, labelsize=6)
    axes.legend(frameon=False, fontsize=7)
