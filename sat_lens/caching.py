"""Run a model soft and saturated, and keep the activations of both side by side.

The two caches are TransformerLens ``ActivationCache`` objects, so they go into its patching
functions as they are.

When not to use it: on much text at once. Caches hold every activation that ``names_filter`` lets
through; to follow a number over a corpus use :func:`sat_lens.scaling_curve` or
:func:`sat_lens.head_roles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sat_lens.attention import RandomKey
from sat_lens.attention.transforms import Ties
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.intervention import replace_attention, saturate
from sat_lens.models import model_name
from sat_lens.results import Provenance
from sat_lens.scales import ScaleLike
from sat_lens.sites import Heads

# Below this the random key is as near to the soft run as can be, and S says nothing.
LEAST_DENOMINATOR = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class CachedRun:
    """One forward pass: its logits and its ``ActivationCache``."""

    logits: Any = dataclasses.field(repr=False)
    cache: Any = dataclasses.field(repr=False)


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
        """Return one row a layer: ``S`` beside the two cosines that it is made of."""
        columns = {"S": self.s, "cos_saturated": self.cos_saturated, "cos_random": self.cos_random}
        return pd.DataFrame(
            {name: values.tolist() for name, values in columns.items()},
            index=pd.Index(self.names, name="activation"),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class SaturationPair:
    """A soft and a saturated run of the same input; see :func:`run_with_saturation_cache`."""

    soft: CachedRun
    saturated: CachedRun
    provenance: Provenance
    real: Tensor | None = dataclasses.field(repr=False)
    _run_random: Callable[[int], CachedRun] = dataclasses.field(repr=False)
    _random: dict[int, CachedRun] = dataclasses.field(default_factory=dict, repr=False)

    def similarity(self, activation: str = "resid_post", *, seed: int = 0) -> Similarity:
        """Compare an activation of the two runs, layer by layer, with a random-key control.

        The control is a further forward pass in which the same heads attend to one random key per
        query; it is made when first asked for and kept. Cosines are means over real positions.

        Args:
            activation: The short name of a cached activation, such as ``"resid_post"``, ``"z"`` or
                ``"attn_out"``, or ``"logits"`` for the final output.
            seed: Seed of the random keys.

        Raises:
            ArgumentError: The caches do not hold that activation, or it is the attention scores,
                whose masked entries outweigh all others.
            NonFiniteError: It is not finite everywhere.

        Example:
            >>> import sat_lens as sl
            >>> pair = sl.run_with_saturation_cache(sl.load_model("demo"), "import os, sys")
            >>> pair.similarity("resid_post").frame().shape
            (4, 3)
        """
        if activation == "attn_scores":
            raise ArgumentError(
                "Attention scores hold the mask, which outweighs all else in a cosine. Compare "
                '"pattern".'
            )
        if seed not in self._random:
            self._random[seed] = self._run_random(seed)
        control = self._random[seed]
        if activation == "logits":
            names = ["logits"]
            triples = [(self.soft.logits, self.saturated.logits, control.logits)]
        else:
            names = _names_of(self.soft.cache, activation)
            triples = [
                (self.soft.cache[name], self.saturated.cache[name], control.cache[name])
                for name in names
            ]
        if activation == "pattern":  # heads stand before positions
            triples = [
                (a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2)) for a, b, c in triples
            ]
        with torch.no_grad():
            saturated = torch.stack([mean_cosine(soft, sat, self.real) for soft, sat, _ in triples])
            random = torch.stack([mean_cosine(soft, rand, self.real) for soft, _, rand in triples])
        if not bool((saturated + random).isfinite().all()):
            raise NonFiniteError(
                f"{activation!r} is not finite everywhere, so it has no cosine. In half precision "
                "activations can overflow: load the model in float32."
            )
        return Similarity(activation, names, saturated, random)


def run_with_saturation_cache(
    model: Any,
    *inputs: Any,
    heads: Heads = None,
    scale: ScaleLike = math.inf,
    ties: Ties = "exact",
    names_filter: Any = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> SaturationPair:
    """Run the model twice, soft and saturated, and cache both.

    Args:
        model: A TransformerLens model.
        *inputs: What the model itself takes: a text, tokens, pixels.
        heads: Which heads are saturated; None is all.
        scale: The inverse temperature; see :func:`sat_lens.saturate`.
        ties: Which keys share a row in the limit; see :func:`sat_lens.saturate`.
        names_filter: Which activations to cache, as for ``run_with_cache``; None is all.
        device: Where the caches go; None leaves them where they are made.
        **kwargs: Further arguments of the model's forward, such as ``attention_mask``.

    Returns:
        A pair whose ``.soft`` and ``.saturated`` have ``.logits`` and ``.cache``. In the saturated
        cache ``pattern`` is the saturated pattern; ``attn_scores`` is what TransformerLens shows
        there (what the softmax received, or its own substitute).

    Raises:
        HeadSelectionError, ArgumentError, UnsupportedModelError, NotReachedError: As for
            :func:`sat_lens.saturate`.

    Example:
        >>> import sat_lens as sl
        >>> pair = sl.run_with_saturation_cache(sl.load_model("demo"), "def f(x):", heads="L1H0")
        >>> bool((pair.soft.cache["pattern", 0] == pair.saturated.cache["pattern", 0]).all())
        True
    """
    if not inputs and not kwargs:
        raise ArgumentError("Needed an input to run the model on, and none was given.")

    def run(intervention: contextlib.AbstractContextManager[Any]) -> CachedRun:
        with intervention:
            logits, cache = model.run_with_cache(*inputs, names_filter=names_filter, **kwargs)
        if device is not None:
            cache = cache.to(device)
        return CachedRun(logits, cache)

    return SaturationPair(
        soft=run(contextlib.nullcontext()),
        saturated=run(saturate(model, heads, scale, ties)),
        provenance=Provenance(model_name(model), scale=_shown(scale), ties=str(ties)),
        real=_real_positions(model, inputs, kwargs),
        _run_random=lambda seed: run(replace_attention(model, RandomKey(seed), heads)),
    )


def mean_cosine(
    first: Float[Tensor, "batch position *rest"],
    second: Float[Tensor, "batch position *rest"],
    real: Tensor | None = None,
) -> Float[Tensor, ""]:
    """Give the mean cosine over the last axis, over real positions where ``real`` says which.

    Example:
        >>> round(float(mean_cosine(torch.ones(1, 2, 3), 2 * torch.ones(1, 2, 3))), 6)
        1.0
    """
    cosines = torch.cosine_similarity(first.double(), second.double(), dim=-1).cpu()
    if real is None or cosines.shape[: real.dim()] != real.shape:
        return cosines.mean()
    return cosines[real.cpu()].mean()


def normalised_similarity(
    cos_changed: Float[Tensor, "*any"], cos_random: Float[Tensor, "*#any"]
) -> Float[Tensor, "*any"]:
    """Give S: 0 at the cosine of a random key, 1 at a cosine of 1; NaN where there is no room.

    Example:
        >>> float(normalised_similarity(torch.tensor(0.75), torch.tensor(0.5)))
        0.5
    """
    room = 1 - cos_random
    s = (cos_changed - cos_random) / room
    return s.masked_fill(room < LEAST_DENOMINATOR, math.nan)


def _names_of(cache: Any, activation: str) -> list[str]:
    """Find the full names of an activation in every layer, each activation once."""
    endings = tuple(
        dict.fromkeys([f".hook_{activation}", f".{activation}", *_ALSO.get(activation, ())])
    )
    for ending in endings:
        names = [name for name in cache.keys() if name.endswith(ending)]  # noqa: SIM118 - no dict
        if names:
            return names
    raise ArgumentError(
        f"The caches hold no activation {activation!r}. Pass a names_filter that lets it through, "
        'or name one that is there ("resid_post", "z", "attn_out"), or "logits".'
    )


# Names in models where TransformerLens gives no short alias.
_ALSO = {
    "z": (".o.hook_in",),
    "attn_out": (".attn.hook_out", ".self_attn.hook_out"),
}


def _real_positions(
    model: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> Bool[Tensor, "batch position"] | None:
    """Find the positions that are no padding; None if all are or nothing says so."""
    if "decoder_input" in kwargs:
        # The mask of an encoder says nothing of a decoder's positions, and the reverse.
        return None
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor):
        return mask.bool() if mask.dim() == 2 else None
    texts = inputs[0] if inputs else kwargs.get("input")
    if not isinstance(texts, list) or len(texts) < 2 or not isinstance(texts[0], str):
        return None
    # The model pads several texts by itself, to the length of the longest.
    named = {name: kwargs[name] for name in ("prepend_bos",) if name in kwargs}
    lengths = torch.tensor([model.to_tokens(text, **named).shape[-1] for text in texts])[:, None]
    places = torch.arange(int(lengths.max()))
    side = kwargs.get("padding_side") or getattr(model.tokenizer, "padding_side", "right")
    return places.flip(0) < lengths if side == "left" else places < lengths


def _shown(scale: ScaleLike) -> str:
    return str(scale) if isinstance(scale, (int, float)) else "per head"
