"""What masking by multiplication does to saturated heads, shown on two networks of our own.

A score of a future key that is multiplied by zero becomes zero, not -inf, and the softmax gives it
weight. When all scores grow without bound, a row whose visible scores are all negative attends to
nothing but the future, and to all of it alike: a head that seems to average over many positions.

The code published with Merrill et al. 2021 (viking-sudo-rm/norm-growth at bca0576) masks so in
src/si_transformer.py, and src/saturate.py multiplies the parameters of such models by 1000.
"""

from __future__ import annotations

import dataclasses

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.demo.corpus import held_out_texts, training_texts
from sat_lens.norms import scaled_parameters
from sat_lens.paper.measures import MIN_KEYS, scores_of
from sat_lens.paper.network import (
    Mask,
    Shape,
    SmallTransformer,
    characters,
    masked,
    new_network,
    next_token_loss,
    windows,
)

LARGE = 1000.0
ATTENDED = 1e-5
CHARACTERS = 2_000_000
OWN, RIGHT, RIGHT_THROUGHOUT = "own mask", "right mask, same scores", "right mask throughout"


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


def trained_network(
    setting: MaskSetting, mask: Mask, seed: int = 0, progress: bool = True
) -> SmallTransformer:
    """Train one network; parameters at the start and batches depend on the seed alone."""
    model = new_network(setting.shape, mask, seed)
    text = characters(training_texts(), CHARACTERS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    named = f"mask {mask}"
    for step in tqdm(range(setting.steps), desc=named, unit="step", disable=not progress):
        batch = windows(text, setting.shape.context, setting.batch, seed * 1_000_003 + step)
        loss = next_token_loss(model(batch), batch)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return model.eval()


def mask_table(
    model: SmallTransformer, mask: Mask, tokens: Int[Tensor, "batch position"]
) -> pd.DataFrame:
    """Count the positions that each head of a network attends to when its parameters are large.

    Returns:
        One row a head and a way of masking the large scores: the network's own mask; ``-inf`` put
        on the very same scores; ``-inf`` in every layer of the same weights. Columns:
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


@torch.no_grad()
def future_losses(
    model: SmallTransformer, tokens: Int[Tensor, "batch position"]
) -> tuple[float, float]:
    """Give the loss at some positions with the row's own future, and with that of another row.

    At each of several positions, all that follows the predicted token, and the token itself, is
    taken from the next row. A network that cannot see the future gives the same loss twice.
    """
    length = tokens.shape[1]
    own: list[Tensor] = []
    other: list[Tensor] = []
    for place in range(MIN_KEYS, length - 1, max(1, length // 8)):
        spliced = torch.cat([tokens[:, : place + 1], tokens.roll(1, 0)[:, place + 1 :]], 1)
        for inputs, losses in ((tokens, own), (spliced, other)):
            logits = model(inputs)[:, place]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[:, place + 1]))
    return float(torch.stack(own).mean()), float(torch.stack(other).mean())


def held_out_windows(setting: MaskSetting, seed: int) -> Int[Tensor, "batch position"]:
    """Draw the windows to measure on."""
    text = characters(held_out_texts(), CHARACTERS)
    return windows(text, setting.shape.context, setting.held_out, seed)


def _counts(
    large: Float[Tensor, "batch head query key"], soft: Float[Tensor, "batch head query key"]
) -> list[dict[str, float]]:
    """Count, for each head, over rows with enough visible keys."""
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
