"""The forward passes of a sweep: without a patch, and with one, exact on every architecture.

A patch says which run it goes into (the base: soft, or with every head transformed), and where the
patched-in values come from: computed in that very run (:class:`Local`), or taken from another one
(:class:`FromRun`). Copies of the prompts can stand side by side in one pass, with another head
patched in each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens._checks import check_evaluation_mode, require_lens_model
from sat_lens.attention import Transform
from sat_lens.caching.activations import (
    Activations,
    Component,
    captured,
    n_heads_of,
    replaced,
    unembedding_only,
    with_heads,
)
from sat_lens.caching.prefix import computed_by, stacked_blocks
from sat_lens.data import Batch, Data, read_batch
from sat_lens.errors import UnsupportedModelError
from sat_lens.intervention import Edit, NewScores, attach_edits, attach_transforms
from sat_lens.intervention.edits import TransformEdit, TransformOfHeads, put
from sat_lens.metrics import Metric, check_metric
from sat_lens.models import unembedding
from sat_lens.patching.arguments import HeadGroups, Item, Spot, read_items
from sat_lens.patching.readout import Readout
from sat_lens.sites import AttentionSite, Heads, attention_sites


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
class Experiment:
    """The model of one sweep, its attention modules, and how its output is read."""

    model: Any
    sites: list[AttentionSite]
    readout: Readout

    @classmethod
    def of(
        cls,
        what: str,
        model: Any,
        inputs: Data | Mapping[str, Any],
        metric: Metric,
        heads: Heads | HeadGroups,
        per_prompt: bool = False,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
    ) -> tuple[Experiment, list[Item], Batch]:
        """Read what ``what`` was asked to run: the model and metric, the heads, the prompts."""
        check_metric(metric)
        require_lens_model(model, what)
        sites = attention_sites(model)
        check_evaluation_mode(sites)
        items = read_items(sites, heads)
        batch = read_batch(model, inputs, attention_mask=attention_mask, tokenizer=tokenizer)
        return cls(model, sites, Readout(metric, batch, per_prompt)), items, batch

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The numbers of layers and of heads of each stack."""
        shapes: dict[str, tuple[int, int]] = {}
        for site in self.sites:
            layers, heads = shapes.get(site.stack, (0, 0))
            shapes[site.stack] = max(layers, site.layer + 1), max(heads, site.n_heads)
        return shapes

    def sites_of(self, items: Collection[Item]) -> list[AttentionSite]:
        """The attention modules in which the items have heads."""
        paths = {path for item in items for path in item.selection}
        return [site for site in self.sites if site.path in paths]

    def unembedding_read(self) -> contextlib.AbstractContextManager[None]:
        """Compute logits only where the metric reads them, during the block."""
        return unembedding_only(self.model, self.readout.positions)


def everywhere(
    experiment: Experiment, base: Transform | None
) -> contextlib.AbstractContextManager[Any]:
    """Transform every head of the model while the block lasts; None leaves the model soft."""
    if base is None:
        return contextlib.nullcontext()
    groups = {site.path: [(list(range(site.n_heads)), base)] for site in experiment.sites}
    return attach_transforms(experiment.model, experiment.sites, groups)


@dataclasses.dataclass
class Record:
    """What one run of a model left behind, for patches into it.

    Attributes:
        blocks: The model's blocks, by path.
        order: Their paths, in the order in which they ran.
        outputs: What each of them returned, by path.
        beside: By path, what attention modules returned besides the projection of z; those that
            return something else are left out.
        z: What went into these projections, by path of the attention module.
        logits: Of the last position that is read.
    """

    blocks: dict[str, nn.Module]
    order: list[str] = dataclasses.field(default_factory=list)
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: dict[str, tuple[Any, ...] | None] = dataclasses.field(default_factory=dict)
    z: Activations = dataclasses.field(default_factory=dict)
    logits: Tensor | None = None

    @contextlib.contextmanager
    def of_run(self, experiment: Experiment, items: Sequence[Item]) -> Iterator[None]:
        """Record a run that is made in the block."""
        forwards = {block: self._block(path, block.forward) for path, block in self.blocks.items()}
        for site in experiment.sites_of(items):
            module = experiment.model.get_submodule(site.path)
            projection = getattr(module, "o", None)
            if isinstance(projection, nn.Module):
                forwards |= self._attention(site.path, module, projection)
        with computed_by(forwards):
            yield

    def _block(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.outputs[path] = forward(*args, **kwargs)
            self.order.append(path)
            return self.outputs[path]

        return run

    def _attention(
        self, path: str, module: nn.Module, projection: nn.Module
    ) -> dict[nn.Module, Callable[..., Any]]:
        forward, project = module.forward, projection.forward
        projected: list[Any] = []

        def run_projection(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.z[path] = z
            projected[:] = [project(z, *args, **kwargs)]
            return projected[0]

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            first, *rest = output if isinstance(output, tuple) else (output,)
            both = [first, *projected]
            if len(both) == 2 and all(isinstance(x, Tensor) for x in both) and torch.equal(*both):
                kept = tuple(None if _is_pattern(part) else part for part in rest)
                self.beside[path] = kept if isinstance(output, tuple) else None
            projected.clear()
            return output

        return {module: run, projection: run_projection}


def _is_pattern(value: Any) -> bool:
    """Whether this is an attention pattern, which is large, and which no block reads."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return bool(((value.sum(-1) - 1).abs() < 0.01).all())


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One run without a patch.

    Attributes:
        value: The metric: a scalar, or one value per prompt.
        record: What patches into this run start from.
        taken: A component of its heads, for patches into other runs.
    """

    value: Tensor
    record: Record | None
    taken: Mapping[str, Tensor]


def make_baseline(
    experiment: Experiment,
    batch: Batch,
    transform: Transform | None,
    items: list[Item],
    *,
    record: bool = False,
    take: Component | None = None,
) -> Baseline:
    """Run the model, with every head transformed or soft for None, and read the metric.

    The first run of an experiment has the logits of all positions, and shows which can be left out.

    Raises:
        ArgumentError, NonFiniteError: The metric cannot be read.
    """
    readout, unembed = experiment.readout, unembedding(experiment.model)
    first = not readout.tried
    kept = Record(stacked_blocks(experiment.model, experiment.sites) if record else {})
    seen: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(everywhere(experiment, transform))
        stack.enter_context(kept.of_run(experiment, items if kept.blocks else []))
        taken = stack.enter_context(taking(experiment, items, take)) if take else {}
        if first and unembed is not None:
            handle = unembed.register_forward_pre_hook(lambda _m, args: seen.extend(args[:1]))
            stack.callback(handle.remove)
        if not first:
            stack.enter_context(experiment.unembedding_read())
        logits = batch.run(experiment.model)
    value = readout.value(logits) if first else readout.value_at(logits)
    if first:
        readout.narrow(logits, seen[0] if len(seen) == 1 else None, unembed)
    if isinstance(logits, Tensor):
        at = readout.positions[-1] if first and readout.positions else -1
        kept.logits = logits[:, at].clone()
    return Baseline(value, kept if kept.blocks else None, taken)


def patched_logits(
    experiment: Experiment,
    patch: Patch,
    spots: Sequence[Spot],
    skipped: Collection[str] = (),
) -> list[Any]:
    """Run the model once, on a copy of the prompts for each spot, and patch one spot in each.

    Attention modules at the paths in ``skipped`` do not run. Returns the logits that the readout
    reads, copy by copy.
    """
    size = patch.batch.size
    running = [site for site in experiment.sites if site.path not in skipped]
    with contextlib.ExitStack() as stack:
        edits = {site.path: _edit_of(site, patch, spots) for site in running}
        needed = {path: edit for path, edit in edits.items() if edit is not None}
        stack.enter_context(attach_edits(experiment.model, running, needed))
        if isinstance(patch.source, FromRun) and patch.source.component != "pattern":
            for site in running:
                if any(site.path in item.selection for item, _ in spots):
                    stack.enter_context(_put_in(experiment, site, patch.source, spots, size))
        stack.enter_context(experiment.unembedding_read())
        logits = copies_of(patch.batch, len(spots)).run(experiment.model)
    return [logits] if len(spots) == 1 else list(logits.split(size))


def activations_of(
    experiment: Experiment,
    batch: Batch,
    base: Transform | None,
    component: Component,
    items: list[Item],
) -> Activations:
    """Run the model, and return a component of every head that the items may need."""
    with (
        everywhere(experiment, base),
        taking(experiment, items, component) as found,
        experiment.unembedding_read(),
    ):
        batch.run(experiment.model)
    return found


def taking(
    experiment: Experiment, items: list[Item], component: Component
) -> contextlib.AbstractContextManager[Activations]:
    """Keep a component of the items' heads during the block; for patterns, their scores."""
    sites = experiment.sites_of(items)
    if component != "pattern":
        return captured(experiment.model, sites, component)
    return _seen(experiment, sites, lambda scores: _wide_copy(scores))


def local_activations(
    experiment: Experiment, patch: Patch, items: list[Item], base_z: Mapping[str, Tensor]
) -> Activations:
    """Return the z that every single head would have if it alone were changed, in one pass.

    The z that each layer computes from changed patterns is kept, and the base run's is put back
    before it is used, so that all layers see the base run.
    """
    assert isinstance(patch.source, Local)
    new = patch.source.transform
    chosen = experiment.sites_of(items)
    groups: dict[str, TransformOfHeads] = {}
    for site in experiment.sites:
        if site not in chosen and patch.base is not None:
            groups[site.path] = [(list(range(site.n_heads)), patch.base)]
        elif site in chosen and new is not None:
            # One group a head: a transform sees what it would see in a run of its own.
            heads = {h for item in items for h in item.selection.get(site.path, [])}
            groups[site.path] = [([head], new) for head in sorted(heads)]
    found: Activations = {}

    def keep_and_restore(path: str, z: Tensor) -> Tensor:
        found[path] = z.detach()
        return base_z[path]

    with contextlib.ExitStack() as stack:
        stack.enter_context(attach_transforms(experiment.model, experiment.sites, groups))
        for site in chosen:
            edit = functools.partial(keep_and_restore, site.path)
            stack.enter_context(replaced(experiment.model, site, "z", edit))
        stack.enter_context(experiment.unembedding_read())
        patch.batch.run(experiment.model)
    return found


def sequence_lengths(
    experiment: Experiment, batch: Batch, items: list[Item], source: FromRun | None
) -> dict[str, int]:
    """Return how many positions can be patched one by one in the items' attention modules, by path.

    From another run (``source``), k and v have the positions of keys, all else those of queries.

    Raises:
        UnsupportedModelError: A module cuts its queries into blocks, or its activations do not
            have the axes batch and position in front.
    """
    sites = experiment.sites_of(items)
    for site in sites:
        if "block" in site.layout:
            raise UnsupportedModelError(
                f"{site.path} cuts its queries into blocks, so that single query positions cannot "
                "be told apart. Use positions=None."
            )
    with _seen(experiment, sites, lambda scores: scores[:0]) as scores:
        batch.run(experiment.model)
    counts = {path: tensor.shape[2] for path, tensor in scores.items()}
    if source is None or source.component == "pattern":
        return counts
    for path, activation in source.activations.items():
        n_prompts, n_positions = activation.shape[:2]
        if source.component in ("k", "v"):
            counts[path] = n_positions
        if (n_prompts, n_positions) != (batch.size, counts[path]):
            raise UnsupportedModelError(
                f"Needed the {source.component} of {path} as [batch, position, ...], with "
                f"{batch.size} prompts, and found shape {list(activation.shape)}: single positions "
                'cannot be told apart there. Use positions=None, component="pattern", or '
                'source="local".'
            )
    return counts


def copies_of(batch: Batch, count: int) -> Batch:
    """Return a batch with its prompts repeated, one copy after the other."""
    if count == 1:
        return batch
    kwargs = {name: repeated(value, batch.size, count) for name, value in batch.kwargs.items()}
    return Batch(repeated(batch.inputs, batch.size, count), kwargs)


def repeated(value: Any, size: int, count: int) -> Any:
    """Repeat what has an entry for each of ``size`` prompts; what all prompts share broadcasts."""
    if isinstance(value, tuple):
        return tuple(repeated(part, size, count) for part in value)
    per_prompt = isinstance(value, Tensor) and value.dim() and len(value) == size
    return torch.cat([value] * count) if per_prompt and count > 1 else value


def _edit_of(site: AttentionSite, patch: Patch, spots: Sequence[Spot]) -> Edit | None:
    """Return what happens to the scores of a site, over all copies; None if nothing does."""
    base: Edit | None = None
    if patch.base is not None:
        base = TransformEdit.at(site, [(list(range(site.n_heads)), patch.base)])
    edits = [_edit_in_copy(site, patch, base, *spot) for spot in spots]
    return edits[0] if len(edits) == 1 else _side_by_side(edits, patch.batch.size)


def _edit_in_copy(
    site: AttentionSite, patch: Patch, base: Edit | None, item: Item, position: int | None
) -> Edit | None:
    """Return new scores for the chosen heads in the chosen row, the base run's elsewhere.

    Soft scores go through as they are, not rounded anew by a transform: in a saturated run the
    smallest difference can decide which key wins.
    """
    heads = item.selection.get(site.path)
    new = None if heads is None else _new_scores(site, patch.source, heads)
    if heads is None or new is None:
        return base

    def edit(scores: Tensor) -> NewScores:
        changed = None if base is None else base(scores)
        wide = torch.promote_types(scores.dtype, torch.float32)
        whole = (scores if changed is None else changed.scores).to(wide)
        chosen = new(scores).to(wide)
        if position is not None:
            row = chosen[:, :, position]
            chosen = whole[:, heads]
            chosen[:, :, position] = row
        if base is None:
            return NewScores(heads, chosen)
        return NewScores(list(range(scores.shape[1])), put(whole, heads, chosen))

    return edit


def _new_scores(
    site: AttentionSite, source: Local | FromRun, heads: list[int]
) -> Callable[[Tensor], Tensor] | None:
    """Return what makes the scores that are patched in; None if something else is patched."""
    if isinstance(source, Local):
        if source.transform is None:
            return lambda scores: scores[:, heads]
        transformed = TransformEdit.at(site, [(heads, source.transform)])
        return lambda scores: transformed(scores).scores
    if source.component != "pattern":
        return None
    given = source.activations[site.path][:, heads]
    return lambda scores: given.to(scores.device)


def _side_by_side(edits: list[Edit | None], size: int) -> Edit | None:
    if not any(edits):
        return None

    def edit(scores: Tensor) -> NewScores:
        whole = _wide_copy(scores)
        for part, target, one in zip(scores.split(size), whole.split(size), edits, strict=True):
            changed = None if one is None else one(part)
            if changed is not None:
                target[:, changed.heads] = changed.scores.to(target.dtype)
        return NewScores(list(range(scores.shape[1])), whole)

    return edit


def _put_in(
    experiment: Experiment,
    site: AttentionSite,
    source: FromRun,
    spots: Sequence[Spot],
    size: int,
) -> contextlib.AbstractContextManager[None]:
    """Put the source's q, k, v or z of the chosen heads into a site, copy by copy."""
    given = source.activations[site.path]
    n_heads = n_heads_of(experiment.model, site, source.component)

    def with_source(activation: Tensor) -> Tensor:
        parts = [activation] if len(spots) == 1 else list(activation.split(size))
        for i, (item, position) in enumerate(spots):
            heads = item.selection.get(site.path)
            if heads:
                shared = sorted({head * n_heads // site.n_heads for head in heads})
                parts[i] = with_heads(parts[i], given, n_heads, shared, position)
        return parts[0] if len(spots) == 1 else torch.cat(parts)

    return replaced(experiment.model, site, source.component, with_source)


@contextlib.contextmanager
def _seen(
    experiment: Experiment, sites: list[AttentionSite], keep: Callable[[Tensor], Tensor]
) -> Iterator[Activations]:
    """Keep what every softmax received, which gives its pattern without loss."""
    found: Activations = {}

    def watch(path: str, scores: Tensor) -> None:
        found[path] = keep(scores.detach())

    edits: dict[str, Edit] = {site.path: functools.partial(watch, site.path) for site in sites}
    with attach_edits(experiment.model, sites, edits):
        yield found


def _wide_copy(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
