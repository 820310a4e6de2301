"""One forward pass with something patched in: the generic route, exact on every architecture.

A patch says which run it goes into (the base: soft, or with every head transformed), and where the
patched-in values come from: computed in that very run (:class:`Local`), or taken from another one
(:class:`FromRun`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.attention import Transform, transform_scores
from sat_lens.data import Batch
from sat_lens.intervention import (
    Edit,
    NewScores,
    attach_edits,
    attach_transforms,
    bind_transform,
)
from sat_lens.patching.activations import (
    Activations,
    Component,
    captured,
    n_heads_of,
    replacing,
    with_heads,
)
from sat_lens.patching.items import Item
from sat_lens.patching.readout import Readout
from sat_lens.sites import AttentionSite


@dataclasses.dataclass(frozen=True)
class Local:
    """The chosen heads' patterns, computed in the base run: transformed, or soft for None."""

    transform: Transform | None


@dataclasses.dataclass(frozen=True)
class FromRun:
    """A component of the chosen heads, taken from another run; for patterns, their scores."""

    component: Component
    activations: Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Patch:
    """What is patched: into the base run (every head transformed; soft for None), from a source."""

    batch: Batch
    base: Transform | None
    source: Local | FromRun


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model of one sweep, its attention modules, and how its output is read."""

    model: Any
    sites: list[AttentionSite]
    readout: Readout

    @property
    def unembed(self) -> nn.Module | None:
        """The unembedding, where TransformerLens shows one."""
        found = getattr(self.model, "unembed", None)
        return found if isinstance(found, nn.Module) else None

    def site(self, path: str) -> AttentionSite:
        """The attention module at that path."""
        return next(site for site in self.sites if site.path == path)

    def sites_of(self, items: list[Item]) -> list[AttentionSite]:
        """The attention modules in which the items have heads."""
        paths = {path for item in items for path in item.selection}
        return [site for site in self.sites if site.path in paths]


def everywhere(setting: Setting, base: Transform | None) -> contextlib.AbstractContextManager[Any]:
    """Transform every head of the model while the block lasts; None leaves the model soft."""
    if base is None:
        return contextlib.nullcontext()
    groups = {site.path: [(list(range(site.n_heads)), base)] for site in setting.sites}
    return attach_transforms(setting.model, setting.sites, groups)


def patched_logits(setting: Setting, patch: Patch, item: Item, position: int | None) -> Any:
    """Run the model with one item patched; logits are those that the readout's metric reads."""
    with contextlib.ExitStack() as stack:
        if isinstance(patch.source, Local):
            _patch_local(stack, setting, patch, patch.source, item, position)
        else:
            stack.enter_context(everywhere(setting, patch.base))
            for path, heads in item.selection.items():
                site = setting.site(path)
                stack.enter_context(_from_run(setting, site, patch.source, heads, position))
        stack.enter_context(setting.readout.narrowed(setting.unembed))
        return patch.batch.run(setting.model)


def activations_of(
    setting: Setting, batch: Batch, base: Transform | None, component: Component, items: list[Item]
) -> Activations:
    """Run the model, and give a component of every head that the items may need."""
    with (
        everywhere(setting, base),
        taking(setting, items, component) as found,
        setting.readout.narrowed(setting.unembed),
    ):
        batch.run(setting.model)
    return found


def taking(
    setting: Setting, items: list[Item], component: Component
) -> contextlib.AbstractContextManager[Activations]:
    """Keep a component of the items' heads during the block; for patterns, their scores."""
    capture = _scores if component == "pattern" else captured
    return capture(setting.model, setting.sites_of(items), component)


def local_activations(
    setting: Setting, patch: Patch, items: list[Item], base_z: Mapping[str, Tensor]
) -> Activations:
    """Give the z that every single head would have if it alone were changed, in one forward pass.

    The z that each layer computes from changed patterns is kept, and the base run's is put back
    before it is used, so that all layers see the base run.
    """
    assert isinstance(patch.source, Local)
    new = patch.source.transform
    found: Activations = {}
    with contextlib.ExitStack() as stack:
        for site in setting.sites_of(items):
            heads = sorted({h for item in items for h in item.selection.get(site.path, [])})
            if new is not None:
                # One group a head: a transform sees what it would see in a run of its own.
                groups = {site.path: [([head], new) for head in heads]}
                stack.enter_context(attach_transforms(setting.model, setting.sites, groups))
            keep = _keep_and_restore(found, site.path, base_z[site.path])
            stack.enter_context(replacing(setting.model, site, "z", keep))
        for site in setting.sites:
            if patch.base is not None and site not in setting.sites_of(items):
                everyone = {site.path: [(list(range(site.n_heads)), patch.base)]}
                stack.enter_context(attach_transforms(setting.model, setting.sites, everyone))
        stack.enter_context(setting.readout.narrowed(setting.unembed))
        patch.batch.run(setting.model)
    return found


def _patch_local(
    stack: contextlib.ExitStack,
    setting: Setting,
    patch: Patch,
    source: Local,
    item: Item,
    position: int | None,
) -> None:
    edits: dict[str, Edit] = {}
    for site in setting.sites:
        base = None if patch.base is None else bind_transform(patch.base, site)
        if site.path in item.selection:
            heads = item.selection[site.path]
            new = source.transform and bind_transform(source.transform, site, tuple(heads))
            edits[site.path] = local_edit(base, new, heads, position)
        elif base is not None:
            edits[site.path] = _base_edit(base)
    stack.enter_context(attach_edits(setting.model, setting.sites, edits))


def _base_edit(base: Transform) -> Edit:
    def edit(scores: Tensor) -> NewScores:
        return NewScores(list(range(scores.shape[1])), transform_scores(scores, base))

    return edit


def local_edit(
    base: Transform | None, new: Transform | None, heads: list[int], position: int | None
) -> Edit:
    """Give the chosen heads, in the chosen row, their new scores, and all others the base run's.

    Soft scores go through as they are, not rounded anew by a transform: in a saturated run the
    smallest difference can decide which key wins.
    """

    def edit(scores: Tensor) -> NewScores:
        wide = torch.promote_types(scores.dtype, torch.float32)
        soft = scores.to(wide)
        whole = soft if base is None else transform_scores(scores, base).to(wide)
        chosen = soft[:, heads]
        if new is not None:
            chosen = transform_scores(scores[:, heads], new).to(wide)
        if position is not None:
            row = chosen[:, :, position]
            chosen = whole[:, heads]
            chosen[:, :, position] = row
        if base is None:
            return NewScores(heads, chosen)
        index = torch.tensor(heads, device=scores.device)
        return NewScores(list(range(scores.shape[1])), whole.index_copy(1, index, chosen))

    return edit


@contextlib.contextmanager
def _from_run(
    setting: Setting, site: AttentionSite, source: FromRun, heads: list[int], position: int | None
) -> Iterator[None]:
    given = source.activations[site.path]
    if source.component == "pattern":
        edit = _pattern_edit(given, heads, position)
        with attach_edits(setting.model, setting.sites, {site.path: edit}):
            yield
        return
    n_heads = n_heads_of(setting.model, site, source.component)
    shared = sorted({head * n_heads // site.n_heads for head in heads})

    def put(activation: Tensor) -> Tensor:
        return with_heads(activation, given, n_heads, shared, position)

    with replacing(setting.model, site, source.component, put):
        yield


def _pattern_edit(given: Tensor, heads: list[int], position: int | None) -> Edit:
    def edit(scores: Tensor) -> NewScores:
        new = given[:, heads].to(scores.device)
        if position is not None:
            row = new[:, :, position]
            new = scores[:, heads].to(new.dtype)
            new[:, :, position] = row
        return NewScores(heads, new)

    return edit


@contextlib.contextmanager
def _scores(model: Any, sites: list[AttentionSite], _component: str) -> Iterator[Activations]:
    """Keep what every softmax received, which gives its pattern without loss."""
    found: Activations = {}

    def watching(path: str) -> Edit:
        def edit(scores: Tensor) -> None:
            wide = torch.promote_types(scores.dtype, torch.float32)
            found[path] = scores.detach().to(wide).clone()

        return edit

    with attach_edits(model, sites, {site.path: watching(site.path) for site in sites}):
        yield found


def _keep_and_restore(found: Activations, path: str, base_z: Tensor) -> Any:
    def edit(z: Tensor) -> Tensor:
        found[path] = z.detach()
        return base_z

    return edit
