"""The runs that a sweep starts from: measured once, and recorded for what comes after."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.attention import Transform
from sat_lens.data import Batch
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.patching.activations import Component
from sat_lens.patching.items import Item
from sat_lens.patching.readout import Readout
from sat_lens.patching.recording import BaseRun, recording
from sat_lens.patching.runs import Setting, everywhere, taking


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One run without a patch.

    Attributes:
        value: The metric: a scalar, or one value per prompt.
        record: What replays of patches into this run start from.
        taken: A component of its heads, for patches into other runs.
    """

    value: Tensor
    record: BaseRun | None
    taken: Mapping[str, Tensor]


def make_baseline(
    setting: Setting,
    batch: Batch,
    transform: Transform | None,
    items: list[Item],
    *,
    record: bool = False,
    take: Component | None = None,
) -> Baseline:
    """Run the model, with every head transformed or soft for None, and measure it.

    The first run of a setting has the logits of all positions, and shows which can be left out.

    Raises:
        ArgumentError, NonFiniteError: The metric cannot be read.
    """
    readout = setting.readout
    first = not readout.tried
    seen: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(everywhere(setting, transform))
        run = stack.enter_context(recording(setting, items)) if record else None
        taken = stack.enter_context(taking(setting, items, take)) if take else {}
        point = getattr(setting.unembed, "hook_in", None)
        if first and isinstance(point, nn.Module):
            handle = point.register_forward_hook(lambda _m, _a, output: seen.append(output))
            stack.callback(handle.remove)
        if not first:
            stack.enter_context(readout.narrowed(setting.unembed))
        logits = batch.run(setting.model)
    if run is not None and isinstance(logits, Tensor):
        # A suppressed token's logit is enormous and no measure of the others.
        run.scale = float(logits.detach()[:, -1].abs().median())
    value = readout.value(logits) if first else readout.value_at(logits)
    if first:
        readout.narrow(logits, seen[0] if len(seen) == 1 else None, setting.unembed)
    return Baseline(value, run, taken)


def check_depends(
    readout: Readout, soft: Tensor, saturated: Tensor, logits_of: Callable[[], Any]
) -> None:
    """Raise an ArgumentError if the metric is the same whatever the logits are.

    It is not if the soft and the saturated run differ in it; otherwise other logits are tried.
    """
    if not torch.equal(soft, saturated):
        return
    logits = logits_of()
    if not isinstance(logits, Tensor):
        return
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(logits.shape, generator=generator).to(logits)
    for other in (logits.flip(-1), -logits, drawn, logits + 5 * drawn):
        try:
            if not torch.equal(readout.value(other), soft):
                return
        except NonFiniteError:
            return
    raise ArgumentError(
        f"The metric {readout.metric!r} gives {soft.tolist()} for the soft run, the saturated run "
        "and for arbitrary other logits, so it does not depend on the output. Give a function of "
        "the logits."
    )
