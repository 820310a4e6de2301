"""What changes as the inverse temperature goes from 0 (uniform) to infinity (the limit).

When not to use it: to find the scale at which a single head saturates. A head's own scores do not
depend on its own scale, so that needs no forward pass per scale.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import require_lens_model
from sat_lens.attention import RandomKey
from sat_lens.attention.transforms import check_scale
from sat_lens.caching import NO_ROOM, normalised_similarity
from sat_lens.data import Batch, Data, batch_sizes, batches, predicts_next
from sat_lens.errors import ArgumentError
from sat_lens.intervention import replace_attention, saturate
from sat_lens.models import model_name, residual_stream
from sat_lens.readings import Mean, Reading, SoftRun
from sat_lens.results import Provenance, Result, check_columns
from sat_lens.sites import Heads, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
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
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.scales, name="scale"),
        )

    @property
    def notes(self) -> list[str]:
        """What has to be said beside the numbers: which similarities are undefined, and why."""
        undefined = [f"{n}: {NO_ROOM}" for n, v in self.columns.items() if bool(v.isnan().all())]
        return [*super().notes, *undefined]

    def _lines(self) -> list[str]:
        table = self.frame()
        ends = sorted({self.scales[0], self.scales[-1], *({1.0} & set(self.scales))})
        shown = table.reindex(ends)[[name for name in SHOWN if name in table]]
        return str(shown.round(3)).splitlines()

    def plot(self) -> Figure:
        """Draw every measure against the inverse temperature."""
        return figures.scaling_curve_figure(self.frame(), str(self.provenance))

    def _check(self) -> None:
        check_columns(self.columns, len(self.scales))


def scaling_curve(
    model: Any,
    data: Data,
    *,
    scales: Sequence[float] = DEFAULT_SCALES,
    heads: Heads = None,
    metric: Callable[[Any], Tensor] | None = None,
    batch_size: int = 8,
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
        metric: A function of the logits of one batch, measured besides.
        batch_size: Sequences in a forward pass, for tokens and texts.
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
            for batch in batches(model, data, batch_size):
                if predicts is None and _has_next_token(batch):
                    predicts = _predicts_next(model, batch)
                read = Reading(batch, streams, metric, bool(predicts))
                part = _one_batch(model, read, scales, heads, bar)
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


def _one_batch(
    model: Any, read: Reading, scales: Sequence[float], heads: Heads, bar: Any
) -> dict[str, tuple[Tensor, int]]:
    """Measure one batch: for each column a value per scale, and what it is a mean over."""
    soft = read.soft(*_run(model, read))
    with replace_attention(model, RandomKey(), heads):
        random_stream = _run(model, read)[1]
    found: dict[str, list[Mean]] = {}
    for c in scales:
        logits, stream = _at_scale(model, read, heads, c, soft)
        at_c = read.outputs(soft, logits) | read.cosines(soft, stream)
        for name, mean in at_c.items():
            found.setdefault(name, []).append(mean)
        bar.update()
    for label, cosine in read.cosines(soft, random_stream).items():
        found[_control(label)] = [cosine] * len(scales)
    return {
        name: (torch.tensor([value for value, _ in means]), means[0][1])
        for name, means in found.items()
    }


def _at_scale(
    model: Any, read: Reading, heads: Heads, c: float, soft: SoftRun
) -> tuple[Tensor, dict[str, Tensor]]:
    if c == 1:
        return soft.logits, soft.stream
    with saturate(model, heads, c):
        return _run(model, read)


def _control(label: str) -> str:
    return label.replace("S_", "cos_random_", 1)


def _residual_streams(model: Any) -> dict[str, str]:
    """Find the names of the residual stream after each block, by the label of its similarity."""
    names = residual_stream(model)
    found = places([name.rpartition(".")[0] for name in names])
    labels = [f"S_{place.stack}{'.' if place.stack else ''}L{place.layer}" for place in found]
    return dict(zip(names, labels, strict=True))


def _run(model: Any, read: Reading) -> tuple[Tensor, dict[str, Tensor]]:
    batch, names = read.batch, list(read.streams)
    logits, cache = model.run_with_cache(batch.inputs, names_filter=names, **batch.kwargs)
    return logits, {name: cache[name] for name in names if name in cache}
