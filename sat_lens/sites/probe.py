"""Finding the attention of a model, and its levels, by running it once and watching.

One forward pass records, module by module, in which order the scores' hook, the softmax, the
pattern's hook and the end of the module come, and whether the softmax received exactly what the
scores' hook showed. The level is ``scores`` if the hook came first and its tensor went into the
softmax unchanged, ``softmax`` in all other cases with one softmax per call, and ``kernel`` in a
plain Hugging Face model with one fused attention per call. The model discards edits at hook points
that fire after the softmax; their names are kept, so that nobody makes such an edit unaware.

TransformerLens's hook points say which modules are attention. Where there are none (vision towers
that it wraps as a whole, hybrids, plain models), it is the innermost module that runs when a fused
attention or a softmax over four axes is called, if that softmax has a query for each position of
the module's input. The mixing of parallel residual streams has not, nor has attention among
channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.attention import AttentionCall
from sat_lens.errors import UnsupportedModelError
from sat_lens.models import device_of
from sat_lens.sites.interception import Interception, uncompiled
from sat_lens.sites.site import (
    AttentionSite,
    Kind,
    Level,
    Place,
    heads_in,
    layout_of,
    places,
    plain_place,
)

_WRAPPED = "_original_component."


def probe(
    model: Any, paths: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[AttentionSite], list[str]]:
    """Run the model once, without the hooks of its hook points, and find its attention.

    ``paths`` are the modules whose hook points show a pattern; None for a plain model.

    Returns:
        The attention modules that ran, those that ``paths`` did not name last; and the parts of the
        model that did not run.
    """
    used = {device_of(model), *(p.device for p in model.parameters())}
    devices = [device for device in used if device.type == "cuda"]
    with (
        uncompiled(),
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        _without_hooks(model),
        _watching(model, paths or []) as watched,
    ):
        model(*args, **kwargs)
    calls = watched.calls
    if paths is None:
        order = [path for path, _ in model.named_modules() if path in calls]
        found = [plain_place(path, _kind(calls[path])) for path in order]
        if len({place.stack for place in found}) == 1:
            found = [dataclasses.replace(place, stack="") for place in found]
    else:
        named = [path for path in paths if path in calls]
        found = places([*named, *(path for path in calls if path not in named)])
    hint = head_count_hint(model)
    sites = [_site(place, calls[place.path], hint, plain=paths is None) for place in found]
    sites = [dataclasses.replace(site, dropout=watched.dropout) for site in sites]
    return sites, watched.idle()


def head_count_hint(model: Any) -> int | None:
    """Return the number of heads that the configuration claims; it only splits packed axes."""
    lens, plain = getattr(model, "cfg", None), getattr(model, "config", None)
    owner, name = (plain, "num_attention_heads") if lens is None else (lens, "n_heads")
    found = getattr(owner, name, None)
    return int(found) if isinstance(found, int) and found > 0 else None


# Watching one forward pass.


@dataclasses.dataclass
class Call:
    """What happened while one attention module ran once, in order."""

    positions: int = 0  # of its input; 0 where nobody counted
    events: list[tuple[str, Tensor | None]] = dataclasses.field(default_factory=list)
    fused: list[AttentionCall] = dataclasses.field(default_factory=list)
    whole: bool = False  # PyTorch's own multi-head attention ran, which shows nothing of itself

    def order(self, name: str) -> int | None:
        """Return the position of the first event of that name, or None."""
        return next((i for i, (event, _) in enumerate(self.events) if event == name), None)

    def tensors(self, name: str) -> list[Tensor]:
        """All tensors recorded under that name."""
        return [tensor for event, tensor in self.events if event == name and tensor is not None]

    @property
    def is_in_pieces(self) -> bool:
        """Whether several softmaxes ran and each position of the input had its row in one of them.

        Towers that pack images of any size, or windows of one, into one sequence do so.
        """
        shapes = [scores.shape for scores in self.tensors("softmax")]
        attend_to_themselves = all(shape[-2] == shape[-1] for shape in shapes)
        rows = sum(shape[0] * shape[-2] for shape in shapes)
        return len(shapes) > 1 and attend_to_themselves and rows == self.positions

    def has_a_query_per_position(self) -> bool:
        """Whether its softmaxes have, together, a query for each position of its input.

        They have more where a window is filled up.
        """
        if self.fused or self.whole:
            return True
        shapes = [scores.shape for scores in self.tensors("softmax")]
        queries = sum(shape[0] * shape[2] for shape in shapes)
        before_heads = sum(shape[0] * shape[1] for shape in shapes if shape[2] != shape[3])
        return max(queries, before_heads) >= self.positions > 0


@dataclasses.dataclass
class _Watched:
    """What one forward pass showed."""

    model: nn.Module
    known: dict[nn.Module, str]  # whose hook points show a pattern, with their paths
    running: list[tuple[nn.Module, Call]]  # at the moment, the innermost last
    dropout: bool = False
    ran: set[nn.Module] = dataclasses.field(default_factory=set)
    found: dict[nn.Module, list[Call]] = dataclasses.field(default_factory=dict)

    def known_call(self) -> Call | None:
        """The call of the innermost known module that runs."""
        calls = [call for module, call in self.running if module in self.known]
        return calls[-1] if calls else None

    def last_call(self, module: nn.Module) -> Call | None:
        """The call of a known module that runs, or else that ran last."""
        ended = self.found.get(module, [])
        calls = ended + [call for other, call in self.running if other is module]
        return calls[-1] if calls else None

    @property
    def calls(self) -> dict[str, list[Call]]:
        """The runs of each attention module, by the shortest name that the model has for it."""
        unknown: dict[nn.Module, list[str]] = {}
        if not self.found.keys() <= self.known.keys():
            for name, module in _everything_in(self.model, remove_duplicate=False).items():
                if module in self.found and module not in self.known:
                    unknown.setdefault(module, []).append(name)
        name_of = self.known | {module: _best(names) for module, names in unknown.items()}
        return {name_of[module]: calls for module, calls in self.found.items()}

    def idle(self) -> list[str]:
        """Return the names of the largest parts that did not run and could hold attention."""
        parts: list[str] = []
        covered: set[nn.Module] = set()
        for name, module in _everything_in(self.model).items():
            within = set(module.modules())
            if module not in covered and not within & self.ran and _could_attend(module):
                covered |= within
                parts.append(name)
        return parts


@contextlib.contextmanager
def _watching(model: nn.Module, paths: list[str]) -> Iterator[_Watched]:
    """Record, while the block lasts, the runs of modules that compute attention."""
    known = {model.get_submodule(path): path for path in paths}
    watched = _Watched(model, known, [(model, Call())])

    def entering(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        watched.ran.add(module)
        positions = 0 if module in known else _positions(args, kwargs)
        watched.running.append((module, Call(positions)))

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        module, call = watched.running.pop()
        if module in known or call.has_a_query_per_position():
            watched.found.setdefault(module, []).append(call)

    def softmax(scores: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        call = watched.known_call()
        if call is None and scores.dim() == 4:
            watched.running[-1][1].events.append(("softmax", scores))
        if call is None:
            return original(scores)
        call.events.append(("softmax", scores))
        weights = original(scores)
        call.events.append(("weights", weights))
        return weights

    def fused(call: AttentionCall) -> Tensor:
        (watched.known_call() or watched.running[-1][1]).fused.append(call)
        return call.run()

    def whole() -> None:
        watched.running[-1][1].whole |= watched.known_call() is None

    def dropout() -> None:
        watched.dropout = True

    def showing(module: nn.Module, event: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_point: nn.Module, _args: Any, output: Any) -> None:
            call = watched.last_call(module)
            if call is not None:
                call.events.append((event, output if isinstance(output, Tensor) else None))

        return hook

    with contextlib.ExitStack() as stack:
        for module in set(_everything_in(model).values()) - {model}:
            enter = module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True)
            stack.callback(enter.remove)
            stack.callback(module.register_forward_hook(leaving, always_call=True).remove)
        for module in known:
            for event, point in _points(module):
                stack.callback(point.register_forward_hook(showing(module, event)).remove)
        stack.enter_context(
            Interception(softmax=softmax, fused=fused, whole=whole, dropout=dropout)
        )
        yield watched


def _points(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the hook points of an attention module that tell what it computes, and when."""
    # HookedTransformer and its like show no output of the module; what goes into it comes last.
    out = "hook_out" if hasattr(module, "hook_out") else "hook_z"
    names = {"scores": "hook_attn_scores", "pattern": "hook_pattern", "out": out}
    found = [(event, getattr(module, name, None)) for event, name in names.items()]
    return [(event, point) for event, point in found if isinstance(point, nn.Module)]


@contextlib.contextmanager
def _without_hooks(model: Any) -> Iterator[None]:
    """Take all hooks of all hook points out for the length of the block."""
    points = {id(point): point for point in getattr(model, "hook_dict", {}).values()}.values()
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


def _everything_in(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """List all modules by name, also those that a wrapper keeps outside of its own tree."""
    named = dict(model.named_modules(remove_duplicate=remove_duplicate))
    own = set(named.values())
    original = getattr(model, "original_model", None)
    if isinstance(original, nn.Module):
        for name, module in original.named_modules():
            if module not in own and name:
                named[f"original_model.{name}"] = module
    return named


def _positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Count the positions of a module's input, whatever its axes: the last is their width."""
    inputs = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    shape = next(inputs, Tensor()).shape
    return math.prod(shape[:-1]) if len(shape) > 1 else 0


def _best(names: list[str]) -> str:
    """Choose TransformerLens's own name of a module over that of the model inside."""
    shortest = min(names, key=lambda name: (name.count(_WRAPPED), len(name)))
    return f"{shortest}.".replace(_WRAPPED, "").removesuffix(".")


def _could_attend(module: nn.Module) -> bool:
    """Whether it has the weights of two projections, and more to do than to call its parts."""
    weighted = [part for part in module.modules() if part._parameters]
    only_a_list = type(module).forward in (nn.Module.forward, nn.Sequential.forward)
    return len(weighted) > 1 and not only_a_list


# Reading a site off what was recorded.


def _site(place: Place, calls: list[Call], hint: int | None, *, plain: bool) -> AttentionSite:
    level: Level | None
    runs_in = None
    if plain and all(len(call.fused) == 1 and not call.events for call in calls):
        (fused,) = calls[0].fused
        level, why_not, layout, n_heads = "kernel", _bias(fused), "b h q k", fused.query.shape[1]
        runs_in = (fused.query.device, fused.query.dtype)
    else:
        why_not, layout, n_heads = heads_seen(calls, hint)
        level = "scores" if all(_scores_are_the_input(call) for call in calls) else "softmax"
        level = None if why_not else level
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
        runs_in=runs_in,
    )


def heads_seen(calls: list[Call], hint: int | None) -> tuple[str, str, int]:
    """Return why heads cannot be reached (empty if they can), their layout, and their number."""
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


def _kind(calls: list[Call]) -> Kind:
    """Tell cross attention by its keys: the probe's decoder gets fewer tokens than its encoder."""
    softmax = [scores for call in calls for scores in call.tensors("softmax")]
    shapes = [(scores.shape[-2], scores.shape[-1]) for scores in softmax]
    shapes += [(f.query.shape[-2], f.key.shape[-2]) for call in calls for f in call.fused]
    return "cross" if any(queries < keys for queries, keys in shapes) else "self"


def _bias(call: AttentionCall) -> str:
    """Return what keeps the kernel from serving; empty if nothing does."""
    try:
        call.visible()
    except UnsupportedModelError:
        return "it adds a bias to its scores, which a factor on its queries does not reach"
    return ""


def _scores_are_the_input(call: Call) -> bool:
    order = [call.order(name) for name in ("scores", "softmax", "pattern")]
    if any(place is None for place in order) or order != sorted(order, key=lambda i: i or 0):
        return False
    shown = call.tensors("scores")
    return _same(shown, call.tensors("softmax")) and shown[0].dim() == 4


def _pattern_is_the_output(call: Call) -> bool:
    weights, pattern, out = (call.order(name) for name in ("weights", "pattern", "out"))
    if weights is None or pattern is None or out is None or not weights < pattern < out:
        return False
    return _same(call.tensors("pattern"), call.tensors("weights"))


def _same(shown: list[Tensor], computed: list[Tensor]) -> bool:
    if len(shown) != 1 or len(computed) != 1 or shown[0].shape != computed[0].shape:
        return False
    return torch.equal(shown[0].float(), computed[0].float())


def _discarded(call: Call) -> frozenset[str]:
    softmax, out = call.order("softmax"), call.order("out")
    scores, pattern = call.order("scores"), call.order("pattern")
    names = set()
    if scores is not None and softmax is not None and scores > softmax:
        names.add("hook_attn_scores")
    if pattern is not None and out is not None and pattern > out:
        names.add("hook_pattern")
    return frozenset(names)
