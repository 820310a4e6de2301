"""Metrics of logits that say which positions they read.

A metric is any function ``metric(logits) -> scalar``, as in TransformerLens. Those here also keep
one value per prompt (``.per_prompt``) and carry ``.positions``, the query positions that they
read, so that many forward passes can leave out the logits at all others.

Prompts of different lengths are padded, and ``logits[:, -1]`` is then padding for some of them. A
metric whose ``.positions`` is ``"last"`` is given the logits of each prompt's last token alone,
``[batch, 1, vocab]``. One that reads padding is refused.

When not to use it: with a metric of your own there is nothing to import from here; pass the
function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sat_lens._checks import is_integer, is_number, shown
from sat_lens.data import Batch
from sat_lens.data.padding import WHOLE
from sat_lens.errors import ArgumentError, NonFiniteError

# A function of a model's logits that gives a scalar. It may carry ``positions``, the query
# positions that it reads or "last", and ``per_prompt``, the same function with one value for each
# prompt.
Metric = Callable[[Any], Any]


class _ByPrompt:
    """A metric that has one value per prompt; called, it gives their mean."""

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        raise NotImplementedError

    def __call__(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, ""]:
        """Return the mean over prompts, each weighing the same."""
        return self.per_prompt(logits).mean()


@dataclasses.dataclass(frozen=True, eq=False)
class LogitDifference(_ByPrompt):
    """The logit of the right answer minus that of the wrong one, at one position."""

    answer: Int[Tensor, " batch"]
    wrong: Int[Tensor, " batch"]
    position: int | Literal["last"] = -1

    @property
    def positions(self) -> list[int] | Literal["last"]:
        """The query positions that are read."""
        return "last" if isinstance(self.position, str) else [self.position]

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Return one value per prompt, in nats.

        Raises:
            ArgumentError: The logits lack the position, a token, or as many prompts.
        """
        position = _only_position(logits) if isinstance(self.position, str) else self.position
        n_prompts, _, vocab = logits.shape
        if len(self.answer) not in (1, n_prompts):
            raise ArgumentError(
                f"Needed one answer, or one for each of {n_prompts} prompts; found "
                f"{len(self.answer)}."
            )
        _check_positions(self, [position], logits)
        tokens = torch.stack([self.answer, self.wrong])
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
            raise ArgumentError(
                f"Answers are token ids between 0 and {vocab - 1}; found {tokens.tolist()}."
            )
        at = logits[:, position]
        answer, wrong = tokens.to(at.device).expand(2, len(at))[..., None]
        return (at.gather(1, answer) - at.gather(1, wrong)).squeeze(1)


@dataclasses.dataclass(frozen=True, eq=False)
class NextTokenLoss(_ByPrompt):
    """The mean cross-entropy of the next token, in nats; padding counts nothing."""

    tokens: Int[Tensor, "batch position"]
    non_padding: Tensor | None = None

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Return the mean over the positions of each prompt.

        Raises:
            ArgumentError: The logits are of other prompts or positions than the tokens.
        """
        if logits.shape[:2] != self.tokens.shape:
            raise ArgumentError(
                f"The loss is of tokens of shape {list(self.tokens.shape)}, and the logits have "
                f"shape {list(logits.shape)}."
            )
        # Prompt by prompt: the temporaries of a large vocabulary cost more than the sums.
        targets = self.tokens[:, 1:].to(logits.device)
        pairs = zip(logits[:, :-1], targets, strict=True)
        losses = torch.stack([F.cross_entropy(x.float(), t, reduction="none") for x, t in pairs])
        return _mean(losses, None if self.non_padding is None else _predicting(self.non_padding))


@dataclasses.dataclass(frozen=True, eq=False)
class KLToSoft(_ByPrompt):
    """The divergence KL(soft || changed) of the next-token distribution, in nats."""

    soft_logits: Float[Tensor, "batch position vocab"]
    positions: Sequence[int] | Literal["last"] | None = None
    non_padding: Tensor | None = None

    def per_prompt(self, logits: Float[Tensor, "batch position vocab"]) -> Float[Tensor, " batch"]:
        """Return the mean over the positions of each prompt; padding counts nothing.

        Raises:
            ArgumentError: The logits have another shape than the soft ones.
        """
        at: Any = slice(None)
        if self.positions == "last":
            _only_position(logits)
        elif self.positions is not None:
            at = list(self.positions)
        if logits.shape != self.soft_logits.shape:
            raise ArgumentError(
                f"The soft logits have shape {list(self.soft_logits.shape)}, and logits of shape "
                f"{list(logits.shape)} were to be compared with them."
            )
        pairs = zip(self.soft_logits, logits, strict=True)
        divergence = torch.stack([_divergence(soft[at], changed[at]) for soft, changed in pairs])
        return _mean(divergence, None if self.non_padding is None else self.non_padding[:, at])


def _mean(values: Float[Tensor, "batch position"], mask: Tensor | None) -> Float[Tensor, " batch"]:
    if mask is None:
        return values.mean(1)
    mask = mask.to(values)
    return (values * mask).sum(1) / mask.sum(1)


def _predicting(mask: Bool[Tensor, "batch position"]) -> Bool[Tensor, "batch next"]:
    """Mark the positions that are followed by another token, padding being neither."""
    return mask[:, 1:] & mask[:, :-1]


def _check_positions(metric: object, positions: Sequence[int], logits: Tensor) -> None:
    n_positions = logits.shape[1]
    missing = [p for p in positions if not -n_positions <= p < n_positions]
    if missing or not positions:
        what = f"position {missing[0]}" if missing else "no position"
        raise ArgumentError(
            f"The metric {shown(metric)} reads {what}, and the logits have {n_positions}."
        )


def logit_difference(
    answer: int | Sequence[int] | Tensor,
    wrong: int | Sequence[int] | Tensor,
    position: int | Literal["last"] = -1,
) -> LogitDifference:
    """Return the metric "logit of the answer minus logit of the wrong answer".

    Args:
        answer: Token id of the right answer, one or one per prompt.
        wrong: Token id of the wrong answer, likewise.
        position: The query position that is read; ``"last"`` is each prompt's last token that is no
            padding, for prompts of different lengths.

    Raises:
        ArgumentError: The two have different lengths, or none, or are no token ids.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import logit_difference
        >>> metric = logit_difference(answer=1, wrong=0)
        >>> float(metric(torch.tensor([[[0.5, 2.0]]])))
        1.5
    """
    first, second = (_token_ids(t) for t in (answer, wrong))
    if not is_integer(position) and position != "last":
        raise ArgumentError(
            f'A position is a whole number, such as -1, or "last"; found {position!r}.'
        )
    if len(first) != len(second) or not len(first):
        raise ArgumentError(
            "Needed at least one right answer, and as many wrong ones; found "
            f"{len(first)} right and {len(second)} wrong."
        )
    return LogitDifference(first, second, position)


def next_token_loss(
    tokens: Int[Tensor, "batch position"], attention_mask: Tensor | None = None
) -> NextTokenLoss:
    """Return the metric "mean next-token loss on these tokens".

    Args:
        tokens: The tokens that the logits are of.
        attention_mask: False or 0 at padding; None for prompts without any.

    Raises:
        ArgumentError: These are no tokens, or a prompt has fewer than two beside padding, so none
            to predict.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import next_token_loss
        >>> round(float(next_token_loss(torch.tensor([[0, 1]]))(torch.zeros(1, 2, 4))), 4)
        1.3863
    """
    if not isinstance(tokens, Tensor) or tokens.dtype not in WHOLE or tokens.dim() != 2:
        raise ArgumentError(
            "The loss is of token ids, a tensor of whole numbers [batch, position]; found "
            f"{shown(tokens)}."
        )
    mask = None if attention_mask is None else _mask_of(attention_mask, tokens.shape)
    kept = torch.ones(tokens.shape).bool() if mask is None else mask
    if not bool(_predicting(kept).any(1).all()):
        raise ArgumentError(
            "A prompt has fewer than two tokens in a row that are no padding, so there is no next "
            "token to predict. Leave it out, or use another metric."
        )
    return NextTokenLoss(tokens, mask)


def kl_to_soft(
    soft_logits: Float[Tensor, "batch position vocab"],
    positions: Sequence[int] | Literal["last"] | None = None,
    attention_mask: Tensor | None = None,
) -> KLToSoft:
    """Return the metric "divergence from these soft logits", at all positions or the given ones.

    Args:
        soft_logits: The logits to compare with.
        positions: The query positions that are read; None is all, and ``"last"`` each prompt's
            last token that is no padding.
        attention_mask: False or 0 at padding; None for prompts without any. ``"last"`` needs it.

    Raises:
        ArgumentError: The mask is of another shape, or leaves a prompt nothing to read.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import kl_to_soft
        >>> logits = torch.tensor([[[1.0, 2.0]]])
        >>> float(kl_to_soft(logits)(logits))
        0.0
    """
    if isinstance(positions, str):
        if positions != "last" or attention_mask is None:
            raise ArgumentError(
                'positions is a list of positions, None, or "last", which needs attention_mask= '
                f"(1 at text, 0 at padding); found {positions!r}."
            )
        return KLToSoft(last_logits(soft_logits.detach(), attention_mask), "last")
    if attention_mask is None:
        return KLToSoft(soft_logits.detach(), positions)
    mask = _mask_of(attention_mask, soft_logits.shape[:2])
    if not bool(mask[:, slice(None) if positions is None else list(positions)].any(1).all()):
        raise ArgumentError(
            "A prompt is padded at every position that is read. Leave it out, or read others."
        )
    return KLToSoft(soft_logits.detach(), positions, mask)


def last_logits(
    logits: Float[Tensor, "batch position vocab"], attention_mask: Tensor
) -> Float[Tensor, "batch 1 vocab"]:
    """Return the logits of each prompt's last token that is no padding.

    Args:
        logits: Of all positions.
        attention_mask: False or 0 at padding.

    Raises:
        ArgumentError: The mask is of another shape.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import last_logits
        >>> logits = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> last_logits(logits, torch.tensor([[1, 1, 0]])).flatten().tolist()
        [2.0]
    """
    mask = _mask_of(attention_mask, logits.shape[:2])
    last = _last_positions(mask).to(logits.device)
    return logits[torch.arange(len(last), device=logits.device), last][:, None]


def _last_positions(mask: Bool[Tensor, "batch position"]) -> Int[Tensor, " batch"]:
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def _only_position(logits: Any) -> int:
    if logits.shape[1] != 1:
        raise ArgumentError(
            'A metric of the position "last" reads the logits of one position, and got those of '
            f"{logits.shape[1]}. Sweeps, curves and roles choose it by the padding mask; elsewhere "
            "call metric(sat_lens.metrics.last_logits(logits, attention_mask))."
        )
    return 0


def _divergence(
    soft: Float[Tensor, "position vocab"], changed: Float[Tensor, "position vocab"]
) -> Float[Tensor, " position"]:
    first, second = (x.to(changed.device).float().log_softmax(-1) for x in (soft, changed))
    return (first.exp() * (first - second)).sum(-1)


def _token_ids(given: Any) -> Int[Tensor, " token"]:
    try:
        ids = torch.as_tensor(given).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.zeros(1)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise ArgumentError(
            "Answers are token ids, one number or a list of them; found "
            f"{given!r}. model.to_single_token(text) gives the id of a text."
        )
    return ids.long()


def _mask_of(mask: Tensor, shape: torch.Size) -> Bool[Tensor, "batch position"]:
    if mask.shape != shape:
        raise ArgumentError(
            f"The attention mask has shape {list(mask.shape)}, and the tokens or logits that it "
            f"is of have {list(shape)}."
        )
    return mask.bool()


@dataclasses.dataclass(frozen=True, eq=False)
class _AtLast:
    """A metric that reads "last", as a function of the logits of all positions of one batch."""

    metric: Metric
    mask: Tensor | None

    @property
    def positions(self) -> list[int]:
        return [-1] if self.mask is None else sorted(set(_last_positions(self.mask).tolist()))

    def __call__(self, logits: Any) -> Any:
        return self.metric(self._last(logits))

    def __repr__(self) -> str:
        return shown(self.metric)

    def _last(self, logits: Any) -> Tensor:
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise ArgumentError(
                f'The metric {shown(self.metric)} reads the position "last", for which logits '
                "[batch, position, vocabulary] are needed. This model gives something else."
            )
        return logits[:, -1:] if self.mask is None else last_logits(logits, self.mask)


class _AtLastPerPrompt(_AtLast):
    def per_prompt(self, logits: Any) -> Any:
        return getattr(self.metric, "per_prompt")(self._last(logits))  # noqa: B009 - not in Metric


def metric_of(metric: Any, batch: Batch) -> Metric:
    """Return a metric as a function of the logits of a batch.

    ``"loss"`` is the next-token loss of the batch. A metric that reads the position ``"last"`` is
    given the logits of each prompt's last token.

    Raises:
        ArgumentError: It is neither, or the batch has no tokens to have a loss on.

    Example:
        >>> import torch
        >>> from sat_lens.data import Batch
        >>> from sat_lens.metrics import metric_of
        >>> tokens = torch.tensor([[0, 1]])
        >>> round(float(metric_of("loss", Batch(tokens, {}, tokens))(torch.zeros(1, 2, 2))), 4)
        0.6931
    """
    if isinstance(metric, str) and metric == "loss":
        if batch.output_tokens is None:
            raise ArgumentError(
                'metric="loss" needs tokens as data; pass a function of the logits.'
            )
        return next_token_loss(batch.output_tokens, batch.output_non_padding)
    if not callable(metric):
        raise ArgumentError(
            f'metric must be "loss" or a function of the logits; {shown(metric)} was given.'
        )
    named = getattr(metric, "positions", None)
    if isinstance(named, str):
        if named != "last":
            raise ArgumentError(
                f"The metric {shown(metric)} names the positions {named!r}. Name a list of "
                'positions, or "last", each prompt\'s last token that is no padding.'
            )
        kind = _AtLastPerPrompt if hasattr(metric, "per_prompt") else _AtLast
        return kind(metric, batch.output_non_padding)
    return metric


def check_metric(metric: object) -> None:
    """Raise an ArgumentError unless a metric can be called."""
    if not callable(metric):
        raise ArgumentError(
            f"A metric is a function of the logits that gives a scalar; {shown(metric)} was given. "
            "Use one of sat_lens.metrics, next_token_loss(tokens) for instance."
        )


def check_reads_no_padding(metric: Metric, logits: Any, batch: Batch) -> None:
    """Raise an ArgumentError if a metric reads logits at padded positions.

    One that does not say what it reads is tried: its value may not change with those logits.

    Args:
        metric: As :func:`metric_of` returned it.
        logits: What the model gave for the batch.
        batch: The input.
    """
    mask = batch.output_non_padding
    if mask is None or bool(mask.all()) or isinstance(metric, _AtLast):
        return
    if isinstance(metric, (NextTokenLoss, KLToSoft)) and metric.non_padding is not None:
        return
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != mask.shape:
        return
    positions = positions_read(metric, logits)
    if positions is not None:
        padded = [p for p in positions if not bool(mask[:, p].all())]
        if padded:
            raise ArgumentError(
                f"The metric reads the positions {padded}, at which some prompts are padded. "
                f"{_INSTEAD}"
            )
        return
    with torch.no_grad():
        logits, mask = logits.detach(), mask.to(logits.device)
        before = metric(logits)
        if not isinstance(before, Tensor) and not is_number(before):
            return  # reading it says what is wrong
        random = torch.Generator().manual_seed(0)
        drawn = 5 * torch.randn(*logits[~mask].shape, generator=random)
        last = last_logits(logits, mask).expand_as(logits)[~mask]
        for other in (drawn, last):
            moved = logits.clone()
            moved[~mask] = other.to(moved)
            first, second = (torch.as_tensor(v).double() for v in (before, metric(moved)))
            if not torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True):
                raise ArgumentError(
                    f"The metric {shown(metric)} changes with the logits at padded positions, so "
                    f"it reads padding, as logits[:, -1] does where a prompt is shorter. {_INSTEAD}"
                )


_INSTEAD = (
    'To read each prompt\'s last token, set metric.positions = "last": the metric is then given '
    'its logits alone, [batch, 1, vocabulary]; in logit_difference it is position="last". A loss '
    "takes attention_mask=. Or give prompts of one length."
)


def call_metric(metric: Metric, logits: Any, n_prompts: int | None = None) -> Tensor:
    """Call a metric: a scalar, with its gradient if it has one, or one value for each prompt.

    Args:
        metric: A function of logits.
        logits: What a model gave.
        n_prompts: How many values are wanted; None for a scalar.

    Raises:
        ArgumentError: It gives something else.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import call_metric, logit_difference
        >>> call_metric(logit_difference(1, 0), torch.tensor([[[0.5, 2.0]]] * 2), n_prompts=2)
        tensor([1.5000, 1.5000])
    """
    check_metric(metric)
    if n_prompts is None:
        value = metric(logits)
        if is_number(value):
            value = torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ArgumentError(f"A metric must give a scalar; {shown(metric)} gave {kind}.")
        if value.numel() != 1:
            raise ArgumentError(
                f"A metric must give a scalar tensor; {shown(metric)} gave shape "
                f"{list(value.shape)}. Pick the logit or the difference that you mean, and take "
                "its mean over prompts."
            )
        return value.reshape(())
    value = getattr(metric, "per_prompt", metric)(logits)
    if not isinstance(value, Tensor) or value.shape != (n_prompts,):
        found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            "reduce=None needs a metric with .per_prompt(logits), or one that gives a tensor "
            f"with one value for each of {n_prompts} prompts; found {found}."
        )
    return value


def read_metric(metric: Metric, logits: Any, n_prompts: int | None = None) -> Tensor:
    """Call a metric as :func:`call_metric` does, and return its finite value without a gradient.

    Raises:
        ArgumentError: It gives something else than one number, or than one for each prompt.
        NonFiniteError: A value is NaN or infinite.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import read_metric
        >>> read_metric(lambda logits: logits.mean(), torch.ones(1, 2, 3))
        tensor(1.)
    """
    value = call_metric(metric, logits, n_prompts).detach().cpu()
    if not bool(value.isfinite().all()):
        raise NonFiniteError(
            f"The metric {shown(metric)} gave {value.tolist()}. Check what it divides by."
        )
    return value.float()


def positions_read(metric: Metric, logits: Any) -> list[int] | None:
    """Return the positions that a metric names in ``.positions``, counted from the start.

    None if it names none, or the logits are not ``[batch, position, vocabulary]``.

    Raises:
        ArgumentError: It names none of the logits' positions.

    Example:
        >>> import torch
        >>> from sat_lens.metrics import logit_difference, positions_read
        >>> positions_read(logit_difference(1, 0), torch.zeros(1, 3, 2))
        [2]
    """
    named = getattr(metric, "positions", None)
    if named is None or not isinstance(logits, Tensor) or logits.dim() != 3:
        return None
    positions = [int(p) for p in named]
    _check_positions(metric, positions, logits)
    return sorted({p % logits.shape[1] for p in positions})
