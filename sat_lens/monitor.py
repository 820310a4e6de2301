"""What trainers watch in attention, head by head: entropy, logits, sinks, norms, and alarms.

A run in which attention collapses or its logits explode shows it in single heads first, and in the
loss late or never. A measurement is one forward pass on a small fixed batch, without gradients and
in evaluation mode; the run itself is left as it was. Fused attention stays fused: scores of a few
rows at a time are recomputed from its queries and keys.

When not to use it: for what heads do with their attention, which :func:`sat_lens.head_roles` says,
with errors and over a corpus.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import TrainerCallback

from sat_lens import figures
from sat_lens._checks import check_count, check_module, check_number
from sat_lens.attention import AttentionCall, mask_threshold, nearest_saturated
from sat_lens.data import Batch, Data, batches, repeatable
from sat_lens.data.texts import read_tokenizer
from sat_lens.errors import ArgumentError
from sat_lens.intervention import observe_attention
from sat_lens.norms.heads import heads_of
from sat_lens.norms.measures import undisturbed, unwrapped
from sat_lens.norms.sources import module_parameters, wide
from sat_lens.roles.positions import text_rows
from sat_lens.sites import AttentionSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)
# Rows of a fused kernel's scores that are held at once.
FUSED_ROWS = 128
POWER_STEPS = 30
MEANS = ("entropy", "entropy_share", "top_gap", "sink_rate", "tv_nearest")


@dataclasses.dataclass(frozen=True)
class Alarms:
    """Thresholds beyond which a head is reported; None switches an alarm off.

    Attributes:
        entropy_share: Entropy collapse: the mean entropy of its rows as a share of that of uniform
            attention is below this.
        max_logit: Logit explosion: the largest score is above this, or is not finite.
        sink_rate: A head that died: more than this share of its mass is on the first key.

    Example:
        >>> from sat_lens.monitor import Alarms
        >>> Alarms(max_logit=50.0).max_logit
        50.0
    """

    entropy_share: float | None = 0.02
    max_logit: float | None = 100.0
    sink_rate: float | None = 0.99

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                check_number(field.name, getattr(self, field.name))

    def of(self, row: dict[str, float]) -> str:
        """Return what is wrong with a head, in words; empty if nothing is."""
        found = []
        # NaN is not below a threshold either.
        if self.max_logit is not None and not row["max_logit"] <= self.max_logit:
            found.append("logit explosion")
        if self.entropy_share is not None and row["entropy_share"] < self.entropy_share:
            found.append("entropy collapse")
        if self.sink_rate is not None and row["sink_rate"] > self.sink_rate:
            found.append("dead: all on the first key")
        return ", ".join(found)


def attention_health(
    model: nn.Module,
    data: Data,
    *,
    tau: float = 100.0,
    rows: int = 32,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    alarms: Alarms | None = None,
) -> pd.DataFrame:
    """Measure what trainers watch, for every head, by one forward pass a batch.

    Args:
        model: A TransformerLens model or a plain Hugging Face model, in training or not.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`. A few sequences do.
        tau: The largest logit that QK-clip allows (Kimi K2, arXiv 2507.20534, section 2.1).
        rows: How many query rows of each sequence the means and quantiles are over, evenly spaced
            and at least two keys wide. The largest logit is over all rows.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.
        alarms: Thresholds; None is :class:`Alarms` with its defaults.

    Returns:
        One row a head, indexed by label. ``entropy`` of a row, in nats, and ``entropy_share`` of
        log n for n visible keys; ``max_logit``, and ``logit_q50`` and ``logit_q99``, quantiles of
        the rows' maxima; ``top_gap`` between the two largest scores of a row; ``sink_rate``, the
        mass on the first key; ``tv_nearest``, the distance of a row to its nearest saturated row;
        ``qk_clip`` = min(1, tau / max_logit), by which QK-clip would multiply the head's scores;
        ``qk_spectral``, the spectral norm of W_Q W_K^T, NaN where the weights of a head cannot be
        told apart; ``alarm``, in words.

    Raises:
        ArgumentError: An argument is none of those above.
        UnsupportedModelError: The attention of a module cannot be reached.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.monitor import attention_health
        >>> health = attention_health(sl.load_model("demo"), ["import os, sys, re, json"])
        >>> bool((health["max_logit"] < 100).all())
        True
    """
    check_module(model)
    check_number("tau", tau, at_least=0)
    check_count("rows", rows)
    thresholds = alarms or Alarms()
    bare = unwrapped(model)
    heads: dict[str, _HeadSums] = {}
    with undisturbed(bare):
        for batch in batches(
            bare, data, batch_size, attention_mask=attention_mask, tokenizer=tokenizer
        ):
            look = _Look(heads, batch, rows)
            with observe_attention(bare, look.at_scores, look.at_call):
                batch.run(bare)
        spectral = spectral_norms(bare)
    lines = {}
    for label, sums in heads.items():
        row = sums.row(tau) | {"qk_spectral": spectral.get(label, math.nan)}
        lines[label] = {**row, "alarm": thresholds.of(row)}
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("label")


def spectral_norms(model: nn.Module) -> dict[str, float]:
    """Return the spectral norm of W_Q W_K^T of each head whose weights can be told apart.

    By power iteration on (K^T K)(Q^T Q), of the size of a head, whose eigenvalues are the squares
    of the singular values.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.monitor import spectral_norms
        >>> len(spectral_norms(sl.load_model("demo")))
        32
    """
    found: dict[str, float] = {}
    for module in heads_of(module_parameters(model), model):
        q, k = wide(module.q), wide(module.k)
        k = k.repeat_interleave(len(q) // len(k), 0)
        product = (k.mT @ k) @ (q.mT @ q)
        vector = torch.ones(*product.shape[:2], 1, dtype=product.dtype, device=product.device)
        size = vector.new_zeros(len(q))
        for _ in range(POWER_STEPS):
            vector = product @ vector
            size = vector.norm(dim=(1, 2))
            vector = vector / size.clamp(min=1e-300)[:, None, None]
        found |= dict(zip(module.labels, size.sqrt().tolist(), strict=True))
    return found


class AttentionMonitor(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Measures :func:`attention_health` every so many steps of a training run, and raises alarms.

    Use it as a callback of the Hugging Face Trainer, or call ``step`` after each step of a loop of
    your own or from another trainer's hook. Training with it gives the same weights as training
    without.

    Args:
        data: A small fixed batch; see :func:`sat_lens.data.batches`.
        every: Steps between measurements.
        log: A function ``(numbers, step)`` that receives each measurement for a logger:
            ``lambda row, step: wandb.log(row, step=step)``, ``accelerator.log``, or one that calls
            ``SummaryWriter.add_scalar`` for each. Its numbers are ``attention/max_logit`` (the
            largest of all heads), ``attention/entropy_share`` (the least), ``attention/qk_clip``
            (the least), the means of the others, and ``attention/alarms``, how many heads have one.
        alarms: Thresholds. A head that crosses one is named in a warning of the log, once.
        tau, rows, batch_size, attention_mask, tokenizer: As for :func:`attention_health`.

    Raises:
        ArgumentError: An argument is none of those above.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.monitor import AttentionMonitor
        >>> monitor = AttentionMonitor(["import os, sys, re, json"], every=10)
        >>> health = monitor.step(sl.load_model("demo"), 0)
        >>> monitor.frame().shape[0]
        32
    """

    def __init__(
        self,
        data: Data,
        *,
        every: int = 100,
        log: Callable[[dict[str, float], int], object] | None = None,
        alarms: Alarms | None = None,
        tau: float = 100.0,
        rows: int = 32,
        batch_size: int = 8,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
    ) -> None:
        for name, count in (("every", every), ("rows", rows), ("batch_size", batch_size)):
            check_count(name, count)
        check_number("tau", tau, at_least=0)
        if log is not None and not callable(log):
            raise ArgumentError(f"log is a function of numbers and their step; found {log!r}.")
        self.measurements: dict[int, pd.DataFrame] = {}
        self._data = repeatable(data)
        self._every = every
        self._log = log
        self._options: dict[str, Any] = {
            "tau": tau,
            "rows": rows,
            "batch_size": batch_size,
            "alarms": alarms,
            "attention_mask": attention_mask,
            "tokenizer": read_tokenizer(tokenizer),
        }
        self._warned: set[tuple[str, str]] = set()

    def step(self, model: nn.Module, step: int) -> pd.DataFrame | None:
        """Measure if a measurement is due at this step; call it after every step."""
        check_count("step", step, at_least=0)
        if step % self._every:
            return None
        health = attention_health(model, self._data, **self._options)
        self.measurements[step] = health
        self._warn(health, step)
        if self._log is not None:
            self._log(_summary(health), step)
        return health

    def frame(self) -> pd.DataFrame:
        """Return all measurements, one row for each step and head."""
        if not self.measurements:
            return pd.DataFrame()
        return pd.concat(self.measurements, names=["step"])

    def plot(
        self,
        columns: Sequence[str] = ("entropy_share", "max_logit"),
        title: str | None = None,
    ) -> Figure:
        """Draw columns over steps, a panel each and a line for each head.

        Args:
            columns: Columns of :func:`attention_health` that hold numbers.
            title: What was measured on what; None draws no title.

        Raises:
            ArgumentError: Nothing was measured yet, or a column is unknown.
        """
        table = self.frame()
        missing = [name for name in columns if name not in table or name == "alarm"]
        if table.empty or missing or not columns:
            known = ", ".join(name for name in table.columns if name != "alarm")
            raise ArgumentError(
                f"Needed at least one measurement and columns of it; found "
                f"{', '.join(missing) or 'no column'}, and what was measured is "
                f"{known or 'nothing yet'}."
            )
        figure, panels = figures.panels(len(columns), title)
        for panel, name in zip(panels, columns, strict=True):
            by_head = table[name].unstack("label")
            words = {str(label): str(label) for label in by_head}
            figures.lines(panel, by_head, words, x="step", log_x=False, legend=len(words) <= 8)
            figures.headline(panel, name.replace("_", " "))
        return figure

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Answer the Trainer's event: measure before the first step."""
        if state.is_world_process_zero:
            self.step(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Answer the Trainer's event."""
        if state.is_world_process_zero:
            self.step(kwargs["model"], state.global_step)

    def _warn(self, health: pd.DataFrame, step: int) -> None:
        alarmed = {label: words for label, words in health["alarm"].items() if words}
        new = {
            str(label): words
            for label, words in alarmed.items()
            if (str(label), words) not in self._warned
        }
        self._warned |= set(new.items())
        if new:
            shown = "; ".join(f"{label}: {words}" for label, words in list(new.items())[:8])
            _log.warning("Step %d: alarms in %d heads. %s", step, len(new), shown)


def _summary(health: pd.DataFrame) -> dict[str, float]:
    numbers = health.drop(columns="alarm")
    found = numbers.mean().to_dict()
    found |= {"max_logit": numbers["max_logit"].max(skipna=False)}
    found |= {name: numbers[name].min() for name in ("entropy_share", "qk_clip")}
    found["alarms"] = (health["alarm"] != "").sum()
    return {f"attention/{name}": float(value) for name, value in found.items()}


class _HeadSums:
    """What has been read of one head so far."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(MEANS, 0.0)
        self.count = 0
        self.max_logit = -math.inf
        self.tops: list[Tensor] = []

    def row(self, tau: float) -> dict[str, float]:
        means = {name: total / max(self.count, 1) for name, total in self.totals.items()}
        tops = torch.cat(self.tops) if self.count else torch.full((1,), math.nan)
        median, high = tops.quantile(tops.new_tensor([0.5, 0.99])).tolist()
        largest = self.max_logit
        clip = min(1.0, tau / largest) if largest > 0 else 1.0
        logits = {"max_logit": largest, "logit_q50": median, "logit_q99": high}
        return {**means, **logits, "qk_clip": clip if math.isfinite(largest) else math.nan}


class _Look:
    """Reads the attention of one batch into the sums of its heads."""

    def __init__(self, heads: dict[str, _HeadSums], batch: Batch, rows: int) -> None:
        self.heads = heads
        self.batch = batch
        self.rows = rows

    def at_scores(self, site: AttentionSite, scores: Float[Tensor, "batch head row key"]) -> None:
        raw = scores.detach().float()
        visible = raw.masked_fill(raw <= mask_threshold(raw, raw), -math.inf)
        shape = (visible.shape[0], visible.shape[2])
        counted = text_rows(self.batch, site.stack, shape, raw.device)
        at = self._sampled(visible.shape[2], visible.device)
        self._add_max(site, visible.masked_fill(~counted[:, None, :, None], -math.inf))
        self._add_rows(site, visible[:, :, at], counted[:, at])

    def at_call(self, site: AttentionSite, call: AttentionCall) -> None:
        batch, n_queries = call.query.shape[0], call.query.shape[2]
        counted = text_rows(self.batch, site.stack, (batch, n_queries), call.query.device)
        every = torch.arange(n_queries, device=call.query.device)
        for rows in every.split(FUSED_ROWS):
            scores = call.scores(rows.expand(batch, -1))
            self._add_max(site, scores.masked_fill(~counted[:, None, rows, None], -math.inf))
        at = self._sampled(n_queries, every.device)
        self._add_rows(site, call.scores(at.expand(batch, -1)), counted[:, at])

    def _sampled(self, n_queries: int, device: torch.device) -> Tensor:
        count = min(self.rows, n_queries)
        return torch.linspace(0, n_queries - 1, count, device=device).round().long().unique()

    def _add_max(self, site: AttentionSite, scores: Float[Tensor, "batch head row key"]) -> None:
        for head, largest in enumerate(scores.amax((0, 2, 3)).tolist()):
            sums = self.heads.setdefault(site.label(head), _HeadSums())
            # max() would keep a number beside NaN, by its place.
            known = sums.max_logit
            sums.max_logit = largest if math.isnan(largest) else max(largest, known)

    def _add_rows(
        self,
        site: AttentionSite,
        scores: Float[Tensor, "batch head row key"],
        counted: Bool[Tensor, "batch row"],
    ) -> None:
        n_visible = (scores != -math.inf).sum(-1)
        use = (n_visible > 1) & counted[:, None] & scores.isfinite().any(-1)
        for head in range(scores.shape[1]):
            rows = scores[:, head][use[:, head]]
            if not len(rows) or bool(rows.isnan().any()):
                continue
            values = _of_rows(rows)
            sums = self.heads[site.label(head)]
            sums.count += len(rows)
            sums.tops.append(rows.amax(-1).cpu())
            for name in MEANS:
                sums.totals[name] += float(values[name].double().sum())


def _of_rows(scores: Float[Tensor, "row key"]) -> dict[str, Float[Tensor, " row"]]:
    log_p = scores.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)
    top = scores.topk(2, -1).values
    return {
        "entropy": entropy,
        "entropy_share": entropy / (scores != -math.inf).sum(-1).log(),
        "top_gap": top[:, 0] - top[:, 1],
        "sink_rate": log_p[:, 0].exp(),
        "tv_nearest": nearest_saturated(scores).distance,
    }
