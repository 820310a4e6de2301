"""The fast route: replay only what comes after a patched head.

One pass over the base run keeps, for each layer, the residual stream and the arguments with which
its attention was called. A patched head then costs its layer's output projection and what lies
above: the layers are run module by module, several heads side by side where that pays, and where
the metric reads few positions the last MLP and the unembedding see only those.

This supposes layers of the form ``x + attn(ln1(x))``, then ``x + mlp(ln2(x))``. Nothing is taken
on trust: a layer that lacks one of these modules is refused here, and
:mod:`sat_lens.patching.exact` compares the results with whole forward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens.intervention import attach_transforms
from sat_lens.patching.activations import with_heads
from sat_lens.patching.items import Item
from sat_lens.patching.quick import aligned_unembedding, computed_by, quick_gelus
from sat_lens.patching.recording import HIDDEN, BaseRun
from sat_lens.patching.runs import Local, Patch, Setting, local_activations
from sat_lens.patching.tuning import pace_of


class Replay:
    """Replays one patch; made by :meth:`of`.

    Attributes:
        pace: How many heads of a layer are replayed side by side.
        scale: The size of the base run's logits.
    """

    def __init__(
        self, setting: Setting, patch: Patch, run: BaseRun, new_z: Mapping[str, Tensor]
    ) -> None:
        self.setting = setting
        self.patch = patch
        self.layers = run.layers
        self.scale = run.scale
        self.pace = pace_of(run, patch)
        self._base_z = run.z
        self._new_z = new_z
        mlps = [module for layer in run.layers for module in layer.parts["mlp"].modules()]
        # The two differ by rounding, so not in a saturated run.
        self._gelus = quick_gelus(mlps) if patch.base is None else {}
        self._unembedding = aligned_unembedding(setting.model.unembed)

    @classmethod
    def of(
        cls, setting: Setting, patch: Patch, items: list[Item], run: BaseRun | None
    ) -> Replay | None:
        """Prepare the replay, or give None for a model or a patch that it cannot serve."""
        source = patch.source
        if run is None or not run.is_whole:
            return None
        if isinstance(source, Local):
            return cls(setting, patch, run, local_activations(setting, patch, items, run.z))
        return cls(setting, patch, run, source.activations) if source.component == "z" else None

    def kind(self, item: Item) -> object:
        """Tell layers of different make apart: by their modules, and by how far they attend."""
        parts = self.layers[item.layer].parts
        makes = tuple(
            (name, type(module).__name__)
            for part in parts.values()
            for name, module in part.named_modules()
        )
        attention = getattr(parts["attn"], "original_component", parts["attn"])
        reach = tuple(
            str(getattr(attention, name, None)) for name in ("sliding_window", "is_sliding")
        )
        site = self.setting.site(f"blocks.{item.layer}.attn")
        return makes, reach, site.level, site.n_heads

    def depth(self, item: Item) -> int:
        """Count the layers that a replay of the item runs, in whole or in part."""
        return len(self.layers) - item.layer

    def streams(
        self, patches: list[tuple[Item, int | None]]
    ) -> Float[Tensor, "row read_position d_model"]:
        """Give the last residual stream of patches in one layer, prompts of one after another."""
        layer = patches[0][0].layer
        path = f"blocks.{layer}.attn"
        site = self.setting.site(path)
        z = torch.cat(
            [
                with_heads(
                    self._base_z[path], self._new_z[path], site.n_heads, item.selection[path], at
                )
                for item, at in patches
            ]
        )
        here = self.layers[layer]
        output = here.parts["attn"].get_submodule("o")(z)
        assert here.resid_pre is not None
        before = torch.cat([here.resid_pre] * len(patches)) if len(patches) > 1 else here.resid_pre
        with self._base_above(layer), computed_by(self._gelus):
            return self._rest(before + output, layer, len(patches))

    def logits(self, streams: Tensor) -> list[Tensor]:
        """Give the logits of each patch, ``[batch, read position, vocab]``."""
        model = self.setting.model
        with computed_by(self._unembedding):
            found = model.unembed(model.ln_final(streams))
        return list(found.split(self.patch.batch.size))

    def _rest(self, x: Tensor, layer: int, copies: int) -> Tensor:
        """Run every layer after the attention of ``layer``."""
        read = self.setting.readout.positions
        for i in range(layer, len(self.layers)):
            if i > layer:
                x = x + self._attend(i, x, copies)
            if i == len(self.layers) - 1 and read is not None:
                x = x[:, read]
            parts = self.layers[i].parts
            x = x + _first(parts["mlp"](parts["ln2"](x)))
        return x

    def _attend(self, i: int, x: Tensor, copies: int) -> Tensor:
        here = self.layers[i]
        normed = here.parts["ln1"](x)
        size = self.patch.batch.size

        def fit(value: Any) -> Any:
            if value is HIDDEN:
                return normed
            return _repeated(value, size, copies)

        args = [fit(value) for value in here.args]
        kwargs = {name: fit(value) for name, value in here.kwargs.items()}
        return _first(here.parts["attn"](*args, **kwargs))

    @contextlib.contextmanager
    def _base_above(self, layer: int) -> Iterator[None]:
        base = self.patch.base
        if base is None:
            yield
            return
        groups = {
            site.path: [(list(range(site.n_heads)), base)]
            for site in self.setting.sites
            if site.layer > layer
        }
        with attach_transforms(self.setting.model, self.setting.sites, groups):
            yield


def _repeated(value: Any, size: int, copies: int) -> Any:
    """Repeat what has an entry per prompt; what all prompts share broadcasts by itself."""
    if isinstance(value, tuple):
        return tuple(_repeated(part, size, copies) for part in value)
    per_prompt = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == size > 1
    return torch.cat([value] * copies) if per_prompt and copies > 1 else value


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
