"""What a changed run of one batch is compared by with the soft one.

When not to use it: from outside the library. :func:`sat_lens.scaling_curve` is for that.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sat_lens.caching import mean_cosine
from sat_lens.data import Batch
from sat_lens.metrics import Metric, read_metric

# A mean, and how many positions or sequences it is over.
Mean = tuple[float, int]


@dataclasses.dataclass(frozen=True)
class SoftRun:
    """The soft run of a batch, with what every comparison needs of it.

    ``log_p`` and ``p`` are the next token's distribution at the positions that are no padding, and
    ``top`` its likeliest token.
    """

    logits: Tensor
    stream: dict[str, Tensor]
    top: Int[Tensor, " kept"]
    log_p: Float[Tensor, "kept vocab"]
    p: Float[Tensor, "kept vocab"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read from runs on one batch.

    Attributes:
        batch: The batch.
        streams: The names of residual streams, each with the label of its similarity.
        metric: A metric that is measured besides.
        predicts: Whether a next-token loss has a meaning.
    """

    batch: Batch
    streams: dict[str, str]
    metric: Metric | None
    predicts: bool

    def soft(self, logits: Tensor, stream: dict[str, Tensor]) -> SoftRun:
        """Prepare the soft run for comparisons."""
        rows = self._rows(logits)
        log_p = rows.log_softmax(-1)
        return SoftRun(logits, stream, rows.argmax(-1), log_p, log_p.exp())

    def outputs(self, soft: SoftRun, logits: Tensor) -> dict[str, Mean]:
        """Compare logits with the soft ones."""
        rows = self._rows(logits)
        log_q = rows.log_softmax(-1)
        same = rows.argmax(-1) == soft.top
        kl = (soft.log_p - log_q).mul_(soft.p).sum(-1)
        found = {"top1": _mean(same.float()), "kl": _mean(kl)}
        if self.predicts and self.batch.output_tokens is not None:
            found["loss"] = _mean(self._losses(self.batch.output_tokens.to(log_q.device), log_q))
        if self.metric is not None:
            found["metric"] = float(read_metric(self.metric, logits)), self.batch.size
        return {name: mean for name, mean in found.items() if mean[1]}

    def cosines(self, soft: SoftRun, changed: dict[str, Tensor]) -> dict[str, Mean]:
        """Compare residual streams with the soft ones."""
        found = {}
        for name, label in self.streams.items():
            if name not in soft.stream:
                continue
            in_decoder = name.startswith("decoder")
            mask = self.batch.output_non_padding if in_decoder else self.batch.non_padding
            before = soft.stream[name]
            count = before.shape[:2].numel() if mask is None else int(mask.sum())
            found[label] = float(mean_cosine(before, changed[name], mask)), count
        return found

    def _rows(self, logits: Tensor) -> Float[Tensor, "kept vocab"]:
        mask, rows = self.batch.output_non_padding, logits.flatten(0, -2)
        if mask is not None and mask.shape == logits.shape[:-1]:
            rows = rows[mask.to(rows.device).flatten()]
        return rows.float()

    def _losses(
        self, tokens: Int[Tensor, "batch position"], log_q: Float[Tensor, "kept vocab"]
    ) -> Float[Tensor, " next"]:
        """Give the loss at each position that has a next token, neither of them padding."""
        mask = self.batch.output_non_padding
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device)
        has_next = mask & mask.roll(-1, 1)
        has_next[:, -1] = False
        wanted = tokens.roll(-1, 1)[mask]
        return -log_q.gather(-1, wanted[:, None])[has_next[mask], 0]


def _mean(values: Tensor) -> Mean:
    return (float(values.mean()), values.numel()) if values.numel() else (math.nan, 0)
