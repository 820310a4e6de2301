"""The attention modules of a model, found once and remembered while the model lives."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sat_lens._checks import inner_model_hint, is_lens_model, is_plain
from sat_lens.data.reading import check_input
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.models import device_of, main_input_name, vocabulary_size, wrapped_model
from sat_lens.sites.probe import head_count_hint, probe
from sat_lens.sites.recomputation import held_again
from sat_lens.sites.site import AttentionSite
from sat_lens.version import newer_lens

PROBE_TOKENS = 5
_PATTERN = ".hook_pattern"
_log = logging.getLogger(__name__)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Found = TypeVar("Found")


class _Survey(NamedTuple):
    """What one look at a model found, and the state that the model was in."""

    state: object
    sites: list[AttentionSite]
    idle: list[str]


_remembered: WeakKeyDictionary[Any, _Survey] = WeakKeyDictionary()


def attention_sites(model: Any, *inputs: Any, **kwargs: Any) -> list[AttentionSite]:
    """List the attention modules of a model and how each can be touched.

    The level of each is found by one forward pass, on ``inputs`` where given and on a few made-up
    tokens otherwise; the result is remembered while the model lives and its mode stays the same.
    Made-up tokens do not run a tower for images or sound; inputs that do list it as well:
    ``attention_sites(model, tokens, pixel_values=images)``. Where all heads are chosen, a part that
    computes attention without having been looked at is an error.

    Args:
        model: A ``TransformerBridge``, a ``HookedTransformer`` and its like, or a plain Hugging
            Face model, whose fused attention is the level ``kernel``.
        *inputs: Example inputs of the model, for one that made-up inputs do not fit.
        **kwargs: Further arguments of the model's own forward.

    Returns:
        One :class:`AttentionSite` per attention module, in the model's order.

    Raises:
        UnsupportedModelError: The model has no softmax attention, or no forward pass worked.
        DataError: ``inputs`` begins with neither text nor a tensor that the model can read.
        ArgumentError: ``model`` is neither of these.

    Example:
        >>> import sat_lens as sl
        >>> [site.level for site in sl.attention_sites(sl.load_model("demo"))]
        ['scores', 'scores', 'scores', 'scores']
    """
    paths = None if is_plain(model) else _attention_paths(model)
    state = _state(model)
    if not inputs and not kwargs:
        known = _remembered.get(model)
        if known is not None and known.state == state:
            return list(known.sites)
    if inputs:
        check_input(model, inputs[0], kwargs)
    if inputs or kwargs:
        sites, idle = probe(model, paths, inputs, kwargs)
    else:
        sites, idle = on_made_up_inputs(model, partial(probe, model, paths))
    if not sites:
        raise _no_attention(model)
    _remembered[model] = _Survey(state, sites, idle)
    return list(sites)


def parts_not_probed(model: Any) -> list[str]:
    """Return the names of parts with weights that did not run when the model was looked at last."""
    known = _remembered.get(model)
    return [] if known is None else list(known.idle)


def has_several_stacks(sites: list[AttentionSite]) -> bool:
    """Whether results must be told apart by stack (encoder, decoder, cross)."""
    return len({site.stack for site in sites}) > 1


def _attention_paths(model: Any) -> list[str]:
    if not is_lens_model(model):
        raise ArgumentError(
            f"Needed a TransformerLens model (a TransformerBridge or a HookedTransformer) or a "
            f"Hugging Face model, and a {type(model).__name__} was given.{inner_model_hint(model)}"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"A {type(model).__name__} runs its model in another process or on another machine, "
            "where no hook of ours can change attention. Load the model here: "
            "TransformerBridge.boot_transformers(name)."
        )
    return paths_with_patterns(model)


def paths_with_patterns(model: Any) -> list[str]:
    """Return the paths of the modules whose hook points show a pattern, each once."""
    by_point: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if name.endswith(_PATTERN):
            path = name.removesuffix(_PATTERN)
            # A layer that was taken out leaves its hook points behind.
            with contextlib.suppress(AttributeError):
                if model.get_submodule(path) is not None:
                    by_point.setdefault(id(point), path)
    return list(by_point.values())


def on_made_up_inputs(model: Any, run: Callable[[tuple[Any, ...], dict[str, Any]], Found]) -> Found:
    """Return what ``run(args, kwargs)`` gives on the first made-up inputs that fit the model."""
    tried: list[Exception] = []
    for args, kwargs in _made_up_inputs(model):
        try:
            return run(args, kwargs)
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 - any failure only means that the input did not fit
            tried.append(error)
    last = str(tried[-1]).strip().splitlines() if tried else []
    raise UnsupportedModelError(
        "Needed one forward pass to find where attention can be touched, and no made-up input fits "
        f"this model ({type(tried[-1]).__name__ if tried else 'no input'}: "
        f"{last[0] if last else ''}). Call sat_lens.attention_sites(model, *your_inputs) once "
        "first; what it finds is remembered for this model." + newer_lens()
    )


def _made_up_inputs(model: Any) -> list[Inputs]:
    """Make small inputs for the model, the likeliest kind first."""
    device, vocab = device_of(model), vocabulary_size(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(wrapped_model(model), "config", None)
    own = getattr(model, "cfg", None)
    # As many tokens as heads would leave open which axis of the scores is which.
    n_tokens = PROBE_TOKENS + 1 if head_count_hint(model) == PROBE_TOKENS else PROBE_TOKENS
    tokens = torch.arange(1, n_tokens + 1, device=device)[None] % max(vocab, 2)
    text: list[Inputs] = [((tokens,), {}), ((tokens,), {"decoder_input": tokens})]
    if own is None and getattr(config, "is_encoder_decoder", False):
        text = [((tokens,), {"decoder_input_ids": tokens[:, :-1]})]
    main = main_input_name(model)
    generator = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(1, channels, height, width, generator=generator)
        return [((pixels.to(device, dtype),), {}), *text]
    if main in ("input_values", "input_features"):
        mel_bins = getattr(config, "num_mel_bins", None)
        shape = (1, getattr(config, "max_length", 3000), mel_bins) if mel_bins else (1, 1600)
        wave = torch.randn(*shape, generator=generator).to(device, dtype)
        return [((wave,), {"return_type": "logits"}), ((wave,), {}), *text]
    return text


def _no_attention(model: Any) -> UnsupportedModelError:
    if is_plain(model):
        return UnsupportedModelError(
            f"Needed a model with softmax attention, and neither a fused attention of PyTorch nor "
            f"a softmax over scores ran in {type(model).__name__}. Load it with "
            'attn_implementation="sdpa" or "eager", if it has attention.'
        )
    name = getattr(getattr(model, "cfg", None), "model_name", "") or ""
    return UnsupportedModelError(
        f"Needed a model with softmax attention, and none ran in {type(model).__name__} "
        f"{str(name)!r}. State-space and linear-attention models (Mamba, RWKV) have nothing "
        "that can be saturated."
    )


def _state(model: Any) -> object:
    config = getattr(wrapped_model(model), "config", None)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return (
        None if first is None else (first.device, first.dtype),
        # Parts can be in training mode while the whole is not.
        Counter(module.training for module in model.modules())[True],
        getattr(model, "compatibility_mode", None),
        getattr(config, "_attn_implementation", None),
        # In which dtype attention is computed decides whether a hook point shows all of it.
        torch.is_autocast_enabled(device_of(model).type),
        Counter(name.endswith(_PATTERN) for name in getattr(model, "hook_dict", ()))[True],
    )


# A plain Hugging Face model that runs eager attention for a while.

_logged: set[str] = set()


@contextlib.contextmanager
def eager_attention(model: Any, why: str) -> Iterator[list[AttentionSite]]:
    """Switch a plain Hugging Face model to eager attention, and back when the block ends.

    Each reason ``why`` is logged once, because eager attention makes the whole matrix of scores.
    Yields the attention modules of the eager model.
    """
    if why not in _logged:
        _logged.add(why)
        _log.warning(
            "Attention runs eagerly, with its n by n matrix of scores: %s. Where memory is short, "
            "give shorter texts, or fewer at once.",
            why,
        )
    with _switched_to_eager(model):
        sites = attention_sites(model)
        stuck = [site.path for site in sites if site.level == "kernel"]
        if stuck:
            raise UnsupportedModelError(
                f"The fused attention of {stuck[0]} cannot serve, because {why}, and "
                f"{type(model).__name__} cannot be switched to eager attention. Load it with "
                'attn_implementation="eager".'
            )
        yield sites


@contextlib.contextmanager
def _switched_to_eager(model: Any) -> Iterator[None]:
    before = _implementations(model)
    try:
        # Models that cannot be switched only log it.
        model.set_attn_implementation("eager")
        with held_again(partial(_switched_to_eager, model)):
            yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _implementations(model: Any) -> list[tuple[Any, str]]:
    """List the configurations of the model's parts, each with its kind of attention."""
    configs = {
        id(part.config): part.config
        for part in model.modules()
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    }
    return [(config, config._attn_implementation) for config in configs.values()]
