"""A record of one run: the residual stream, z, and how each layer's attention was called.

When not to use it: to look at activations; TransformerLens's caches hold them by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sat_lens.errors import UnsupportedModelError
from sat_lens.patching.activations import Activations, hook_point
from sat_lens.patching.items import Item
from sat_lens.patching.runs import Setting

# Stands in recorded arguments for the hidden states, which each replay has its own.
HIDDEN = object()

_PARTS = ("ln1", "attn", "ln2", "mlp")
_CACHES = ("past_key_values", "past_key_value", "layer_past")


@dataclasses.dataclass
class Layer:
    """One block, and what the base run left there."""

    parts: Mapping[str, nn.Module]
    resid_pre: Tensor | None = None
    normed: Tensor | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class BaseRun:
    """What one run of a model left behind, for replays of patches into it.

    Attributes:
        layers: Its blocks.
        z: By path of the attention module.
        scale: The size of its logits: the median of their absolute values, at the last position.
    """

    layers: list[Layer]
    z: Activations = dataclasses.field(default_factory=dict)
    scale: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether all that a replay needs was found."""
        return bool(self.z) and all(layer.resid_pre is not None for layer in self.layers)


@contextlib.contextmanager
def recording(setting: Setting, items: list[Item]) -> Iterator[BaseRun | None]:
    """Record a run that is made in the block; None for a model that cannot be replayed."""
    layers = _layers(setting)
    points: dict[str, nn.Module] = {}
    if layers is not None and not any(item.is_group for item in items):
        with contextlib.suppress(UnsupportedModelError):
            points = {
                site.path: hook_point(setting.model, site, "z") for site in setting.sites_of(items)
            }
    if layers is None or not points:
        yield None
        return
    run = BaseRun(layers)
    with contextlib.ExitStack() as stack:
        for path, point in points.items():
            stack.callback(point.register_forward_hook(_keeping(run.z, path)).remove)
        for layer in layers:
            for handle in _watching(layer):
                stack.callback(handle.remove)
        yield run
    for layer in layers:
        _settle(layer)


def _layers(setting: Setting) -> list[Layer] | None:
    """Find the parts of every block, or give None where the model is built in another way."""
    model = setting.model
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        return None
    if any(
        not isinstance(getattr(model, name, None), nn.Module) for name in ("ln_final", "unembed")
    ):
        return None
    if [site.path for site in setting.sites] != [f"blocks.{i}.attn" for i in range(len(blocks))]:
        return None
    layers = []
    for block in blocks:
        parts = {name: getattr(block, name, None) for name in _PARTS}
        modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if len(modules) != len(_PARTS):
            return None
        layers.append(Layer(modules))
    return layers


def _watching(layer: Layer) -> list[Any]:
    def before_norm(_module: nn.Module, args: Any) -> None:
        layer.resid_pre = args[0].detach() if args and isinstance(args[0], Tensor) else None

    def after_norm(_module: nn.Module, _args: Any, output: Any) -> None:
        layer.normed = output if isinstance(output, Tensor) else None

    def before_attention(_module: nn.Module, args: Any, kwargs: Any) -> None:
        layer.args, layer.kwargs = args, dict(kwargs)

    return [
        layer.parts["ln1"].register_forward_pre_hook(before_norm),
        layer.parts["ln1"].register_forward_hook(after_norm),
        layer.parts["attn"].register_forward_pre_hook(before_attention, with_kwargs=True),
    ]


def _settle(layer: Layer) -> None:
    """Put a mark where the attention got the normed stream, and drop what a replay must not use."""
    normed, layer.normed = layer.normed, None

    def marked(value: Any) -> Any:
        return HIDDEN if value is normed else value

    layer.args = tuple(marked(value) for value in layer.args)
    layer.kwargs = {
        name: None if name in _CACHES else marked(value) for name, value in layer.kwargs.items()
    }
    if "use_cache" in layer.kwargs:
        layer.kwargs["use_cache"] = False
    found = [value for value in (*layer.args, *layer.kwargs.values()) if value is HIDDEN]
    if normed is None or len(found) != 1:
        layer.resid_pre = None


def _keeping(kept: Activations, path: str) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        kept[path] = output.detach()

    return hook
