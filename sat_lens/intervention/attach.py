"""Edits of scores, attached to a model's attention and verified in every run.

Interventions and observers alike are attached here, at whichever level a site has. An edit that
was not applied exactly once in a run of its module (where a module runs one softmax per image,
once for each) is an error, and so is somebody else's edit at a hook point whose edits the model
throws away: an intervention never silently does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sat_lens.attention import AttentionCall, rescaled_attention
from sat_lens.errors import NotReachedError, UnsupportedModelError
from sat_lens.intervention.edits import (
    Edit,
    NewScores,
    Observation,
    TransformEdit,
    put,
    put_back,
)
from sat_lens.sites import AttentionSite
from sat_lens.sites.discovery import parts_not_probed
from sat_lens.sites.interception import (
    Interception,
    Uncopied,
    surrounding,
    uncompiled,
    wrap_forward,
)
from sat_lens.sites.recomputation import check_recomputation, held_again, in_backward
from sat_lens.sites.site import as_heads, from_heads


@dataclasses.dataclass
class BlockState:
    """What happened since edits were attached: whether one ran, and whether a warning was given."""

    ran: bool = False
    warned: bool = False


@contextlib.contextmanager
def attach_edits(
    model: Any, sites: list[AttentionSite], edits: Mapping[str, Edit]
) -> Iterator[BlockState]:
    """Attach edits to sites, by path, for the length of the block.

    Raises:
        NotReachedError: In the block: a layer ran and its edit was not applied exactly once, or a
            hook of somebody else made an edit that the model throws away.
    """
    block = BlockState()
    with uncompiled(), contextlib.ExitStack() as stack:
        for site in sites:
            if site.path in edits:
                stack.enter_context(_attached(model, site, edits[site.path], block))
        stack.enter_context(held_again(partial(attach_edits, model, sites, edits)))
        yield block


@contextlib.contextmanager
def _attached(model: Any, site: AttentionSite, edit: Edit, block: BlockState) -> Iterator[None]:
    module = model.get_submodule(site.path)
    attached = _AttachedEdit(site, edit, module, module.training, [], block)
    with contextlib.ExitStack() as stack:
        if site.level == "scores":
            handle = module.hook_attn_scores.register_forward_hook(attached.at_hook_point)
            stack.callback(handle.remove)
        for name in site.discarded:
            stack.enter_context(_refusing_discarded_edits(attached, getattr(module, name), name))
        stack.enter_context(_refusing_a_layer_without_attention(attached, model))
        stack.enter_context(wrap_forward(module, attached.one_call))
        yield


def edits_on(module: nn.Module) -> list[Edit]:
    """Return the edits that are attached to an attention module now, the last one first.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.intervention import edits_on
        >>> model = sl.load_model("demo")
        >>> with sl.saturate(model):
        ...     found, _ = edits_on(model.blocks[0].attn), model("def")
        >>> found
        [TransformEdit(groups=[([0, 1, 2, 3, 4, 5, 6, 7], Limit(ties='exact'))])]
    """
    owners = [getattr(around, "__self__", None) for around in surrounding(module)]
    return [owner.edit for owner in owners if isinstance(owner, _AttachedEdit)]


class _AttachedEdit(Uncopied, threading.local):
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
        block: BlockState,
    ) -> None:
        self.site = site
        self.edit = edit
        self.only_looks = isinstance(edit, Observation)
        self.module = module
        self.was_training = was_training
        self.before_call = before_call
        self.block = block
        self.applied = 0
        self.calls = 0
        self.calls_before_layer = 0
        self.untouched: dict[str, Tensor] = {}
        self.surrogate: NewScores | None = None

    @contextlib.contextmanager
    def one_call(self) -> Iterator[None]:
        """Surround one run of the attention module."""
        if self.module.training and not self.was_training:
            raise UnsupportedModelError(
                f"{self.site.path} was put into training mode inside the block. Call model.eval() "
                "again, or begin the block anew in training mode."
            )
        self.block.ran = True
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise UnsupportedModelError(
                "The model runs under torch.func (vmap, grad, jvp), whose tensors hide the values "
                "that masks and ties are found by. Call it without; torch.autograd gives gradients."
            )
        self.calls += 1
        if self.only_looks and in_backward():
            # What backward recomputes has been looked at before.
            yield
            return
        check_recomputation(self.module, self.site.path)
        self.applied = 0
        for prepare in self.before_call:
            prepare()
        if self.site.level == "scores":
            with self._adding_surrogate():
                yield
        else:
            # At the level `kernel` too, a block inside this one may have made attention eager.
            fused = self.at_kernel if self.site.level == "kernel" else None
            with Interception(softmax=self.at_softmax, fused=fused):
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
        if self.only_looks and in_backward():
            return None
        self.applied += 1
        if isinstance(self.edit, TransformEdit):
            self.surrogate = self.edit.surrogate(scores)
            if self.surrogate is None and self._is_first_to_see(point, scores):
                self.edit.overwrite(scores)
                return None
        new = self._new(scores)
        return None if new is None else put_back(scores, new)

    def _new(self, scores: Tensor) -> NewScores | None:
        new = self.edit(scores)
        is_half = torch.finfo(scores.dtype).bits < 32
        if is_half and self.calls == 1 and not self.block.warned and new is not None:
            is_limit = isinstance(self.edit, TransformEdit) and self.edit.has_shared_rows(new)
            self.block.warned = is_limit
            if is_limit:
                warnings.warn(
                    f"Scores are in {scores.dtype}, and keys share rows in the limit whose scores "
                    "may be equal by rounding only. Load the model in float32. The documentation's "
                    'pitfall "Ties in half precision" says more.',
                    stacklevel=2,
                )
        return new

    @contextlib.contextmanager
    def _adding_surrogate(self) -> Iterator[None]:
        """At the level ``scores``, where a hook sees the scores only: reach the pattern as well."""
        if not (isinstance(self.edit, TransformEdit) and self.edit.is_straight_through):
            yield
            return
        self.surrogate = None
        with Interception(softmax=self._soften):
            yield
        if self.surrogate is not None:
            raise NotReachedError(
                f"The scores of {self.site.path} were reached and its softmax was not, so that the "
                'gradient="straight-through" has no pattern to go through. Call '
                "sat_lens.attention_sites(model, *your_inputs) to look at it again."
            )

    def _soften(self, received: Tensor, softmax: Callable[[Tensor], Tensor]) -> Tensor:
        pattern, surrogate = softmax(received), self.surrogate
        if surrogate is None:
            return pattern
        self.surrogate = None
        return self._with_gradient(pattern, surrogate)

    def _with_gradient(self, pattern: Tensor, surrogate: NewScores) -> Tensor:
        """Add zeros that carry a gradient to the chosen heads of a pattern."""
        rows = as_heads(pattern, self.site.layout, self.site.n_heads)
        index = torch.tensor(surrogate.heads, device=rows.device)
        new = rows.index_add(1, index, surrogate.scores.to(rows.dtype))
        return from_heads(new, self.site.layout, like=pattern)

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
        new = self._new(scores)
        if new is None:
            return softmax(received)
        wide = torch.promote_types(scores.dtype, torch.float32)
        changed = put(scores.to(wide), new.heads, new.scores.to(wide))
        pattern = softmax(from_heads(changed, self.site.layout, like=received))
        surrogate = self.edit.surrogate(scores) if isinstance(self.edit, TransformEdit) else None
        return pattern if surrogate is None else self._with_gradient(pattern, surrogate)

    def at_kernel(self, call: AttentionCall) -> Tensor:
        """Edit at the level ``kernel``: the kernel gets the inverse temperature of each head."""
        self.applied += 1
        if isinstance(self.edit, Observation):
            self.edit.look(call)
            return call.run()
        if not isinstance(self.edit, TransformEdit):
            raise UnsupportedModelError(f"{self.site.path} shows no scores: it runs fused.")
        now = (call.query.device, call.query.dtype)
        if now != self.site.runs_in:
            self._check_kernel(self.edit, now)
        out = rescaled_attention(call, self.edit.factors(self.site.n_heads))
        scale = self.edit.surrogate_factors(self.site.n_heads)
        if scale is None or not torch.is_grad_enabled():
            return out
        # The values' gradient is that of the hard pattern, so the soft one gets them without.
        soft = rescaled_attention(dataclasses.replace(call, value=call.value.detach()), scale)
        return out + (soft - soft.detach()) if soft.requires_grad else out

    def _check_kernel(self, edit: TransformEdit, now: tuple[torch.device, torch.dtype]) -> None:
        why = edit.why_not_fused(dataclasses.replace(self.site, runs_in=now))
        if why:
            raise NotReachedError(
                f"The fused attention of {self.site.path} ran in {now[1]} on {now[0]}, which it "
                f"did not when it was looked at, and cannot serve there: {why}. Call "
                "sat_lens.attention_sites(model, *your_inputs) to look again."
            )


@contextlib.contextmanager
def _refusing_a_layer_without_attention(attached: _AttachedEdit, model: Any) -> Iterator[None]:
    """Raise if the block around the attention module runs and the module does not."""
    path = attached.site.path.rpartition(".")[0]
    layer = model.get_submodule(path) if path else None
    if layer is None or layer is model or isinstance(layer, nn.ModuleList):
        yield
        return

    def entering(_module: nn.Module, _args: Any) -> None:
        attached.calls_before_layer = attached.calls

    def leaving(_module: nn.Module, _args: Any, _output: Any) -> None:
        if attached.calls == attached.calls_before_layer:
            raise NotReachedError(
                f"The layer {path} ran without its attention {attached.site.path}, so the chosen "
                "heads of that layer were not reached. Leave them out of the selection for this "
                "input."
            )

    handles = [layer.register_forward_pre_hook(entering), layer.register_forward_hook(leaving)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _refusing_discarded_edits(
    attached: _AttachedEdit, point: nn.Module, name: str
) -> Iterator[None]:
    """Raise if a hook edits a tensor at a point where the model discards edits."""

    def remember(_module: nn.Module, args: Any) -> None:
        shown = args[0] if args else None
        if len(point._forward_hooks) > 1 and isinstance(shown, Tensor):
            # A copy, because a hook may also edit in place and return what it was given.
            attached.untouched[name] = shown.clone()

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        before = attached.untouched.pop(name, None)
        if before is None or not isinstance(output, Tensor):
            return
        if output.shape != before.shape or not torch.equal(output, before):
            raise NotReachedError(
                f"A hook edited {attached.site.path}.{name}, and this model computes its attention "
                "elsewhere and throws that edit away. Use sat_lens.replace_attention(model, "
                "transform), which reaches the softmax itself."
            )

    handles = [point.register_forward_pre_hook(remember), point.register_forward_hook(check)]
    hooks = cast("OrderedDict[int, Callable[..., Any]]", point._forward_hooks)
    # Hooks added inside the block come later in the order: go behind them before each call.

    def go_last() -> None:
        # A block that ended before an older one has no hook left, and is run through once more.
        if handles[1].id in hooks:
            hooks.move_to_end(handles[1].id)

    attached.before_call.append(go_last)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def refusing_attention_not_probed(model: Any) -> Iterator[None]:
    """Raise if a part that did not run when the model was looked at computes attention.

    Whoever chooses all heads means those of a vision tower too. Made-up tokens do not run it, so
    none of its attention is known.

    Raises:
        NotReachedError: In the block: it did.
    """
    with contextlib.ExitStack() as stack:
        for path in parts_not_probed(model):
            stack.enter_context(wrap_forward(model.get_submodule(path), partial(_refusing, path)))
        yield


def _refusing(path: str) -> Interception:
    def refuse(*_: Any) -> Any:
        raise NotReachedError(
            f"All heads were chosen, and {path} computed attention of which nothing is known: it "
            "did not run when the model was looked at. Call sat_lens.attention_sites(model, "
            "*your_inputs) once first, with inputs on which it runs, or choose heads by name."
        )

    def softmax(scores: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        return refuse() if scores.dim() == 4 else original(scores)

    return Interception(softmax=softmax, fused=refuse, whole=refuse)
