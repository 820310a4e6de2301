"""The one door to a model's attention: edits of scores, attached and verified.

An edit receives the scores of all heads, ``[batch, head, query, key]`` in the model's dtype, and
returns the scores of some heads anew in float32, or None to leave all as they are. Through the
door go interventions and observers alike, at whichever level the site has, and every run of an
attention module is checked: an edit that was not applied exactly once is an error, and so is
somebody's edit at a hook point whose edits the model throws away.

When not to use it: from outside the library. :func:`sat_lens.replace_attention` is for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.errors import NotReachedError
from sat_lens.sites.naming import AttentionSite
from sat_lens.sites.probe import run_through
from sat_lens.sites.softmax import AttentionSoftmax, as_heads


@dataclasses.dataclass(frozen=True)
class NewScores:
    """Scores of some heads: ``scores[:, i]`` belongs to head ``heads[i]``."""

    heads: list[int]
    scores: Float[Tensor, "batch head query key"]


Edit = Callable[[Float[Tensor, "batch head query key"]], NewScores | None]


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
    door = _Door(site, edit)
    with contextlib.ExitStack() as stack:
        if site.level == "scores":
            handle = module.hook_attn_scores.register_forward_hook(door.at_hook_point)
            stack.callback(handle.remove)
        for name in site.discarded:
            stack.enter_context(_guarding(getattr(module, name), site, name, door))
        stack.enter_context(_watching_the_layer(model, site, door))
        stack.enter_context(run_through(module, door.one_call))
        yield


class _Door:
    """The state of one attached edit: how often it was applied, in this call and in this layer."""

    def __init__(self, site: AttentionSite, edit: Edit) -> None:
        self.site = site
        self.edit = edit
        self.applied = 0
        self.calls = 0
        self.before_call: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Surround one run of the attention module."""
        self.calls += 1
        self.applied = 0
        for prepare in self.before_call:
            prepare()
        if self.site.level == "softmax":
            with AttentionSoftmax(self.at_softmax):
                yield
        else:
            yield
        if self.applied != 1:
            raise NotReachedError(
                f"The attention of {self.site.path} ran, and its heads "
                f"({self.site.label(0)}, ...) were reached {self.applied} times where once was "
                "needed. Its way of computing attention has changed since it was looked at; call "
                "sat_lens.attention_sites(model, *your_inputs) to look again."
            )

    def at_hook_point(self, _module: nn.Module, _args: Any, scores: Tensor) -> Tensor | None:
        """Edit at the level ``scores``: the new scores go back in the model's dtype."""
        self.applied += 1
        new = self.edit(scores)
        if new is None:
            return None
        return _put(scores, new.heads, new.scores.to(scores.dtype))

    def at_softmax(self, received: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        """Edit at the level ``softmax``: new rows in float32, all other heads as they were."""
        self.applied += 1
        new = self.edit(as_heads(received, self.site.n_heads))
        pattern = softmax(received)
        if new is None:
            return pattern
        rows = new.scores.softmax(-1).to(pattern.dtype)
        changed = _put(as_heads(pattern, self.site.n_heads), new.heads, rows)
        return _undo_as_heads(changed, received)


def _put(whole: Tensor, heads: list[int], part: Tensor) -> Tensor:
    if len(heads) == whole.shape[1]:
        return part
    return whole.index_copy(1, torch.tensor(heads, device=whole.device), part)


def _undo_as_heads(rows: Tensor, like: Tensor) -> Tensor:
    return rows.reshape(like.shape)


@contextlib.contextmanager
def _watching_the_layer(model: Any, site: AttentionSite, door: _Door) -> Iterator[None]:
    """Raise if the block around the attention module runs and the module does not."""
    path = site.path.rpartition(".")[0]
    layer = model.get_submodule(path) if path else None
    if layer is None or layer is model or isinstance(layer, nn.ModuleList):
        yield
        return
    before = 0

    def entering(_module: nn.Module, _args: Any) -> None:
        nonlocal before
        before = door.calls

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        if door.calls == before:
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

    def check(_module: nn.Module, args: Any, output: Any) -> None:
        shown = args[0]
        if output is shown or not isinstance(output, Tensor) or not isinstance(shown, Tensor):
            return
        if output.shape != shown.shape or not torch.equal(output, shown):
            raise NotReachedError(
                f"A hook edited {site.path}.{name}, and this model computes its attention "
                "elsewhere and throws that edit away. Use sat_lens.replace_attention(model, "
                "transform), which reaches the softmax itself."
            )

    handle = point.register_forward_hook(check)
    hooks = cast("OrderedDict[int, Callable[..., Any]]", point._forward_hooks)
    # Hooks added inside the block come later in the order: go behind them before each call.
    door.before_call.append(lambda: hooks.move_to_end(handle.id))
    try:
        yield
    finally:
        handle.remove()
