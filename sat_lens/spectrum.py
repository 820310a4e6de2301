"""What changes as the inverse temperature goes from 0 (uniform) to infinity (the limit).

When not to use it: to find the scale at which a single head saturates. A head's own scores do not
depend on its own scale, so that needs no forward pass per scale.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sat_lens.attention import RandomKey
from sat_lens.attention.transforms import check_scale
from sat_lens.caching import mean_cosine, normalised_similarity
from sat_lens.data import Batch, Data, batches
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.intervention import replace_attention, saturate
from sat_lens.metrics import has_next_token, kl_to_soft, metric_value, next_token_loss
from sat_lens.models import model_name
from sat_lens.results import Provenance, read_result, write_result
from sat_lens.sites import Heads
from sat_lens.sites.naming import places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "scaling curve"
_BLOCK_OUTPUT = re.compile(r"blocks\.\d+\.hook_out$")
DEFAULT_SCALES = (0.0, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0, 32.0, math.inf)


@dataclasses.dataclass(frozen=True, eq=False)
class ScalingCurve:
    """Measures of the output at each inverse temperature; made by :func:`scaling_curve`.

    ``complete`` is False if the run was interrupted: the numbers then describe the batches that
    were read.
    """

    provenance: Provenance
    scales: tuple[float, ...]
    columns: dict[str, Tensor] = dataclasses.field(repr=False)
    complete: bool = True

    def frame(self) -> pd.DataFrame:
        """Return one row a scale.

        Columns: ``loss`` (next-token cross-entropy, nats; where the data are tokens, and over
        sequences of two tokens or more), ``kl``
        (divergence from the soft model, nats), ``top1`` (share of positions whose likeliest token
        is that of the soft model), ``metric`` if one was given, and for each layer ``S_L0``, ...:
        the similarity S of the residual stream to the soft run, normalised by random keys.
        """
        return pd.DataFrame(
            {name: values.tolist() for name, values in self.columns.items()},
            index=pd.Index(self.scales, name="scale"),
        )

    def plot(self) -> Figure:
        """Draw every measure against the inverse temperature."""
        from sat_lens.figures import scaling_curve_figure

        return scaling_curve_figure(self.frame(), str(self.provenance))

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        meta = {
            "provenance": dataclasses.asdict(self.provenance),
            "scales": ["inf" if math.isinf(c) else c for c in self.scales],
            "columns": list(self.columns),
            "complete": self.complete,
        }
        write_result(path, KIND, self.columns, meta)

    @classmethod
    def load(cls, path: str | Path) -> ScalingCurve:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        columns, meta = read_result(path, KIND)
        try:
            scales = tuple(float(c) for c in meta["scales"])
            # A safetensors file keeps no order.
            ordered = {name: columns[name].reshape(len(scales)) for name in meta["columns"]}
            return cls(Provenance(**meta["provenance"]), scales, ordered, meta["complete"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error


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
            batch and scale is made, and two more per batch.
        scales: Inverse temperatures; 0 is uniform, ``math.inf`` the limit.
        heads: Which heads; None is all.
        metric: A function of the logits of one batch, measured besides.
        batch_size: Sequences in a forward pass, for tokens and texts.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Raises:
        ArgumentError: No scale, or a negative one, or a metric that gives no scalar.
        NonFiniteError: The metric is not finite.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> curve = sl.scaling_curve(model, ["import os"], scales=[1.0, math.inf], progress=False)
        >>> abs(float(curve.frame().loc[1.0, "kl"])) < 1e-5
        True
    """
    if not len(scales):
        raise ArgumentError("Needed at least one scale, and none was given.")
    for c in scales:
        check_scale(c)
    totals: dict[str, Tensor] = {}
    weights: dict[str, int] = {}
    streams = _residual_streams(model)
    complete = True
    with torch.no_grad(), tqdm(desc="scaling curve", unit="run", disable=not progress) as bar:
        try:
            for batch in batches(model, data, batch_size):
                part = _one_batch(model, batch, streams, scales, heads, metric, bar)
                for name, (values, weight) in part.items():
                    totals[name] = totals.get(name, torch.zeros(())) + values * weight
                    weights[name] = weights.get(name, 0) + weight
        except KeyboardInterrupt:
            if not totals:
                raise
            complete = False
    columns = {name: values / weights[name] for name, values in totals.items()}
    for label in streams.values():
        columns[label] = normalised_similarity(columns[label], columns.pop(_control(label)))
    provenance = Provenance(model_name(model), data_name)
    return ScalingCurve(provenance, tuple(float(c) for c in scales), columns, complete)


def _one_batch(
    model: Any,
    batch: Batch,
    streams: dict[str, str],
    scales: Sequence[float],
    heads: Heads,
    metric: Callable[[Any], Tensor] | None,
    bar: Any,
) -> dict[str, tuple[Tensor, int]]:
    """Measure one batch: for each column a value per scale, and how many sequences it weighs."""
    soft, soft_stream = _run(model, batch, streams)
    with replace_attention(model, RandomKey(), heads):
        random_stream = _run(model, batch, streams)[1]
    predicted = _predicted(batch, soft)
    found: dict[str, list[float]] = {}
    for c in scales:
        with saturate(model, heads, c):
            logits, stream = _run(model, batch, streams)
        at_c = _measures(batch, soft, logits, predicted, metric)
        for name, value in (at_c | _cosines(batch, soft_stream, stream, streams)).items():
            found.setdefault(name, []).append(value)
        bar.update()
    for label, cosine in _cosines(batch, soft_stream, random_stream, streams).items():
        found[_control(label)] = [cosine] * len(scales)
    return {
        name: (torch.tensor(values), int(predicted.sum()) if name == "loss" else batch.size)
        for name, values in found.items()
    }


def _control(label: str) -> str:
    return f"{label} random"


def _residual_streams(model: Any) -> dict[str, str]:
    """Find the names of the residual stream after each block, by the label of its similarity."""
    names = [name for name in model.hook_dict if name.endswith(".hook_resid_post")]
    names = names or [name for name in model.hook_dict if _BLOCK_OUTPUT.search(name)]
    found = places([name.rpartition(".")[0] for name in names])
    labels = [f"S_{place.stack}{'.' if place.stack else ''}L{place.layer}" for place in found]
    return dict(zip(names, labels, strict=True))


def _run(model: Any, batch: Batch, streams: dict[str, str]) -> tuple[Tensor, dict[str, Tensor]]:
    logits, cache = model.run_with_cache(batch.inputs, names_filter=list(streams), **batch.kwargs)
    return logits, {name: cache[name] for name in streams}


def _cosines(
    batch: Batch, soft: dict[str, Tensor], changed: dict[str, Tensor], streams: dict[str, str]
) -> dict[str, float]:
    # The mask of an encoder says nothing of a decoder's positions, and the reverse.
    real = batch.real if batch.decoder_tokens is None else None
    return {
        label: float(mean_cosine(soft[name], changed[name], real))
        for name, label in streams.items()
    }


def _predicted(batch: Batch, logits: Tensor) -> Tensor:
    """Say of which sequences the next-token loss can be taken."""
    if (
        batch.output_tokens is None
        or logits.dim() != 3
        or logits.shape[:2] != batch.output_tokens.shape
    ):
        return torch.zeros(batch.size, dtype=torch.bool)
    return has_next_token(batch.output_tokens, batch.output_real)


def _measures(
    batch: Batch,
    soft: Tensor,
    logits: Tensor,
    predicted: Tensor,
    metric: Callable[[Any], Tensor] | None,
) -> dict[str, float]:
    found: dict[str, float] = {}
    if batch.output_tokens is not None and bool(predicted.any()):
        real = None if batch.output_real is None else batch.output_real[predicted]
        loss = next_token_loss(batch.output_tokens[predicted], real)
        found["loss"] = float(loss(logits[predicted]))
    same = (soft.argmax(-1) == logits.argmax(-1)).float()
    real = (
        batch.output_real
        if batch.output_real is not None and batch.output_real.shape == same.shape
        else None
    )
    found["top1"] = float(same.mean() if real is None else same[real].mean())
    if real is None:
        found["kl"] = float(kl_to_soft(soft)(logits)) if logits.dim() == 3 else _kl(soft, logits)
    else:
        found["kl"] = _kl(soft[real], logits[real])
    if metric is not None:
        found["metric"] = metric_value(metric, logits)
    return found


def _kl(soft: Tensor, changed: Tensor) -> float:
    p, q = soft.float().log_softmax(-1), changed.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
