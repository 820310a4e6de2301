"""Temperature as an instrument: a metric's gradient in it, head by head, and fits by that.

The inverse temperature c_h multiplies the scores s of head h. By the chain rule

    d metric / d log c_h = sum over rows and keys of (d metric / d s'_k) s'_k,   s' = c_h s,

so that one forward and one backward pass give it for all heads: how much the metric would rise if
a head were a little sharper, everything after it included.

When not to use it: to predict what the limit does. A gradient speaks of small changes, and
saturation is none; :func:`sat_lens.sweep_heads` measures it, and :func:`sat_lens.scaling_curve`
shows what lies between.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from sat_lens import figures
from sat_lens._checks import check_choice, check_count, check_number, gradients_for, shown
from sat_lens.attention import Limit, RandomKey, Scale, StraightThrough, Uniform
from sat_lens.data import Batch, Data, batches, read_batch, repeatable
from sat_lens.data.texts import read_tokenizer
from sat_lens.errors import ArgumentError, DataError, NonFiniteError, UnsupportedModelError
from sat_lens.intervention import TransformOfHeads, attach_transforms, edits_on
from sat_lens.intervention.edits import TransformEdit
from sat_lens.metrics import (
    Metric,
    call_metric,
    check_reads_no_padding,
    metric_of,
    read_metric,
)
from sat_lens.models import device_of, logits_of, model_name
from sat_lens.results import Provenance, Result, largest
from sat_lens.sites import (
    AttentionSite,
    Heads,
    ScaleLike,
    attention_sites,
    select_with_scales,
)
from sat_lens.sites.site import Grid, head_grid, parse_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TemperatureGradient(Result, kind="temperature gradient"):
    """d metric / d log c for each head; made by :func:`temperature_gradient`.

    Attributes:
        provenance: The model and the versions.
        labels: The labels of the heads.
        scales: ``[head]``, the inverse temperatures at which the gradient was taken.
        gradients: ``[head]``, or ``[head, prompt]`` where it was asked for by prompt, in units of
            the metric for each e-fold of c.
        metric: The metric there: a scalar, or ``[prompt]``.
    """

    labels: tuple[str, ...]
    scales: Float[Tensor, " head"]
    gradients: Float[Tensor, "head *prompt"]
    metric: Float[Tensor, "*prompt"]

    @property
    def values(self) -> Grid:
        """The gradients as ``[layer, head]`` (then prompt), NaN where no head was asked for.

        A dict of these by stack where the model has several.
        """
        return head_grid(self.labels, self.gradients)

    def frame(self) -> pd.DataFrame:
        """Return one row a head, indexed by label.

        Columns: ``gradient``, in units of the metric for each e-fold of c (the mean over prompts,
        and ``gradient_se`` its standard error, where it was asked for by prompt), and ``scale``.
        """
        columns = {"gradient": self.gradients.double()}
        if self.gradients.dim() > 1:
            n_prompts = self.gradients.shape[1]
            columns["gradient"] = self.gradients.double().mean(1)
            columns["gradient_se"] = self.gradients.double().std(1) / n_prompts**0.5
        columns["scale"] = self.scales
        lists = {name: column.tolist() for name, column in columns.items()}
        return pd.DataFrame(lists, index=pd.Index(self.labels, name="label"))

    def plot(self, title: str | None = None) -> Figure:
        """Draw a map of heads, of the mean over prompts: layers down, heads across.

        Raises:
            ArgumentError: The model has several stacks (select the heads of one).
        """
        grid = head_grid(self.labels, torch.tensor(self.frame()["gradient"].to_numpy()))
        what = "change of the metric for each e-fold of c"
        return figures.sweep_figure(_one_stack(grid), title or str(self.provenance), what)

    def _lines(self) -> list[str]:
        return [
            f"metric: {float(self.metric.mean()):.4g}",
            f"largest d metric / d log c: {largest(self.frame()['gradient'])}",
        ]

    def _check(self) -> None:
        _check_heads(self.labels, scales=self.scales, gradients=self.gradients)


def temperature_gradient(
    model: Any,
    inputs: Data | Mapping[str, Any],
    metric: Metric | str,
    heads: Heads = None,
    *,
    scale: ScaleLike = 1.0,
    hard: Limit | None = None,
    per_prompt: bool = False,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> TemperatureGradient:
    """Differentiate a metric in the logarithm of each head's inverse temperature.

    One forward and one backward pass serve all heads. Weights get no gradients and stay as they
    are; they may be frozen.

    Args:
        model: A TransformerLens model or a plain Hugging Face model in evaluation mode.
        inputs: One prompt, a list of prompts, tokens ``[batch, position]``, or a dict of the
            model's own arguments.
        metric: A function of the logits that gives a scalar with a gradient, or ``"loss"``, the
            next-token loss.
        heads: Which heads; None is all.
        scale: The inverse temperatures at which the gradient is taken, in any form that
            :func:`sat_lens.saturate` takes; positive and finite.
        hard: A limit that the chosen heads are in, forward. The gradient is then that of the
            softmax at ``scale``, straight through the hard pattern (see
            :class:`sat_lens.transforms.StraightThrough`).
        per_prompt: Whether to keep one gradient for each prompt, which needs a metric with
            ``.per_prompt``, as those of :mod:`sat_lens.metrics` have.
        attention_mask, tokenizer: Which tokens are padding, and what reads texts; see
            :func:`sat_lens.data.batches`.

    Returns:
        A :class:`TemperatureGradient`: ``.values`` as ``[layer, head]``, ``.frame()``, ``.plot()``.

    Raises:
        ArgumentError: The metric has no gradient or gives no scalar, or a scale is 0 or infinite,
            where there is no gradient in log c.
        NonFiniteError: The metric or a gradient is NaN or infinite.
        HeadSelectionError: A head does not exist, or none is selected.
        UnsupportedModelError: A head cannot be reached, a block around the call has made its
            pattern hard, so that it passes no gradient, or the model switches gradients off itself.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> found = sl.temperature_gradient(model, ["import os, sys", "def f(x):"], "loss")
        >>> found.values.shape
        torch.Size([4, 8])
    """
    batch = read_batch(model, inputs, attention_mask=attention_mask, tokenizer=tokenizer)
    chosen_metric = metric_of(metric, batch)
    sites = attention_sites(model)
    scales = select_with_scales(sites, heads, scale)
    _check_between(sites, scales)
    _refuse_hard_blocks(model, sites, scales)
    n_prompts = batch.size if per_prompt else None
    log_c = {
        path: _log_of(list(of_head.values()), n_prompts, model) for path, of_head in scales.items()
    }
    with (
        gradients_for("temperature_gradient"),
        _refusing_detached_runs(model, sites, scales),
        _attached(model, sites, scales, log_c, hard),
    ):
        logits = logits_of(batch.run(model))
        check_reads_no_padding(chosen_metric, logits, batch)
        value = _metric_with_gradient(chosen_metric, batch, logits, n_prompts)
        # Prompts do not meet in a model, so the gradient of their sum keeps them apart.
        found = torch.autograd.grad(
            value.sum(), list(log_c.values()), allow_unused=True, materialize_grads=True
        )
    labels = tuple(s.label(head) for s in sites for head in scales.get(s.path, ()))
    gradients = torch.cat([part.detach().cpu().movedim(-1, 0) for part in found])
    _check_gradients(labels, gradients)
    return TemperatureGradient(
        Provenance(model_name(model)),
        labels,
        torch.tensor([c for of_head in scales.values() for c in of_head.values()]),
        gradients,
        value.detach().cpu().float(),
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TunedTemperature(Result, kind="tuned temperature"):
    """An inverse temperature for each head, fitted; made by :func:`tune_temperature`.

    Attributes:
        provenance: The model, the data and the versions.
        labels: The labels of the heads.
        per: What shares one number: ``"head"``, ``"layer"`` or ``"model"``.
        scales: ``[head]``, the fitted inverse temperatures.
        history: The metric on the batch of each step, before that step.
        before: The metric on held-out data as the model is: one value for each prompt, or for each
            batch where the metric has none by prompt.
        after: The same with the fitted temperatures.
        complete: False if the fit was interrupted.
    """

    labels: tuple[str, ...]
    per: str
    scales: Float[Tensor, " head"]
    history: Float[Tensor, " step"]
    before: Float[Tensor, " value"]
    after: Float[Tensor, " value"]
    complete: bool = True

    @property
    def scale(self) -> dict[str, float]:
        """The fitted temperatures in the form that :func:`sat_lens.saturate` takes."""
        return dict(zip(self.labels, self.scales.tolist(), strict=True))

    @property
    def values(self) -> Grid:
        """The fitted temperatures as ``[layer, head]``; a dict by stack where there are several."""
        return head_grid(self.labels, self.scales)

    @property
    def change(self) -> tuple[float, float]:
        """The mean change of the metric on held-out data and its standard error, value by value.

        The error is NaN for a single value.
        """
        difference = (self.after - self.before).double()
        n = len(difference)
        error = float(difference.std() / n**0.5) if n > 1 else math.nan
        return float(difference.mean()), error

    @property
    def notes(self) -> list[str]:
        """What a reader must know before trusting the numbers."""
        mean, error = self.change
        if abs(mean) < 2 * error:
            return [*super().notes, "On held-out data the change is within two standard errors."]
        return [*super().notes]

    def frame(self) -> pd.DataFrame:
        """Return one row a head, indexed by label: ``scale`` and ``log2_scale``."""
        columns = {"scale": self.scales.tolist(), "log2_scale": self.scales.log2().tolist()}
        return pd.DataFrame(columns, index=pd.Index(self.labels, name="label"))

    def plot(self, title: str | None = None) -> Figure:
        """Draw the fitted temperatures as a map of heads: layers down, heads across.

        Raises:
            ArgumentError: The model has several stacks (select the heads of one).
        """
        grid = _one_stack(head_grid(self.labels, self.scales.log2()))
        what = "log2 of the fitted inverse temperature: above 0 sharper, below 0 flatter"
        return figures.sweep_figure(grid, title or str(self.provenance), what)

    def _lines(self) -> list[str]:
        mean, error = self.change
        least, most = float(self.scales.min()), float(self.scales.max())
        return [
            f"one c per {self.per}, {len(self.history)} steps; c from {least:.3g} to {most:.3g}",
            f"metric on held-out data: {float(self.before.mean()):.4g} as it is, "
            f"{float(self.after.mean()):.4g} tuned; change {mean:+.2g}, standard error {error:.1g}",
        ]

    def _check(self) -> None:
        _check_heads(self.labels, scales=self.scales)
        if self.before.shape != self.after.shape:
            raise ValueError("the held-out values before and after differ in number")


def tune_temperature(
    model: Any,
    data: Data,
    metric: Metric | str = "loss",
    per: Literal["head", "layer", "model"] = "head",
    steps: int = 50,
    *,
    heads: Heads = None,
    held_out: Data | None = None,
    learning_rate: float = 0.05,
    batch_size: int = 8,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
    progress: bool = True,
    data_name: str = "",
) -> TunedTemperature:
    """Fit the inverse temperatures that minimise a metric, by Adam on log c, with weights frozen.

    The fit starts at c = 1, which is the model as it is. A step takes one forward and one backward
    pass on one batch; batches come in turn. Ctrl-C ends the fit early, and the result says so.

    Args:
        model: A TransformerLens model or a plain Hugging Face model in evaluation mode.
        data: Tokens, texts or batches; see :func:`sat_lens.data.batches`.
        metric: What is made small: ``"loss"``, the next-token loss, or a function of the logits of
            one batch with a gradient.
        per: What shares one number: each ``"head"`` has its own, or a ``"layer"``, or the
            ``"model"``.
        steps: How many steps Adam takes.
        heads: Which heads are tuned; None is all. The others stay as they are.
        held_out: Data of the same kind to judge the fit by. None holds back every fifth batch.
        learning_rate: Adam's, of log c: about what c changes by in a step, as a share of itself.
        batch_size: Sequences in a forward pass, for tokens and texts.
        attention_mask: Which tokens of ``data`` are padding; see :func:`sat_lens.data.batches`.
        tokenizer: A tokenizer or its directory, in the place of the model's own.
        progress: Whether to show a progress bar.
        data_name: What the data is called in the result.

    Returns:
        A :class:`TunedTemperature`: ``.scale``, which :func:`sat_lens.saturate` takes, the metric
        on held-out data before and after, ``.frame()``, ``.plot()``.

    Raises:
        ArgumentError: The metric has no gradient, or an argument is none of those above.
        DataError: There is no second batch to hold back.
        NonFiniteError: The metric or a gradient is NaN or infinite.
        HeadSelectionError, UnsupportedModelError: As for :func:`temperature_gradient`.

    Example:
        >>> import sat_lens as sl
        >>> model = sl.load_model("demo")
        >>> texts = ["import os, sys", "def f(x):", "for i in range(3):"]
        >>> found = sl.tune_temperature(model, texts, steps=2, batch_size=1, progress=False)
        >>> with sl.saturate(model, scale=found.scale):
        ...     logits = model("import os")
    """
    check_choice("per", per, ("head", "layer", "model"))
    check_count("steps", steps)
    check_number("learning_rate", learning_rate, at_least=0)
    sites = attention_sites(model)
    chosen = select_with_scales(sites, heads, 1.0)
    _refuse_hard_blocks(model, sites, chosen)
    reading = {"batch_size": batch_size, "tokenizer": read_tokenizer(tokenizer)}
    fitted, judged = _fitted_and_judged(model, data, held_out, attention_mask, reading)
    group_of = _groups(sites, chosen, per)
    log_c = torch.zeros(
        1 + max(map(max, group_of.values())), device=device_of(model), requires_grad=True
    )

    def by_site() -> dict[str, Tensor]:
        return {path: log_c[groups] for path, groups in group_of.items()}

    optimizer = torch.optim.Adam([log_c], lr=learning_rate)
    history: list[float] = []
    complete = True
    bar = tqdm(desc="tune temperature", total=steps, unit="step", disable=not progress)
    with bar, gradients_for("tune_temperature"), _refusing_detached_runs(model, sites, chosen):
        try:
            for batch in itertools.islice(fitted(), steps):
                with _attached(model, sites, chosen, by_site()):
                    logits = logits_of(batch.run(model))
                of_batch = metric_of(metric, batch)
                check_reads_no_padding(of_batch, logits, batch)
                value = _metric_with_gradient(of_batch, batch, logits, None)
                (log_c.grad,) = torch.autograd.grad(value, log_c)
                _check_gradients(("log c",), log_c.grad.abs().max()[None])
                optimizer.step()
                history.append(float(value.detach()))
                bar.update()
        except KeyboardInterrupt:
            complete = False
    before = _judge(model, judged, metric)
    with torch.no_grad(), _attached(model, sites, chosen, by_site()):
        after = _judge(model, judged, metric)
    scales = torch.cat(list(by_site().values())).detach().exp().cpu()
    labels = tuple(s.label(head) for s in sites for head in chosen.get(s.path, ()))
    provenance = Provenance(model_name(model), data_name)
    return TunedTemperature(
        provenance, labels, per, scales, torch.tensor(history), before, after, complete
    )


def _fitted_and_judged(
    model: Any,
    data: Data,
    held_out: Data | None,
    attention_mask: Tensor | None,
    reading: dict[str, Any],
) -> tuple[Callable[[], Iterator[Batch]], Callable[[], Iterator[Batch]]]:
    """What the fit reads, over and over, and what it is judged by."""
    again = repeatable(data)

    def read() -> Iterator[Batch]:
        return batches(model, again, attention_mask=attention_mask, **reading)

    if held_out is not None:
        apart = repeatable(held_out)
        return lambda: _endless(read), lambda: batches(model, apart, **reading)
    if len(list(itertools.islice(read(), 2))) < 2:
        raise DataError(
            "The data are one batch, and one more is needed to judge the fit by. Give more data, a "
            "smaller batch_size, or held_out=..."
        )

    def part(wanted: bool) -> Iterator[Batch]:
        # The second batch, so that two batches are enough, and every fifth from there.
        for i, batch in enumerate(read()):
            if (i % 5 == 1) == wanted:
                yield batch

    return lambda: _endless(lambda: part(False)), lambda: part(True)


def _endless(read: Callable[[], Iterator[Batch]]) -> Iterator[Batch]:
    while True:
        yield from read()


def _groups(
    sites: list[AttentionSite], chosen: Mapping[str, Mapping[int, float]], per: str
) -> dict[str, list[int]]:
    """Number what shares one temperature, and say for each head of each site which it is."""
    numbers: dict[Any, int] = {}
    found: dict[str, list[int]] = {}
    for site in sites:
        for head in chosen.get(site.path, ()):
            key = {"head": (site.path, head), "layer": (site.stack, site.layer), "model": ()}[per]
            number = numbers.setdefault(key, len(numbers))
            found.setdefault(site.path, []).append(number)
    return found


def _judge(
    model: Any, read: Callable[[], Iterator[Batch]], metric: Metric | str
) -> Float[Tensor, " value"]:
    found = []
    with torch.no_grad():
        for batch in read():
            of_batch = metric_of(metric, batch)
            n_prompts = batch.size if hasattr(of_batch, "per_prompt") else None
            value = read_metric(of_batch, logits_of(batch.run(model)), n_prompts)
            found.append(value.reshape(-1))
    return torch.cat(found)


def _attached(
    model: Any,
    sites: list[AttentionSite],
    heads: Mapping[str, Mapping[int, Any]],
    log_c: Mapping[str, Float[Tensor, "*batch head"]],
    hard: Limit | None = None,
) -> contextlib.AbstractContextManager[Any]:
    groups: dict[str, TransformOfHeads] = {}
    for path, each in log_c.items():
        c = each.exp()
        groups[path] = [(list(heads[path]), StraightThrough(hard, c) if hard else Scale(c))]
    return attach_transforms(model, sites, groups)


def _log_of(scales: list[float], n_prompts: int | None, model: Any) -> Tensor:
    log_c = torch.tensor(scales, device=device_of(model)).log()
    shape = log_c.shape if n_prompts is None else (n_prompts, len(scales))
    return log_c.expand(shape).clone().requires_grad_()


def _metric_with_gradient(
    metric: Metric, batch: Batch, logits: Tensor, n_prompts: int | None
) -> Tensor:
    if n_prompts is not None and not hasattr(metric, "per_prompt"):
        raise ArgumentError(
            f"per_prompt=True needs a metric with .per_prompt(logits), and {shown(metric)} has "
            "none. Use one of sat_lens.metrics, or leave per_prompt out."
        )
    value = call_metric(metric, logits, n_prompts)
    if not bool(value.isfinite().all()):
        raise NonFiniteError(
            f"The metric {shown(metric)} gave {value.tolist()}. Check what it divides by."
        )
    if not value.requires_grad:
        raise ArgumentError(
            f"A temperature gradient needs a metric with a gradient, and there is none through "
            f"{shown(metric)} on {batch.size} prompts. It must give a tensor that depends on the "
            "logits by differentiable operations (no argmax, .item() or .detach()), outside of "
            "torch.inference_mode()."
        )
    return value


def _check_between(sites: list[AttentionSite], scales: Mapping[str, Mapping[int, float]]) -> None:
    for site in sites:
        for head, c in scales.get(site.path, {}).items():
            if not 0 < c < math.inf:
                what = "The limit passes no gradient" if c else "log c has no value at 0"
                raise ArgumentError(
                    f"A temperature gradient is taken at 0 < c < infinity; for {site.label(head)} "
                    f"c = {c:g} was given. {what}. Take it at a large or a small c."
                )


def _refuse_hard_blocks(
    model: Any, sites: list[AttentionSite], scales: Mapping[str, Mapping[int, float]]
) -> None:
    for site in sites:
        for edit in edits_on(model.get_submodule(site.path)):
            if not isinstance(edit, TransformEdit) or site.path not in scales:
                continue
            hard = [
                site.label(head)
                for heads, transform in edit.groups
                if isinstance(transform, (Limit, RandomKey, StraightThrough, Uniform))
                for head in heads
                if head in scales[site.path]
            ]
            if hard:
                raise UnsupportedModelError(
                    f"A block around this call has made the pattern of {', '.join(hard[:8])} hard, "
                    "and a hard pattern passes no gradient of the scores. Leave these heads out, "
                    "or call it outside of the block, with hard=Limit() for the straight-through "
                    "gradient."
                )


@contextlib.contextmanager
def _refusing_detached_runs(
    model: Any, sites: list[AttentionSite], scales: Mapping[str, Mapping[int, float]]
) -> Iterator[None]:
    """Raise if a model switches gradients off for a layer that chosen heads have an effect on.

    HRM does so in early cycles. What passes through that run would be missing from the gradient.
    """
    reached = False

    def check(module: nn.Module, _args: Any) -> None:
        nonlocal reached
        reached = reached or module in chosen
        if reached and not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{type(model).__name__} runs some of its attention under torch.no_grad(), so "
                "that a gradient would leave out a part of the effect. Take differences of runs "
                "under sat_lens.saturate(model, head, c) instead."
            )

    modules = {site.path: model.get_submodule(site.path) for site in sites}
    chosen = [module for path, module in modules.items() if path in scales]
    handles = [module.register_forward_pre_hook(check) for module in modules.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_gradients(labels: tuple[str, ...], gradients: Float[Tensor, "head *prompt"]) -> None:
    bad = [label for label, row in zip(labels, gradients, strict=True) if not row.isfinite().all()]
    if bad:
        raise NonFiniteError(
            f"The gradient of {', '.join(bad[:8])} is NaN or infinite, though the metric is "
            "finite. Look for a square root or logarithm of 0 in the metric, or run the model in "
            "float32."
        )


# Numbers of heads, by label.


def _one_stack(grid: Grid) -> Tensor:
    if isinstance(grid, Tensor):
        return grid
    raise ArgumentError(
        f"A map of heads needs heads of one stack; found {', '.join(grid)}. Choose such heads, or "
        "draw .frame() as you like."
    )


def _check_heads(labels: tuple[str, ...], **columns: Tensor) -> None:
    if not labels or any(parse_label(label) is None for label in labels):
        raise ValueError(f"these are no labels of heads: {', '.join(labels) or 'none'}")
    for name, column in columns.items():
        if column.shape[:1] != (len(labels),):
            raise ValueError(f"{name} has the shape {list(column.shape)}, for {len(labels)} heads")
