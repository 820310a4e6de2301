"""The blocks below every changed head, which a second run of a model need not compute again.

While one run goes, the inputs and outputs of these blocks are kept. In the next, a block that is
called with equal inputs returns what it returned before; a block that is not, and all above it, are
computed. So that nothing but inputs and outputs can matter, no block is kept in which the first run
drew random numbers or which has a hook of somebody else, and key-value caches, which blocks fill on
the way, are put into the state in which the block left them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.sites import AttentionSite, Selection

# Arguments of a run that change nothing besides its blocks' inputs and what it returns.
_HARMLESS = {
    "attention_mask",
    "labels",
    "loss_per_token",
    "one_zero_attention_mask",
    "padding_side",
    "pos_slice",
    "position_ids",
    "prepend_bos",
    "remove_batch_dim",
    "return_type",
    "stop_at_layer",
    "token_type_ids",
}
_LIBRARIES = ("transformer_lens.", "transformers.")


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of a block, and what it left behind."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    versions: list[int]
    kv_layers: list[list[Any]]


class Prefix:
    """Runs of some blocks of a model, kept by :meth:`recording` and returned by :meth:`replay`.

    Attributes:
        replayed: The paths of the blocks that the last replay did not compute.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.replayed: list[str] = []
        self._blocks = blocks
        self._calls: list[_Call] = []

    @classmethod
    def below(
        cls, model: Any, sites: list[AttentionSite], chosen: Selection, run: Mapping[str, Any]
    ) -> Prefix:
        """Take the blocks below the chosen attention modules, or none where that is unsafe.

        ``run`` holds the keyword arguments of both runs.
        """
        blocks = stacked_blocks(model, sites)
        one_stack = len({block_path(block_path(site.path)) for site in sites}) == 1
        safe = run.keys() <= _HARMLESS and run.get("return_type") != "logits_and_cache"
        if not (blocks and one_stack and safe):
            return cls({})
        paths = list(blocks)
        first = min(paths.index(block_path(site.path)) for site in sites if site.path in chosen)
        below, above = ({path: blocks[path] for path in p} for p in (paths[:first], paths[first:]))
        return cls({} if below and _is_hooked(model, below, above) else below)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the blocks do in one run that is made in the block."""
        before = _random_states() if self._blocks else []
        with contextlib.ExitStack() as stack:
            for path, block in self._blocks.items():
                handle = block.register_forward_hook(self._keeper(path), with_kwargs=True)
                stack.callback(handle.remove)
            yield
        in_order = [call.path for call in self._calls] == list(self._blocks)[: len(self._calls)]
        if not in_order or not all(map(torch.equal, before, _random_states())):
            self._calls.clear()

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Return recorded outputs, during the block, where blocks are called with equal inputs."""
        self.replayed = []
        blocks = [self._blocks[call.path] for call in self._calls]
        with computed_by(
            {
                block: self._player(block.forward, place, call)
                for place, (block, call) in enumerate(zip(blocks, self._calls, strict=True))
            }
        ):
            yield

    def completed(
        self, own: Mapping[str, Tensor], soft: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Return a replayed run's activations and those it did not compute, in the run's order.

        None if the names of the first run's activations do not fit.
        """
        starts = tuple(f"{path}." for path in self.replayed)
        if [name for name in soft if not name.startswith(starts)] != list(own):
            return None
        return {name: own.get(name, value) for name, value in soft.items()}

    def _keeper(self, path: str) -> Callable[..., None]:
        def keep(_block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if _can_be_kept(output):
                kv_layers = [_copied(cache.layers) for cache in _kv_caches(args, kwargs)]
                self._calls.append(_Call(path, args, kwargs, output, _versions(output), kv_layers))

        return keep

    def _player(self, forward: Callable[..., Any], place: int, call: _Call) -> Callable[..., Any]:
        def play(*args: Any, **kwargs: Any) -> Any:
            untouched = call.versions == _versions(call.output)
            same = _same(call.args, args) and _same(call.kwargs, kwargs)
            if not (untouched and same and len(self.replayed) == place):
                return forward(*args, **kwargs)
            for cache, layers in zip(_kv_caches(args, kwargs), call.kv_layers, strict=True):
                cache.layers[:] = _copied(layers)
            self.replayed.append(call.path)
            return call.output

        return play


@contextlib.contextmanager
def computed_by(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let functions stand in the place of modules' own ``forward`` while the block lasts."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def block_path(path: str) -> str:
    """Return the path of the block that an attention module belongs to."""
    return path.rpartition(".")[0]


def stacked_blocks(model: Any, sites: list[AttentionSite]) -> dict[str, nn.Module]:
    """Return every block, by path, of the lists of blocks that hold the sites."""
    stacks = dict.fromkeys(block_path(block_path(site.path)) for site in sites)
    lists = {path: model.get_submodule(path) for path in stacks if path}
    return {
        f"{path}.{i}": block
        for path, blocks in lists.items()
        if isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks)
    }


def _is_hooked(
    model: nn.Module, below: Mapping[str, nn.Module], above: Mapping[str, nn.Module]
) -> bool:
    """Whether somebody else can see or change what runs before the lower blocks end."""
    torch_wide = nn.modules.module
    if torch_wide._global_forward_hooks or torch_wide._global_forward_pre_hooks:
        return True
    early, late = (
        {module for block in blocks.values() for module in block.modules()}
        for blocks in (below, above)
    )
    return any(_has_foreign_hook(module) for module in {*model.modules()} - (late - early))


def _has_foreign_hook(module: Any) -> bool:
    if "forward" in module.__dict__ or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks: list[Any] = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if hasattr(module, "fwd_hooks"):
        # TransformerLens wraps what is hooked to its points, and links some of them by itself.
        own = [handle for handle in module.fwd_hooks if handle.is_permanent]
        if len(hooks) > len(own):
            return True
        hooks = [getattr(handle, "user_hook", None) for handle in own]
    return not all(str(getattr(hook, "__module__", "")).startswith(_LIBRARIES) for hook in hooks)


def _random_states() -> list[Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def _parts(output: Any) -> tuple[Any, ...]:
    return output if type(output) is tuple else (output,)


def _can_be_kept(output: Any) -> bool:
    """Whether changes of it would be noticed, and no gradient flows through it."""
    return all(
        part is None
        or (isinstance(part, Tensor) and not part.requires_grad and not part.is_inference())
        for part in _parts(output)
    )


def _versions(output: Any) -> list[int]:
    return [part._version for part in _parts(output) if part is not None]


def _is_kv_cache(value: Any) -> bool:
    layers = getattr(value, "layers", None)
    return type(value).__name__ == "DynamicCache" and isinstance(layers, list)


def _kv_caches(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    return [value for value in (*args, *kwargs.values()) if _is_kv_cache(value)]


def _copied(layers: list[Any]) -> list[Any]:
    """Copy a cache's layers, but not the tensors, which layers replace instead of changing them."""
    copies = [copy.copy(layer) for layer in layers]
    for layer in copies:
        for name, value in vars(layer).items():
            if isinstance(value, (dict, list)):
                setattr(layer, name, copy.copy(value))
    return copies


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal beyond doubt; what is neither plain nor a tensor never is."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one is other or (
            one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
        )
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return _is_kv_cache(one) or (
        isinstance(one, (bool, int, float, str, type(None))) and one == other
    )
