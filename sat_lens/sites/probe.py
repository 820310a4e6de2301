"""Finding the level of every attention module by running the model once and watching.

Nothing is assumed from a class name or a configuration. One forward pass on a few made-up tokens
records, module by module, in which order the scores' hook, the softmax, the pattern's hook and the
end of the module come, and whether the softmax received exactly what the scores' hook showed.

The level is ``scores`` if the hook came first and its tensor went into the softmax unchanged: then
an edit there is an edit of the attention. In all other cases with one softmax per call it is
``softmax``. An edit at a hook point that fires after the softmax is thrown away by the model; the
names of such hook points are kept, so that nobody makes such an edit unaware.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.errors import UnsupportedModelError
from sat_lens.kernels import AttentionCall, FusedAttention
from sat_lens.models import device_of, main_input_name, vocabulary_size, wrapped_model
from sat_lens.sites.naming import AttentionSite, Level, Place, places
from sat_lens.sites.search import Call, searching
from sat_lens.sites.shadow import run_through
from sat_lens.sites.softmax import AttentionSoftmax, DropoutWatch, heads_in, layout_of
from sat_lens.version import newer_lens

PROBE_TOKENS = 5


def probe(
    model: Any, paths: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[AttentionSite], list[str]]:
    """Run the model once, without its hooks, and say at which level each module can be touched.

    Args:
        model: A model with hook points.
        paths: The modules whose hook points show a pattern.
        args: What to run it on.
        kwargs: Further arguments of the model's own forward.

    Returns:
        The attention modules that ran, those that ``paths`` did not name last; and the parts of the
        model that did not run.
    """
    calls: dict[str, list[Call]] = {path: [] for path in paths}
    known = [model.get_submodule(path) for path in paths]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=cuda_devices(model)))
        stack.enter_context(without_hooks(model))
        search = stack.enter_context(searching(model, known))
        for path in paths:
            stack.enter_context(_recording(model, path, calls[path]))
        dropout = stack.enter_context(DropoutWatch())
        model(*args, **kwargs)
    calls = {path: of_path for path, of_path in calls.items() if of_path} | search.calls
    hint = head_count_hint(model)
    sites = [_site(place, calls[place.path], hint) for place in places(list(calls))]
    sites = [dataclasses.replace(site, dropout=dropout.seen) for site in sites]
    return sites, search.idle()


def probe_inputs(model: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Make up small inputs for the model, the likeliest kind first."""
    device, vocab = device_of(model), vocabulary_size(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config = getattr(wrapped_model(model), "config", None)
    own = getattr(model, "cfg", None)
    # As many tokens as heads would leave open which axis of the scores is which.
    n_tokens = PROBE_TOKENS + 1 if head_count_hint(model) == PROBE_TOKENS else PROBE_TOKENS
    tokens = torch.arange(1, n_tokens + 1, device=device)[None] % max(vocab, 2)
    text: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((tokens,), {}),
        ((tokens,), {"decoder_input": tokens}),
    ]
    if own is None and getattr(config, "is_encoder_decoder", False):
        text = [((tokens,), {"decoder_input_ids": tokens[:, :-1]})]
    main = main_input_name(model)
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(1, channels, height, width, generator=generator)
        return [((pixels.to(device, dtype),), {}), *text]
    if main in ("input_values", "input_features"):
        generator = torch.Generator().manual_seed(0)
        mel_bins = getattr(config, "num_mel_bins", None)
        shape = (1, getattr(config, "max_length", 3000), mel_bins) if mel_bins else (1, 1600)
        wave = torch.randn(*shape, generator=generator).to(device, dtype)
        return [((wave,), {"return_type": "logits"}), ((wave,), {}), *text]
    return text


def head_count_hint(model: Any) -> int | None:
    """The number of heads that the configuration claims; it only splits packed axes."""
    found = getattr(getattr(model, "cfg", None), "n_heads", None)
    return int(found) if isinstance(found, int) and found > 0 else None


@contextlib.contextmanager
def without_hooks(model: Any) -> Iterator[None]:
    """Take all hooks of all hook points out for the length of the block."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point._forward_hooks, point._forward_hooks_with_kwargs) for point in points]
    try:
        for point in points:
            point._forward_hooks = OrderedDict()
            point._forward_hooks_with_kwargs = OrderedDict()
        yield
    finally:
        for point, hooks, with_kwargs in kept:
            point._forward_hooks = hooks
            point._forward_hooks_with_kwargs = with_kwargs


@contextlib.contextmanager
def _recording(model: Any, path: str, calls: list[Call]) -> Iterator[None]:
    module = model.get_submodule(path)

    def handle(scores: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        calls[-1].events.append(("softmax", scores))
        weights = softmax(scores)
        calls[-1].events.append(("weights", weights))
        return weights

    def fused(call: AttentionCall) -> Tensor:
        calls[-1].fused.append(call)
        return call.run()

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        calls.append(Call())
        with AttentionSoftmax(handle), FusedAttention(fused):
            yield

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if calls:
                calls[-1].events.append((name, output if isinstance(output, Tensor) else None))

        return hook

    # HookedTransformer and its like show no output of the module; what goes into it comes last.
    out = "hook_out" if hasattr(module, "hook_out") else "hook_z"
    handles = [
        getattr(module, point).register_forward_hook(note(event))
        for event, point in (
            ("scores", "hook_attn_scores"),
            ("pattern", "hook_pattern"),
            ("out", out),
        )
        if isinstance(getattr(module, point, None), nn.Module)
    ]
    try:
        with run_through(module, around):
            yield
    finally:
        for hook_handle in handles:
            hook_handle.remove()


def _site(place: Place, calls: list[Call], hint: int | None) -> AttentionSite:
    why_not, layout, n_heads = heads_of(calls, hint)
    level: Level | None = None
    if not why_not:
        level = "scores" if all(_scores_are_the_input(call) for call in calls) else "softmax"
    return AttentionSite(
        path=place.path,
        stack=place.stack,
        layer=place.layer,
        kind=place.kind,
        n_heads=n_heads,
        level=level,
        layout=layout,
        why_not=why_not,
        in_pieces=any(call.is_in_pieces for call in calls),
        pattern_is_true=all(_pattern_is_the_output(call) for call in calls),
        discarded=frozenset().union(*(_discarded(call) for call in calls)),
    )


def heads_of(calls: list[Call], hint: int | None) -> tuple[str, str, int]:
    """Give the reason why heads cannot be reached (empty if they can), their layout and number."""
    if any(call.whole for call in calls):
        return "torch.nn.MultiheadAttention computes it in one call that shows no scores", "", 0
    if any(call.fused for call in calls):
        why = (
            "its attention runs in a fused kernel, where scores cannot be reached; load the model "
            'with attn_implementation="eager", or call '
            'model.original_model.set_attn_implementation("eager")'
        )
        return why, "", 0
    counts = {len(call.tensors("softmax")) for call in calls if not call.is_in_pieces}
    if counts == {0}:
        return "no attention softmax ran inside it", "", 0
    if not counts <= {1}:
        found = ", ".join(map(str, sorted(counts)))
        return f"{found} attention softmaxes ran in one call, where one was needed", "", 0
    # A module that runs several times, as in recurrent-depth models, must look alike each time.
    shapes = [scores.shape for call in calls for scores in call.tensors("softmax")]
    layouts = {layout_of(shape, hint) for shape in shapes}
    layout = layouts.pop()
    n_heads = {heads_in(shape, layout, hint) for shape in shapes} if layout else set()
    if layouts or layout is None or len(n_heads) != 1:
        return f"its heads cannot be told apart in a softmax of shape {list(shapes[0])}", "", 0
    return "", layout, n_heads.pop()


def _scores_are_the_input(call: Call) -> bool:
    order = [call.order(name) for name in ("scores", "softmax", "pattern")]
    if any(place is None for place in order) or order != sorted(order, key=lambda i: i or 0):
        return False
    shown, received = call.tensors("scores"), call.tensors("softmax")
    if len(shown) != 1 or shown[0].shape != received[0].shape or shown[0].dim() != 4:
        return False
    return torch.equal(shown[0].float(), received[0].float())


def _pattern_is_the_output(call: Call) -> bool:
    weights, pattern, out = (call.order(name) for name in ("weights", "pattern", "out"))
    if weights is None or pattern is None or out is None or not weights < pattern < out:
        return False
    given, shown = call.tensors("weights"), call.tensors("pattern")
    if len(shown) != 1 or len(given) != 1 or shown[0].shape != given[0].shape:
        return False
    return torch.equal(shown[0].float(), given[0].float())


def _discarded(call: Call) -> frozenset[str]:
    softmax, out = call.order("softmax"), call.order("out")
    scores, pattern = call.order("scores"), call.order("pattern")
    names = set()
    if scores is not None and softmax is not None and scores > softmax:
        names.add("hook_attn_scores")
    if pattern is not None and out is not None and pattern > out:
        names.add("hook_pattern")
    return frozenset(names)


def cuda_devices(model: Any) -> list[torch.device]:
    """List the GPUs that hold parameters of the model, whose random state must be kept."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def probe_failure(tried: list[Exception]) -> UnsupportedModelError:
    """Build the error for a model that none of the made-up inputs fits."""
    last = str(tried[-1]).strip().splitlines() if tried else []
    return UnsupportedModelError(
        "Needed one forward pass to find where attention can be touched, and no made-up input fits "
        f"this model ({type(tried[-1]).__name__ if tried else 'no input'}: "
        f"{last[0] if last else ''}). Call sat_lens.attention_sites(model, *your_inputs) once "
        "first; what it finds is remembered for this model." + newer_lens()
    )
