"""Reading a metric off logits, and computing no other logits than it reads.

A metric that says in ``.positions`` which query positions it reads gets logits that are right
there; it has been tried before on logits whose other positions were hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.data import Batch
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.metrics import (
    Metric,
    call_metric,
    check_reads_no_padding,
    metric_of,
    positions_read,
    read_metric,
)


class Readout:
    """How a metric is read in one sweep: off which positions, and prompt by prompt or not.

    Attributes:
        n_prompts: How many values are read; None for one over all prompts.
        positions: Those at which logits are computed; None is all.
    """

    def __init__(self, metric: Metric, batch: Batch, per_prompt: bool) -> None:
        self.metric = metric_of(metric, batch)
        self.n_prompts = batch.size if per_prompt else None
        self._batch = batch
        self.tried = False
        self.positions: list[int] | None = None
        self._n_positions = 0
        self._whole: Tensor | None = None

    def value(self, logits: Any) -> Tensor:
        """Read the metric off logits of all positions: a scalar, or one value per prompt.

        Raises:
            ArgumentError: It gives something else.
            NonFiniteError: A value is NaN or infinite.
        """
        return read_metric(self.metric, logits, self.n_prompts)

    def value_at(self, logits: Any) -> Tensor:
        """Read the metric off logits of ``positions`` alone, ``[batch, len(positions), vocab]``."""
        return self.value(self._as_whole(logits))

    def with_gradient_at(self, logits: Any) -> Any:
        """Call the metric on logits of ``positions`` alone, with its gradient if there is one."""
        return call_metric(self.metric, self._as_whole(logits), self.n_prompts)

    def narrow(self, logits: Any, before_unembed: Tensor | None, unembed: nn.Module | None) -> None:
        """Find out from one whole run whether logits may be left out from now on.

        Args:
            logits: Of all positions.
            before_unembed: What went into the unembedding in that run.
            unembed: The unembedding; None where the model has none of its own.

        Raises:
            ArgumentError: The metric reads other positions than it says, or padding.
        """
        self.tried = True
        check_reads_no_padding(self.metric, logits, self._batch)
        positions = positions_read(self.metric, logits)
        if positions is None:
            return
        self._n_positions = logits.shape[1]
        hidden = torch.full_like(logits, math.nan)
        hidden[:, positions] = logits[:, positions]
        alone, whole = (call_metric(self.metric, x, self.n_prompts) for x in (hidden, logits))
        if not torch.allclose(alone, whole, rtol=1e-5, atol=1e-6):
            raise ArgumentError(
                f"The metric {self.metric!r} says in .positions that it reads the positions "
                f"{positions} of {self._n_positions}, and gives another value when all others are "
                "hidden. Name all that it reads, or set .positions to None."
            )
        if before_unembed is None or unembed is None:
            return
        if before_unembed.shape[:2] != logits.shape[:2]:
            return
        few, expected = unembed(before_unembed[:, positions]), logits[:, positions]
        if isinstance(few, Tensor) and torch.allclose(few, expected, rtol=1e-4, atol=1e-4):
            self.positions = positions

    def _as_whole(self, logits: Any) -> Any:
        """Return logits of the read positions in the shape of logits of all."""
        if self.positions is None:
            return logits
        batch, n_read, vocab = logits.shape
        if n_read == 1:
            return logits.expand(batch, self._n_positions, vocab)
        if logits.requires_grad:
            whole = torch.full((batch, self._n_positions, vocab), math.nan).to(logits)
            return whole.index_copy(1, torch.tensor(self.positions, device=logits.device), logits)
        if self._whole is None or self._whole.shape[0] != batch:
            self._whole = torch.full((batch, self._n_positions, vocab), math.nan).to(logits)
        self._whole[:, self.positions] = logits
        return self._whole


def check_depends(
    readout: Readout, model: Any, batch: Batch, soft: Tensor, saturated: Tensor
) -> None:
    """Raise an ArgumentError if the metric does not depend on the logits.

    It does if the soft and the saturated run differ in it; otherwise other logits are tried.
    """
    if not torch.equal(soft, saturated):
        return
    logits = batch.run(model)
    if not isinstance(logits, Tensor):
        return
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(logits.shape, generator=generator, dtype=torch.float32).to(logits)
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
