"""What changes as the inverse temperature goes from 0 (uniform) to infinity (the limit).

When not to use it: to find the scale at which a single head saturates. A head's own scores do not
depend on its own scale, so that needs no forward pass per scale.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import require_lens_model
from sat_lens.attention import RandomKey
from sat_lens.attention.transforms import check_scale
from sat_lens.caching import NO_ROOM, mean_cosine, normalised_similarity
from sat_lens.data import Batch, Data, batch_sizes, batches, predicts_next
from sat_lens.errors import ArgumentError
from sat_lens.intervention import replace_attention, saturate
from sat_lens.metrics import Metric, check_reads_no_padding, metric_of, read_metric
from sat_lens.models import model_name, residual_stream
from sat_lens.results import Provenance, Result, check_columns, column_frame
from sat_lens.sites import Heads, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
# A mean, and how many positions or sequences it is over.
Mean = tuple[float, int]
# Logits, and residual streams by name.
Run = tuple[Tensor, dict[str, Tensor]]
# What a printed curve shows of its columns.
SHOWN = ("loss", "kl", "top1", "metric")
DEFAULT_SCALES = (0.0, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0, 32.0, math.inf)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ScalingCurve(Result, kind="scaling curve"):
    """Measures of the output at each inverse temperature; made by :func:`scaling_curve`.

    ``complete`` is False if the run was interrupted: the numbers then describe the batches that
    were read.
    """

    scales: tuple[float, ...]
    columns: dict[str, Tensor]
    complete: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row a scale.

        Columns: ``loss`` (next-token cross-entropy, nats; only where the data are tokens and the
        model predicts the next one), ``kl`` (divergence from the soft model, nats), ``top1`` (share
        of positions whose likeliest token is that of the soft model), ``metric`` if one was given
        (in its own unit), and for each layer ``S_L0``, ...: the similarity S of the residual stream
        to the soft run, normalised by random keys, without a unit; beside it ``cos_random_L0``,
        ..., the cosine that random keys give, which is S = 0 and the same at every scale.
        :attr:`notes` says why an S is NaN. All but ``metric`` are means over the positions that are
        no padding; ``metric`` is a mean over batches, each weighing as many sequences as it has.
        """
        return column_frame(self.columns, "scale", self.scales)

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the numbers: which similarities are undefined, and why."""
        undefined = [f"{n}: {NO_ROOM}" for n, v in self.columns.items() if bool(v.isnan().all())]
        if not any(name.startswith("S_") for name in self.columns):
            undefined.append("No hook point shows the residual stream, so there is no S.")
        return [*super().notes, *undefined]

    def _lines(self) -> list[str]:
        table = self.frame()
        ends = sorted({self.scales[0], self.scales[-1], *({1.0} & set(self.scales))})
        shown = table.reindex(ends)[[name for name in SHOWN if name in table]]
        return str(shown.round(3)).splitlines()

    def plot(self, title: str | None = None) -> Figure:
        """Draw every measure against the inverse temperature."""
        return figures.scaling_curve_figure(self.frame(), title or str(self.provenance))

    def _check(self) -> None:
        check_columns(self.columns, len(self.scales))


def scaling_curve(
    model: Any,
    data: Data,
    *,
    scales: Sequence[float] = DEFAULT_SCALES,
    heads: Heads = None,
    metric: Metric | None = None,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    data_name: str = "",
) -> ScalingCurve:
    """Measure the output as the inverse temperature of the chosen heads changes.

    Ctrl-C returns what was measured so far, marked incomplete.

    Args:
        model: A TransformerLens model.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`. One forward pass per
            batch and scale other than 1 is made, and two more per batch. For a model whose logits
            see the next token (a masked language model, tested on the first batch) the loss is left
            out, with a warning in the log.
        scales: Inverse temperatures, in a list; 0 is uniform, ``math.inf`` the limit.
        heads: Which heads; None is all.
        metric: A function of the logits of one batch, measured besides. With prompts of different
            lengths it may not read padding; see :mod:`sat_lens.metrics`.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        ArgumentError: No scale, or a negative one, or a metric that gives no scalar.
        NonFiniteError: The metric is not finite.

    Example:
        >>> import math
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> curve = sl.scaling_curve(model, ["import os"], scales=[1.0, math.inf], progress=False)
        >>> abs(float(curve.frame().loc[1.0, "kl"])) < 1e-5
        True
    """
    _check(scales, metric)
    require_lens_model(model, "scaling_curve")
    totals: dict[str, Tensor] = {}
    weights: dict[str, int] = {}
    streams = _residual_streams(model)
    complete, predicts = True, None
    total = len(batch_sizes(data, batch_size) or ()) * len(scales) or None
    bar = tqdm(desc="scaling curve", total=total, unit="run", disable=not progress)
    with torch.no_grad(), bar:
        try:
            for batch in batches(
                model, data, batch_size, attention_mask=attention_mask, tokenizer=tokenizer
            ):
                if predicts is None and _has_next_token(batch):
                    predicts = _predicts_next(model, batch)
                soft = _run(model, batch, list(streams))
                compare = _Comparison(batch, streams, metric, bool(predicts), soft)
                part = _one_batch(model, compare, scales, heads, soft, bar)
                for name, (values, weight) in part.items():
                    totals[name] = totals.get(name, torch.zeros(())) + values * weight
                    weights[name] = weights.get(name, 0) + weight
        except KeyboardInterrupt:
            if not totals:
                raise
            complete = False
    columns = {name: values / weights[name] for name, values in totals.items()}
    for label in columns.keys() & set(streams.values()):
        columns[label] = normalised_similarity(columns[label], columns[_control(label)])
    provenance = Provenance(model_name(model), data_name)
    return ScalingCurve(provenance, tuple(float(c) for c in scales), columns, complete)


def _check(scales: Sequence[float], metric: object) -> None:
    if isinstance(scales, str) or not isinstance(scales, Sequence) or not len(scales):
        raise ArgumentError(
            f"Needed at least one scale, in a list such as [0.5, math.inf]; found {scales!r}."
        )
    for c in scales:
        check_scale(c)
    if metric is not None and not callable(metric):
        raise ArgumentError(
            f"metric is a function of the logits, and the loss is measured anyway; {metric!r} was "
            "given."
        )


def _predicts_next(model: Any, batch: Batch) -> bool:
    found = predicts_next(model, batch)
    if not found:
        _log.warning(
            "The model's logits see the next token (a masked language model does), so a next-token "
            "loss would mean nothing and is left out."
        )
    return found


def _has_next_token(batch: Batch) -> bool:
    return batch.output_tokens is not None and batch.output_tokens.shape[1] > 1


class _Comparison:
    """The soft run of a batch, and what other runs of the same batch are compared with it by."""

    def __init__(
        self,
        batch: Batch,
        streams: dict[str, str],
        metric: Metric | None,
        predicts: bool,
        soft: Run,
    ) -> None:
        self.batch = batch
        self.streams = streams
        self.metric = None if metric is None else metric_of(metric, batch)
        if self.metric is not None:
            check_reads_no_padding(self.metric, soft[0], batch)
        self.predicts = predicts
        self.stream = soft[1]
        rows = self._rows(soft[0])
        self.top = rows.argmax(-1)
        self.log_p = rows.log_softmax(-1)
        self.p = self.log_p.exp()

    def outputs(self, logits: Tensor) -> dict[str, Mean]:
        """Compare logits with the soft ones, at the positions that are no padding."""
        rows = self._rows(logits)
        log_q = rows.log_softmax(-1)
        same = rows.argmax(-1) == self.top
        kl = (self.log_p - log_q).mul_(self.p).sum(-1)
        found = {"top1": _mean(same.float()), "kl": _mean(kl)}
        if self.predicts and self.batch.output_tokens is not None:
            found["loss"] = _mean(self._losses(self.batch.output_tokens.to(log_q.device), log_q))
        if self.metric is not None:
            found["metric"] = float(read_metric(self.metric, logits)), self.batch.size
        return {name: mean for name, mean in found.items() if mean[1]}

    def cosines(self, stream: dict[str, Tensor]) -> dict[str, Mean]:
        """Compare residual streams with the soft ones; those that did not fire are left out."""
        found = {}
        for name, label in self.streams.items():
            if name not in self.stream:
                continue
            in_decoder = name.startswith("decoder")
            mask = self.batch.output_non_padding if in_decoder else self.batch.non_padding
            before = self.stream[name]
            count = before.shape[:2].numel() if mask is None else int(mask.sum())
            found[label] = float(mean_cosine(before, stream[name], mask)), count
        return found

    def _rows(self, logits: Tensor) -> Float[Tensor, "kept vocab"]:
        mask, rows = self.batch.output_non_padding, logits.flatten(0, -2)
        if mask is not None and mask.shape == logits.shape[:-1]:
            rows = rows[mask.to(rows.device).flatten()]
        return rows.float()

    def _losses(
        self, tokens: Int[Tensor, "batch position"], log_q: Float[Tensor, "kept vocab"]
    ) -> Float[Tensor, " next"]:
        """The loss at each position that has a next token, neither of them padding."""
        mask = self.batch.output_non_padding
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device)
        has_next = mask & mask.roll(-1, 1)
        has_next[:, -1] = False
        wanted = tokens.roll(-1, 1)[mask]
        return -log_q.gather(-1, wanted[:, None])[has_next[mask], 0]


def _one_batch(
    model: Any, compare: _Comparison, scales: Sequence[float], heads: Heads, soft: Run, bar: Any
) -> dict[str, tuple[Tensor, int]]:
    """Measure one batch: for each column a value per scale, and what it is a mean over."""
    batch, names = compare.batch, list(compare.streams)
    with replace_attention(model, RandomKey(), heads):
        random_stream = _run(model, batch, names)[1]
    found: dict[str, list[Mean]] = {}
    for c in scales:
        logits, stream = soft
        if c != 1:
            with saturate(model, heads, c):
                logits, stream = _run(model, batch, names)
        for name, mean in (compare.outputs(logits) | compare.cosines(stream)).items():
            found.setdefault(name, []).append(mean)
        bar.update()
    for label, cosine in compare.cosines(random_stream).items():
        found[_control(label)] = [cosine] * len(scales)
    return {
        name: (torch.tensor([value for value, _ in means], dtype=torch.float32), means[0][1])
        for name, means in found.items()
    }


def _run(model: Any, batch: Batch, names: list[str]) -> Run:
    logits, cache = model.run_with_cache(batch.inputs, names_filter=names, **batch.kwargs)
    return logits, {name: cache[name] for name in names if name in cache}


def _control(label: str) -> str:
    return label.replace("S_", "cos_random_", 1)


def _mean(values: Tensor) -> Mean:
    return (float(values.mean()), values.numel()) if values.numel() else (math.nan, 0)


def _residual_streams(model: Any) -> dict[str, str]:
    """The names of the residual stream after each block, with the labels of their similarities."""
    names = residual_stream(model)
    found = places([name.rpartition(".")[0] for name in names])
    labels = [f"S_{place.stack}{'.' if place.stack else ''}L{place.layer}" for place in found]
    return dict(zip(names, labels, strict=True))
