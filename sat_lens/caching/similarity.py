"""How much of an activation a changed run keeps, beside a random-key control.

When not to use it: on activations that hold a mask. It outweighs all else in a cosine.
"""

from __future__ import annotations

import dataclasses
import math

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.errors import ArgumentError

# Below this the random key is as near to the soft run as can be, and S says nothing.
LEAST_DENOMINATOR = 0.01
NO_ROOM = "S is undefined: random keys already give a cosine above 0.99"


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """How much of an activation the saturated run keeps, layer by layer.

    ``S = (cos(soft, saturated) - cos(soft, random key)) / (1 - cos(soft, random key))``: 1 if the
    saturated run gives the same direction, 0 if it does no better than attending to random keys,
    NaN where the denominator is below .01. The raw cosine alone misleads: a randomly initialised
    model scores higher on it than a trained one.
    """

    activation: str
    names: list[str]
    cos_saturated: Float[Tensor, " layer"]
    cos_random: Float[Tensor, " layer"]

    @property
    def s(self) -> Float[Tensor, " layer"]:
        """The normalised similarity S of each layer."""
        return normalised_similarity(self.cos_saturated, self.cos_random)

    def frame(self) -> pd.DataFrame:
        """Return one row a layer: ``S`` beside the two cosines that it is made of.

        The column ``note`` says why S is NaN where it is, and is empty elsewhere.
        """
        columns = {"S": self.s, "cos_saturated": self.cos_saturated, "cos_random": self.cos_random}
        notes = [NO_ROOM if undefined else "" for undefined in self.s.isnan().tolist()]
        return pd.DataFrame(
            {name: values.tolist() for name, values in columns.items()} | {"note": notes},
            index=pd.Index(self.names, name="activation"),
        )

    def __repr__(self) -> str:
        """Show the table, notes and all."""
        return f"Similarity of {self.activation}\n{self.frame()}"


def mean_cosine(
    first: Float[Tensor, "batch position *rest"],
    second: Float[Tensor, "batch position *rest"],
    mask: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Return the mean cosine over the last axis, over the positions that ``mask`` keeps.

    Raises:
        ArgumentError: Some positions are padded, and the mask is not of these positions.

    Example:
        >>> import torch
        >>> from sat_lens.caching import mean_cosine
        >>> round(float(mean_cosine(torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 3))), 6)
        1.0
    """
    cosines = torch.cosine_similarity(first.double(), second.double(), dim=-1).cpu()
    if mask is None or bool(mask.all()):
        return cosines.mean()
    if cosines.shape[: mask.dim()] != mask.shape:
        raise ArgumentError(
            f"An activation with positions {list(cosines.shape[:2])} cannot be freed of padding by "
            f"a mask of {list(mask.shape)}. Give inputs of equal length."
        )
    return cosines[mask.cpu()].mean()


def normalised_similarity(
    cos_changed: Float[Tensor, "*any"], cos_random: Float[Tensor, "*#any"]
) -> Float[Tensor, "*any"]:
    """Return S: 0 at the cosine of a random key, 1 at a cosine of 1; NaN where there is no room.

    Example:
        >>> import torch
        >>> from sat_lens.caching import normalised_similarity
        >>> float(normalised_similarity(torch.tensor(0.75), torch.tensor(0.5)))
        0.5
    """
    room = 1 - cos_random
    s = (cos_changed - cos_random) / room
    return s.masked_fill(room < LEAST_DENOMINATOR, math.nan)
