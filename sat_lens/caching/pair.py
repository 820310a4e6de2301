"""Run a model soft and saturated, keep the activations of both side by side, and compare them.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens._checks import require_lens_model
from sat_lens.attention import RandomKey
from sat_lens.attention.transforms import Ties
from sat_lens.caching.prefix import Prefix
from sat_lens.data import INPUT_NAMES
from sat_lens.data.reading import read_call
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.intervention import replace_attention, saturate
from sat_lens.models import main_input_name, model_name, residual_names
from sat_lens.results import Provenance
from sat_lens.sites import Heads, ScaleLike, attention_sites, select_heads

# Below this the random key is as near to the soft run as can be, and S says nothing.
LEAST_DENOMINATOR = 0.01
# Below this S rests on a small part of the activation, and a small change of either moves it far.
WEAK_DENOMINATOR = 0.1
WEAK = "S rests on little: random keys already give a cosine above 0.9; mind its error"
NO_ROOM = "S is undefined: random keys already give a cosine above 0.99"
UNCHANGED = (
    "S is undefined: random keys change nothing here; each query sees one key (a single token), or "
    "no chosen head comes before"
)
# Names in models where TransformerLens gives no short alias.
_ALSO = {
    "z": (".o.hook_in",),
    "attn_out": (".attn.hook_out", ".self_attn.hook_out"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Similarity:
    """How much of an activation the saturated run keeps, layer by layer.

    ``S = (cos(soft, saturated) - cos(soft, random key)) / (1 - cos(soft, random key))``: 1 if the
    saturated run gives the same direction, 0 if it does no better than attending to random keys,
    NaN where the denominator is below .01, and marked where it is below .1. The raw cosine alone
    misleads: a randomly initialised model scores higher on it than a trained one. ``s_error`` is
    the standard error of S over positions, as if these were independent; NaN for a single one.
    """

    activation: str
    names: list[str]
    cos_saturated: Float[Tensor, " layer"]
    cos_random: Float[Tensor, " layer"]
    s_error: Float[Tensor, " layer"]

    @property
    def s(self) -> Float[Tensor, " layer"]:
        """The normalised similarity S of each layer."""
        return normalised_similarity(self.cos_saturated, self.cos_random)

    def frame(self) -> pd.DataFrame:
        """Return one row a layer: ``S``, its error ``S_se``, and the cosines that it is made of.

        The column ``note`` says why S is NaN or weak where it is, and is empty elsewhere.
        """
        columns = {
            "S": self.s,
            "S_se": self.s_error.masked_fill(self.s.isnan(), math.nan),
            "cos_saturated": self.cos_saturated,
            "cos_random": self.cos_random,
        }
        notes = [_note(random) for random in self.cos_random.tolist()]
        return pd.DataFrame(
            {name: values.tolist() for name, values in columns.items()} | {"note": notes},
            index=pd.Index(self.names, name="activation"),
        )

    def __repr__(self) -> str:
        """Show the table, and below it why S is undefined where it is."""
        table = self.frame()
        reasons: dict[str, list[str]] = {}
        for name, note in table.pop("note").items():
            if note:
                reasons.setdefault(note, []).append(str(name))
        notes = [
            f"{', '.join(names) if len(names) < 3 else f'{len(names)} layers'}: {note}"
            for note, names in reasons.items()
        ]
        return "\n".join([f"Similarity of {self.activation}", table.to_string(), *notes])


def _note(cos_random: float) -> str:
    if cos_random > 1 - 1e-9:
        return UNCHANGED
    denominator = 1 - cos_random
    return NO_ROOM if denominator < LEAST_DENOMINATOR else WEAK * (denominator < WEAK_DENOMINATOR)


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
    return _cosines(first, second, mask).mean()


def _cosines(
    first: Float[Tensor, "batch position *rest"],
    second: Float[Tensor, "batch position *rest"],
    mask: Tensor | None,
) -> Float[Tensor, " kept"]:
    cosines = torch.cosine_similarity(first.double(), second.double(), dim=-1).cpu()
    if mask is None or bool(mask.all()):
        return cosines.flatten()
    if cosines.shape[: mask.dim()] != mask.shape:
        raise ArgumentError(
            f"The padding mask has shape {list(mask.shape)}, and the activation has prompts and "
            f"positions {list(cosines.shape[:2])}. Give inputs of equal length."
        )
    return cosines[mask.cpu()].flatten()


def _error_of_s(
    saturated: Float[Tensor, " kept"], random: Float[Tensor, " kept"]
) -> Float[Tensor, ""]:
    """Return the standard error of S, a ratio of two means, to first order."""
    if len(saturated) < 2:
        return torch.tensor(math.nan, dtype=torch.float64)
    denominator = (1 - random).mean()
    s = (saturated - random).mean() / denominator
    rest = (saturated - random) - s * (1 - random)
    return rest.std() / len(rest) ** 0.5 / denominator


def normalised_similarity(
    cos_changed: Float[Tensor, "*any"], cos_random: Float[Tensor, "*#any"]
) -> Float[Tensor, "*any"]:
    """Return S: 0 at the cosine of a random key, 1 at a cosine of 1; NaN if the former is over .99.

    Example:
        >>> import torch
        >>> from sat_lens.caching import normalised_similarity
        >>> float(normalised_similarity(torch.tensor(0.75), torch.tensor(0.5)))
        0.5
    """
    denominator = 1 - cos_random
    s = (cos_changed - cos_random) / denominator
    return s.masked_fill(denominator < LEAST_DENOMINATOR, math.nan)


@dataclasses.dataclass(frozen=True, eq=False)
class CachedRun:
    """One forward pass: its logits and its ``ActivationCache``."""

    logits: Any = dataclasses.field(repr=False)
    cache: Any = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class SaturationPair:
    """A soft and a saturated run of the same input; see :func:`run_with_saturation_cache`.

    ``non_padding`` is False at padded positions of the input, ``decoder_non_padding`` at those of a
    decoder with an input of its own; None if nothing is padded.
    """

    soft: CachedRun
    saturated: CachedRun
    provenance: Provenance
    non_padding: Tensor | None = dataclasses.field(repr=False)
    decoder_non_padding: Tensor | None = dataclasses.field(repr=False)
    _run_random: Callable[[int, list[str]], CachedRun] = dataclasses.field(repr=False)
    _sliced: bool = dataclasses.field(repr=False)
    _random: dict[tuple[int, str], CachedRun] = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        """What was run, what is held, and what to ask next."""
        soft, saturated = (len(run.cache.keys()) for run in (self.soft, self.saturated))
        return (
            f"Soft and saturated run of {self.provenance}\n{soft} activations in .soft.cache, "
            f"{saturated} in .saturated.cache; compare them with .similarity()"
        )

    def similarity(self, activation: str = "resid_post", *, seed: int = 0) -> Similarity:
        """Compare an activation of the two runs, layer by layer, with a random-key control.

        The control is a further forward pass in which the same heads attend to one random key per
        query; it is made when first asked for, and of it this activation alone is kept. Cosines are
        means over positions that are no padding.

        Args:
            activation: The short name of a cached activation, such as ``"resid_post"``, ``"z"`` or
                ``"attn_out"`` (``"hook_z"`` is the same), or ``"logits"`` for the final output.
            seed: Seed of the random keys.

        Raises:
            ArgumentError: The caches do not hold that activation, or a part of its positions only
                (``pos_slice``); it has other positions than the padding mask; it is the attention
                scores, whose masked entries outweigh all others; or it is the logits, and the
                model was asked for something else (``return_type``).
            NonFiniteError: It is not finite everywhere.

        Example:
            >>> import sat_lens as sl
            >>> pair = sl.run_with_saturation_cache(sl.load_model("demo"), "import os, sys")
            >>> pair.similarity("resid_post").frame().shape
            (4, 5)
        """
        activation = activation.removeprefix("hook_")
        if activation == "attn_scores":
            raise ArgumentError(
                "Attention scores hold the mask, which outweighs all else in a cosine. Compare "
                '"pattern".'
            )
        if self._sliced and activation != "logits":
            raise ArgumentError(
                "The caches were cut with pos_slice, so it is not known which positions they hold. "
                "Call run_with_saturation_cache without it."
            )
        names = ["logits"] if activation == "logits" else _names_of(self.soft.cache, activation)
        key = (seed, activation)
        if key not in self._random:
            self._random[key] = self._run_random(seed, names)
        runs = (self.soft, self.saturated, self._random[key])
        cosines, errors = [], []
        for name in names:
            soft, *others = (_by_position(run, name, activation) for run in runs)
            in_decoder = name.startswith(("decoder", "logits"))
            mask = self.decoder_non_padding if in_decoder else self.non_padding
            by_position = [_cosines(soft, other, mask) for other in others]
            cosines.append(torch.stack([cosine.mean() for cosine in by_position]))
            errors.append(_error_of_s(*by_position))
        saturated, random = torch.stack(cosines, dim=1)
        if not bool((saturated + random).isfinite().all()):
            raise NonFiniteError(
                f"{activation!r} is not finite everywhere, so it has no cosine. In half precision "
                "activations can overflow: load the model in float32."
            )
        return Similarity(activation, names, saturated, random, torch.stack(errors))


def run_with_saturation_cache(
    model: Any,
    *inputs: Any,
    heads: Heads = None,
    scale: ScaleLike = math.inf,
    ties: Ties = "exact",
    names_filter: Any = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
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
        tokenizer: A tokenizer or its directory, for texts, in the place of the model's own.
        **kwargs: Further arguments of the model's forward, such as ``attention_mask``. Without
            that, padding is recognised as by :func:`sat_lens.data.batches`.

    Returns:
        A pair whose ``.soft`` and ``.saturated`` have ``.logits`` and ``.cache``. In the saturated
        cache ``pattern`` is the saturated pattern; ``attn_scores`` is what TransformerLens shows
        there (what the softmax received, or its own substitute). Layers below the first chosen
        head are run once where that gives the same (without gradients, and without other hooks in
        them), and the two caches then share the tensors of these layers.

    Raises:
        DataError: The input is neither text nor a tensor that the model can read, or it cannot be
            told what is padding.
        HeadSelectionError, ArgumentError, UnsupportedModelError, NotReachedError: As for
            :func:`sat_lens.saturate`.

    Example:
        >>> import sat_lens as sl
        >>> pair = sl.run_with_saturation_cache(sl.load_model("demo"), "def f(x):", heads="L1H0")
        >>> bool((pair.soft.cache["pattern", 0] == pair.saturated.cache["pattern", 0]).all())
        True
    """
    require_lens_model(model, "run_with_saturation_cache")
    if not inputs:
        # The model's run_with_cache wants its input by place.
        names = (*INPUT_NAMES, main_input_name(model))
        name = next((name for name in names if name in kwargs), None)
        if name is None:
            raise ArgumentError("Needed an input to run the model on, and none was given.")
        inputs = (kwargs.pop(name),)
    first, kwargs, *masks = read_call(model, inputs[0], kwargs, tokenizer)
    inputs = (first, *inputs[1:])
    return pair_of(model, inputs, kwargs, masks, heads, scale, ties, names_filter, device)


def pair_of(
    model: Any,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    masks: Sequence[Tensor | None],
    heads: Heads = None,
    scale: ScaleLike = math.inf,
    ties: Ties = "exact",
    names_filter: Any = None,
    device: str | torch.device | None = None,
) -> SaturationPair:
    """Make the pair of a call whose padding is known: ``masks`` of its input and of its logits."""
    non_padding, of_decoder = masks

    def run(
        *around: contextlib.AbstractContextManager[Any], names_filter: Any = names_filter
    ) -> CachedRun:
        with contextlib.ExitStack() as stack:
            for context in around:
                stack.enter_context(context)
            try:
                logits, cache = model.run_with_cache(*inputs, names_filter=names_filter, **kwargs)
            except KeyError as error:
                if "names_filter" not in str(error):
                    raise
                raise _no_such_point(names_filter) from error
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        # Version 3 of TransformerLens caches nothing where version 4 raises an error.
        for name in asked if isinstance(asked, list) else ():
            if name not in cache and name not in model.hook_dict:
                raise _no_such_point(name)
        return CachedRun(logits, cache if device is None else cache.to(device))

    def run_random(seed: int, names: list[str]) -> CachedRun:
        found = run(
            replace_attention(model, RandomKey(seed), named), names_filter=names.__contains__
        )
        return found if names == ["logits"] else dataclasses.replace(found, logits=None)

    c = str(scale) if isinstance(scale, (int, float)) else "per head"
    sites = attention_sites(model)
    named = list(scale) if heads is None and isinstance(scale, Mapping) else heads
    chosen = select_heads(sites, named)
    prefix = Prefix.below(model, sites, chosen, kwargs) if len(inputs) == 1 else Prefix({})
    soft, saturated = _both(run, prefix, lambda: saturate(model, heads, scale, ties))
    return SaturationPair(
        soft=soft,
        saturated=saturated,
        provenance=Provenance(model_name(model), scale=c, ties=str(ties)),
        non_padding=non_padding,
        decoder_non_padding=of_decoder,
        _run_random=run_random,
        _sliced=kwargs.get("pos_slice") is not None,
    )


def _no_such_point(name: Any) -> ArgumentError:
    return ArgumentError(
        f"names_filter: {name!r} is no hook point of this model. Their names are in "
        'model.hook_dict, such as "blocks.0.hook_out"; a function of the name chooses several: '
        'names_filter=lambda name: name.endswith("hook_z").'
    )


def _both(
    run: Callable[..., CachedRun],
    prefix: Prefix,
    changing: Callable[[], contextlib.AbstractContextManager[Any]],
) -> tuple[CachedRun, CachedRun]:
    """Run as it is and changed, the second time without the blocks that nothing changes."""
    soft = run(prefix.recording())
    changed = run(changing(), prefix.replay())
    if prefix.replayed:
        entries = prefix.completed(changed.cache.cache_dict, soft.cache.cache_dict)
        if entries is None:
            return soft, run(changing())
        changed.cache.cache_dict = entries
    return soft, changed


def _names_of(cache: Any, activation: str) -> list[str]:
    """Find the full names of an activation in every layer, each activation once."""
    if activation == "resid_post" and (names := residual_names(cache.keys())):
        return names
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


def _by_position(
    run: CachedRun, name: str, activation: str
) -> Float[Tensor, "batch position *rest"]:
    if activation == "logits":
        if not isinstance(run.logits, Tensor) or run.logits.dim() < 2:
            raise ArgumentError(
                "The pair holds no logits, because the model was asked for something else. Leave "
                "return_type out."
            )
        return run.logits.detach()
    value: Tensor = run.cache[name].detach()
    if not getattr(run.cache, "has_batch_dim", True):
        value = value[None]
    # In a pattern heads stand before positions.
    return value.transpose(1, 2) if activation == "pattern" else value
