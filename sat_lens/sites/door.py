"""The one door to a model's attention: edits of scores, attached and verified.

An edit receives the scores of all heads, ``[batch, head, query, key]`` in the model's dtype, and
returns the scores of some heads anew in float32, or None to leave all as they are. Through the
door go interventions and observers alike, at whichever level the site has, and every run of an
attention module is checked: an edit that was not applied exactly once (where a module runs one
softmax per image, once for each) is an error, and so is somebody's edit at a hook point whose edits
the model throws away.

When not to use it: from outside the library. :func:`sat_lens.replace_attention` is for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.errors import NotReachedError, UnsupportedModelError
from sat_lens.kernels import AttentionCall, FusedAttention, rescaled_attention
from sat_lens.sites.naming import AttentionSite
from sat_lens.sites.shadow import Uncopied, run_through
from sat_lens.sites.softmax import AttentionSoftmax, as_heads, from_heads


@dataclasses.dataclass(frozen=True)
class NewScores:
    """Scores of some heads: ``scores[:, i]`` belongs to head ``heads[i]``."""

    heads: list[int]
    scores: Float[Tensor, "batch head query key"]


Edit = Callable[[Float[Tensor, "batch head query key"]], NewScores | None]


@runtime_checkable
class Overwriting(Protocol):
    """An edit that can also do its work in the memory of the scores themselves, in float32."""

    def overwrite(self, scores: Float[Tensor, "batch head query key"], /) -> None:
        """Put the new scores in the place of the old."""
        ...


@runtime_checkable
class Rescaling(Protocol):
    """An edit that multiplies each head's scores by a number, which a fused kernel can do too."""

    def factors(self, n_heads: int) -> Float[Tensor, " head"]:
        """Give the inverse temperature of each head."""
        ...


@runtime_checkable
class WatchingCalls(Protocol):
    """An edit that changes nothing and can look at a fused kernel's arguments."""

    def look(self, call: AttentionCall) -> None:
        """Look at a call before it is made."""
        ...


@contextlib.contextmanager
def open_door(model: Any, edits: Mapping[str, Edit], sites: list[AttentionSite]) -> Iterator[None]:
    """Attach edits to sites, by path, for the length of the block.

    Raises:
        NotReachedError: In the block: a layer ran and its edit was not applied exactly once, or a
            hook of somebody else made an edit that the model throws away.
    """
    with contextlib.ExitStack() as stack:
        for site in sites:
            if site.path in edits:
                stack.enter_context(_attached(model, site, edits[site.path]))
        yield


@contextlib.contextmanager
def _attached(model: Any, site: AttentionSite, edit: Edit) -> Iterator[None]:
    module = model.get_submodule(site.path)
    door = _Door(site, edit, module, module.training, [])
    with contextlib.ExitStack() as stack:
        if site.level == "scores":
            handle = module.hook_attn_scores.register_forward_hook(door.at_hook_point)
            stack.callback(handle.remove)
        for name in site.discarded:
            stack.enter_context(_guarding(getattr(module, name), site, name, door))
        stack.enter_context(_watching_the_layer(model, site, door))
        stack.enter_context(run_through(module, door.one_call))
        yield


class _Door(Uncopied, threading.local):
    """The state of one attached edit: how often it was applied, in this call and in this layer.

    Each thread counts for itself; what the constructor is given, they share.
    """

    def __init__(
        self,
        site: AttentionSite,
        edit: Edit,
        module: nn.Module,
        was_training: bool,
        before_call: list[Callable[[], None]],
    ) -> None:
        self.site = site
        self.edit = edit
        self.module = module
        self.was_training = was_training
        self.before_call = before_call
        self.applied = 0
        self.calls = 0
        self.calls_before_layer = 0
        self.untouched: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Surround one run of the attention module."""
        if self.module.training and not self.was_training:
            raise UnsupportedModelError(
                f"{self.site.path} was put into training mode inside the block. Call model.eval() "
                "again, or begin the block anew in training mode."
            )
        self.calls += 1
        self.applied = 0
        for prepare in self.before_call:
            prepare()
        if self.site.level == "softmax":
            with AttentionSoftmax(self.at_softmax):
                yield
        elif self.site.level == "kernel":
            # A block inside this one may have made the model's attention eager.
            with FusedAttention(self.at_kernel), AttentionSoftmax(self.at_softmax):
                yield
        else:
            yield
        if self.applied != 1 and not (self.applied and self.site.in_pieces):
            raise NotReachedError(
                f"The attention of {self.site.path} ran, and its heads "
                f"({self.site.label(0)}, ...) were reached {self.applied} times where once was "
                "needed. Its way of computing attention has changed since it was looked at; call "
                "sat_lens.attention_sites(model, *your_inputs) to look again."
            )

    def at_hook_point(self, point: nn.Module, _args: Any, scores: Tensor) -> Tensor | None:
        """Edit at the level ``scores``: the new scores go back in the model's dtype."""
        self.applied += 1
        if isinstance(self.edit, Overwriting) and self._is_first_to_see(point, scores):
            self.edit.overwrite(scores)
            return None
        new = self.edit(scores)
        if new is None:
            return None
        return put(scores, new.heads, new.scores.to(scores.dtype))

    def _is_first_to_see(self, point: nn.Module, scores: Tensor) -> bool:
        """Whether no cache, hook or gradient can need the scores as they are.

        The attention module goes on with what its hook point returns. Whoever has a hook before
        this one may have kept the tensor itself, as TransformerLens's caches do.
        """
        others = nn.modules.module
        seen = (
            next(iter(point._forward_hooks.values())) != self.at_hook_point
            or point._forward_pre_hooks
            or others._global_forward_hooks
            or others._global_forward_pre_hooks
        )
        needed = torch.is_grad_enabled() and scores.requires_grad
        return not seen and not needed and scores.dtype == torch.float32

    def at_softmax(self, received: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        """Edit at the level ``softmax``: the softmax gets the new scores in float32 at least.

        It gets them instead of the pattern being replaced, so that the edits of nested blocks
        follow one another as they do at the level ``scores``.
        """
        self.applied += 1
        scores = as_heads(received, self.site.layout, self.site.n_heads)
        new = self.edit(scores)
        if new is None:
            return softmax(received)
        wide = torch.promote_types(scores.dtype, torch.float32)
        changed = put(scores.to(wide), new.heads, new.scores.to(wide))
        return softmax(from_heads(changed, self.site.layout, like=received))

    def at_kernel(self, call: AttentionCall) -> Tensor:
        """Edit at the level ``kernel``: the kernel gets the inverse temperature of each head."""
        self.applied += 1
        if isinstance(self.edit, WatchingCalls):
            self.edit.look(call)
            return call.run()
        if not isinstance(self.edit, Rescaling):
            raise UnsupportedModelError(f"{self.site.path} shows no scores: it runs fused.")
        return rescaled_attention(call, self.edit.factors(self.site.n_heads))


def put(whole: Tensor, heads: list[int], part: Tensor) -> Tensor:
    """Give ``whole`` with the given heads (its second axis) replaced by those of ``part``."""
    if len(heads) == whole.shape[1]:
        return part
    return whole.index_copy(1, torch.tensor(heads, device=whole.device), part)


@contextlib.contextmanager
def _watching_the_layer(model: Any, site: AttentionSite, door: _Door) -> Iterator[None]:
    """Raise if the block around the attention module runs and the module does not."""
    path = site.path.rpartition(".")[0]
    layer = model.get_submodule(path) if path else None
    if layer is None or layer is model or isinstance(layer, nn.ModuleList):
        yield
        return

    def entering(_module: nn.Module, _args: Any) -> None:
        door.calls_before_layer = door.calls

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        if door.calls == door.calls_before_layer:
            raise NotReachedError(
                f"The layer {path} ran without its attention {site.path}, so the chosen heads of "
                "that layer were not reached. Leave them out of the selection for this input."
            )

    handles = [layer.register_forward_pre_hook(entering), layer.register_forward_hook(leaving)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _guarding(point: nn.Module, site: AttentionSite, name: str, door: _Door) -> Iterator[None]:
    """Raise if a hook edits a tensor at a point where the model discards edits."""

    def remember(_module: nn.Module, args: Any) -> None:
        shown = args[0] if args else None
        if len(point._forward_hooks) > 1 and isinstance(shown, Tensor):
            # A copy, because a hook may also edit in place and return what it was given.
            door.untouched[name] = shown.clone()

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        before = door.untouched.pop(name, None)
        if before is None or not isinstance(output, Tensor):
            return
        if output.shape != before.shape or not torch.equal(output, before):
            raise NotReachedError(
                f"A hook edited {site.path}.{name}, and this model computes its attention "
                "elsewhere and throws that edit away. Use sat_lens.replace_attention(model, "
                "transform), which reaches the softmax itself."
            )

    handles = [point.register_forward_pre_hook(remember), point.register_forward_hook(check)]
    hooks = cast("OrderedDict[int, Callable[..., Any]]", point._forward_hooks)
    # Hooks added inside the block come later in the order: go behind them before each call.

    def go_last() -> None:
        # A door that ended before an older one has no hook left, and is run through once more.
        if handles[1].id in hooks:
            hooks.move_to_end(handles[1].id)

    door.before_call.append(go_last)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
