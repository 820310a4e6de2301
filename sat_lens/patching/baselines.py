"""The runs that a sweep starts from: measured once, and recorded for what comes after."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.attention import Transform
from sat_lens.caching.activations import Activations, Component, hook_point
from sat_lens.caching.prefix import computed_by, stacked_blocks
from sat_lens.data import Batch
from sat_lens.errors import UnsupportedModelError
from sat_lens.models import unembedding
from sat_lens.patching.items import Item
from sat_lens.patching.patches import Experiment, everywhere, taking


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
    readout = experiment.readout
    blocks = stacked_blocks(experiment.model, experiment.sites) if record else {}
    kept = Record(blocks)
    seen: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(everywhere(experiment, transform))
        stack.enter_context(kept.of_run(experiment, items if blocks else []))
        taken = stack.enter_context(taking(experiment, items, take)) if take else {}
        first = not readout.tried
        unembed = unembedding(experiment.model)
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
    return Baseline(value, kept if blocks else None, taken)


@dataclasses.dataclass
class Record:
    """What one run of a model left behind, for patches into it.

    Attributes:
        blocks: The model's blocks, by path.
        order: Their paths, in the order in which they ran.
        outputs: What each of them returned, by path.
        beside: By path, what attention modules returned beside the output projection of z; those
            that return something else are left out.
        z: By path of the attention module.
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
        with contextlib.ExitStack() as stack:
            for path, block in self.blocks.items():
                stack.enter_context(computed_by({block: self._block(path, block.forward)}))
            for site in experiment.sites_of(items):
                module = experiment.model.get_submodule(site.path)
                projection = getattr(module, "o", None)
                if isinstance(projection, nn.Module):
                    stack.enter_context(self._attention(site.path, module, projection))
                with contextlib.suppress(UnsupportedModelError):
                    point = hook_point(experiment.model, site, "z")
                    stack.callback(point.register_forward_hook(self._z(site.path)).remove)
            yield

    def _block(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.outputs[path] = forward(*args, **kwargs)
            self.order.append(path)
            return self.outputs[path]

        return run

    def _attention(
        self, path: str, module: nn.Module, projection: nn.Module
    ) -> contextlib.AbstractContextManager[None]:
        forward, project = module.forward, projection.forward
        projected: list[Any] = []

        def run_projection(*args: Any, **kwargs: Any) -> Any:
            projected[:] = [project(*args, **kwargs)]
            return projected[0]

        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            first, *rest = output if isinstance(output, tuple) else (output,)
            if projected and _equal(first, projected[0]):
                kept = tuple(None if _is_pattern(part) else part for part in rest)
                self.beside[path] = kept if isinstance(output, tuple) else None
            projected.clear()
            return output

        return computed_by({module: run, projection: run_projection})

    def _z(self, path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self.z[path] = output.detach()

        return keep


def _equal(first: Any, second: Any) -> bool:
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return first.shape == second.shape and bool(torch.equal(first, second))


def _is_pattern(value: Any) -> bool:
    """Whether this is an attention pattern, which is large, and which no block reads."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return False
    return bool(((value.sum(-1) - 1).abs() < 0.01).all())
