"""Small synthetic tasks with ground truth: what a head must do to solve them is known.

Each task is a set of token sequences with the right answer at every position. Some can be solved
by looking at one position (``previous_token``, ``induction``), others only by counting
(``majority``, ``token_count``, ``dyck_depth``, ``an_bn``), which an attention head does by
averaging over all visible keys.

When not to use it: as a benchmark. The tasks serve to check a method where the answer is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sat_lens._checks import check_count
from sat_lens.errors import ArgumentError, ModelError
from sat_lens.models import last_residual


@dataclasses.dataclass(frozen=True)
class Task:
    """Sequences and their answers.

    Attributes:
        name: What the task is called.
        tokens: Token ids ``[sequence, position]``; 0 opens every sequence.
        answers: The right class at every position, ``[sequence, position]``.
        counted: Where an answer counts, ``[sequence, position]``.
        n_tokens: Size of the vocabulary.
        n_answers: Number of classes.
        counts: Whether the task needs counting.
    """

    name: str
    tokens: Int[Tensor, "sequence position"]
    answers: Int[Tensor, "sequence position"]
    counted: Bool[Tensor, "sequence position"]
    n_tokens: int
    n_answers: int
    counts: bool

    def accuracy(self, logits: Tensor) -> float:
        """Return the share of counted positions whose likeliest class is the answer."""
        right = logits[..., : self.n_answers].argmax(-1).cpu() == self.answers
        return float(right[self.counted].float().mean())


def majority(n_sequences: int = 256, length: int = 64, seed: int = 0) -> Task:
    """Which of two symbols has been more frequent so far: 0 the first, 1 a tie, 2 the second.

    Example:
        >>> from sat_lens.tasks import majority
        >>> task = majority(4, 8)
        >>> task.tokens.shape, task.n_answers
        (torch.Size([4, 8]), 3)
    """
    _check_size(n_sequences, length)
    tokens = _drawn(n_sequences, length, 2, seed)
    lead = ((tokens == 2).long() - (tokens == 1).long()).cumsum(1)
    return _task("majority", tokens, lead.sign() + 1, n_tokens=3, n_answers=3, counts=True)


def token_count(n_sequences: int = 256, length: int = 32, seed: int = 0) -> Task:
    """How often the current token has occurred so far, itself included.

    Example:
        >>> from sat_lens.tasks import token_count
        >>> task = token_count(1, 6)
        >>> bool((task.answers[task.counted] >= 1).all())
        True
    """
    _check_size(n_sequences, length)
    tokens = _drawn(n_sequences, length, 4, seed)
    same = tokens[:, :, None] == tokens[:, None, :]
    answers = same.tril().sum(-1)
    return _task("token count", tokens, answers, n_tokens=5, n_answers=length, counts=True)


def dyck_depth(n_sequences: int = 256, length: int = 32, seed: int = 0, deepest: int = 6) -> Task:
    """How many brackets are open, in well-formed prefixes of one kind of bracket.

    Example:
        >>> from sat_lens.tasks import dyck_depth
        >>> int(dyck_depth(8, 16).answers.max()) <= 6
        True
    """
    _check_size(n_sequences, length)
    check_count("deepest", deepest)
    generator = torch.Generator().manual_seed(seed)
    depth = torch.zeros(n_sequences, dtype=torch.long)
    steps = []
    for _ in range(length - 1):
        opens = torch.rand(n_sequences, generator=generator) < 0.5
        opens = (opens | (depth == 0)) & (depth < deepest)
        depth = depth + torch.where(opens, 1, -1)
        steps.append((torch.where(opens, 1, 2), depth))
    tokens = _with_start(torch.stack([token for token, _ in steps], dim=1))
    answers = _with_start(torch.stack([d for _, d in steps], dim=1))
    return _task("Dyck-1 depth", tokens, answers, n_tokens=3, n_answers=deepest + 1, counts=True)


def an_bn(n_sequences: int = 256, length: int = 32, seed: int = 0) -> Task:
    """Whether the prefix is a^n b^n: as many b as a, after n letters a and up to n letters b.

    A third letter, which means nothing, stands at random places, so that positions do not give the
    answer away. Words go on beyond n letters b, which makes them too long. Answers count at the
    n-th letter b and at those beside it, where nothing but counting tells yes from no.

    Example:
        >>> from sat_lens.tasks import an_bn
        >>> task = an_bn(4, 8)
        >>> sorted(set(task.answers[task.counted].tolist())) == [0, 1]
        True
    """
    _check_size(n_sequences, length, at_least=6)
    generator = torch.Generator().manual_seed(seed)
    n = torch.randint(1, length // 3, (n_sequences, 1), generator=generator)
    noise = torch.rand(n_sequences, length - 1, generator=generator) < 0.3
    letters = (~noise).cumsum(1)
    tokens = _with_start(torch.where(noise, 3, torch.where(letters <= n, 1, 2)))
    n_a, n_b = (tokens == 1).cumsum(1), (tokens == 2).cumsum(1)
    task = _task("a^n b^n", tokens, (n_a == n_b).long(), n_tokens=4, n_answers=2, counts=True)
    return dataclasses.replace(task, counted=(tokens == 2) & ((n_a - n_b).abs() <= 1))


def previous_token(n_sequences: int = 256, length: int = 32, seed: int = 0) -> Task:
    """The token before the current one.

    Example:
        >>> from sat_lens.tasks import previous_token
        >>> task = previous_token(2, 5)
        >>> bool((task.answers[:, 1:] == task.tokens[:, :-1]).all())
        True
    """
    _check_size(n_sequences, length)
    tokens = _drawn(n_sequences, length, 8, seed)
    answers = tokens.roll(1, dims=1)
    return _task("previous token", tokens, answers, n_tokens=9, n_answers=9, counts=False)


def induction(n_sequences: int = 256, length: int = 32, seed: int = 0) -> Task:
    """The token that followed the current one in the first half, which the second half repeats.

    Example:
        >>> from sat_lens.tasks import induction
        >>> task = induction(2, 9)
        >>> bool((task.tokens[:, 1:5] == task.tokens[:, 5:]).all())
        True
    """
    _check_size(n_sequences, length, at_least=5)
    half = (length - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(n_sequences, 4 * half, generator=generator).argsort(1)[:, :half] + 1
    tokens = _with_start(torch.cat([first, first], dim=1))
    task = _task(
        "induction", tokens, tokens.roll(-1, dims=1), 4 * half + 1, 4 * half + 1, counts=False
    )
    positions = torch.arange(tokens.shape[1])
    counted = (positions > half) & (positions < tokens.shape[1] - 1)
    return dataclasses.replace(task, counted=counted.expand(tokens.shape))


def distinct_states(
    model: Any, tokens: Int[Tensor, "sequence position"], decimals: int = 3
) -> Int[Tensor, " position"]:
    """Count the distinct final states that a model takes at each position over the sequences.

    A saturated model is discrete: it takes few states, however many sequences there are. States are
    the rows of the last residual stream, equal if they agree to ``decimals`` decimals.

    Raises:
        UnsupportedModelError: The model has no hook for the residual stream after a block.

    Example:
        >>> from sat_lens.tasks import distinct_states, majority, train_on
        >>> task = majority(16, 6)
        >>> int(distinct_states(train_on(task, steps=1), task.tokens)[0])
        1
    """
    last = last_residual(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=last)
    states = (cache[last] * 10**decimals).round()
    counts = [len(states[:, position].unique(dim=0)) for position in range(tokens.shape[1])]
    return torch.tensor(counts)


def train_on(
    task: Task,
    *,
    n_layers: int = 1,
    n_heads: int = 2,
    d_model: int = 32,
    steps: int = 400,
    batch: int = 64,
    learning_rate: float = 5e-3,
    positions: bool | None = None,
    around: Callable[[Any, float], contextlib.AbstractContextManager[Any]] | None = None,
    seed: int = 0,
) -> Any:
    """Train a small attention model on a task, in seconds, and return it as a TransformerBridge.

    ``positions`` says whether the model has position embeddings. By default only tasks that need no
    counting get them: with positions a model can solve a^n b^n by looking at the last letter a.
    ``around(model, done)`` gives a block around each forward pass, where ``done`` is the share of
    the steps that are done: ``lambda model, done: sl.saturate(model, scale=2 ** (8 * done))``, say.

    Raises:
        ArgumentError: A size is no whole number of at least 1, or ``n_heads`` does not divide
            ``d_model``.
        ModelError: The installed TransformerLens has no models of its own for the bridge.

    Example:
        >>> from sat_lens.tasks import previous_token, train_on
        >>> model = train_on(previous_token(8, 8), steps=1)
        >>> model.training
        False
    """
    try:
        # Slow to import, and missing in older versions.
        from transformer_lens import config as lens
        from transformer_lens import model_bridge

        boot = model_bridge.TransformerBridge.boot_native
    except (ImportError, AttributeError) as error:
        raise ModelError(
            "Training a model on a task needs TransformerLens 3.9 or newer "
            "(TransformerBridge.boot_native), and an older one is installed. Train a model of your "
            "own on task.tokens and task.answers."
        ) from error
    sizes = {"n_layers": n_layers, "n_heads": n_heads, "d_model": d_model}
    for name, size in (sizes | {"steps": steps, "batch": batch}).items():
        check_count(name, size)
    if d_model % n_heads:
        raise ArgumentError(f"n_heads must divide d_model = {d_model}; found {n_heads}.")
    config = lens.TransformerBridgeConfig(
        d_model=d_model,
        d_head=d_model // n_heads,
        n_heads=n_heads,
        n_layers=n_layers,
        n_ctx=task.tokens.shape[1],
        d_vocab=max(task.n_tokens, task.n_answers),
        d_mlp=4 * d_model,
        act_fn="gelu",
        normalization_type="LN",
        seed=seed,
    )
    model = boot(config)
    with_positions = not task.counts if positions is None else positions
    if not with_positions:
        embedding = next(p for name, p in model.named_parameters() if "pos" in name)
        torch.nn.init.zeros_(embedding.requires_grad_(False))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(task.tokens), (batch,), generator=generator)
        with around(model, step / steps) if around else contextlib.nullcontext():
            logits = model(task.tokens[chosen])[..., : task.n_answers]
        counted = task.counted[chosen]
        loss = torch.nn.functional.cross_entropy(logits[counted], task.answers[chosen][counted])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model.eval()


def _task(
    name: str, tokens: Tensor, answers: Tensor, n_tokens: int, n_answers: int, *, counts: bool
) -> Task:
    # The token that opens a sequence has no answer.
    counted = (torch.arange(tokens.shape[1]) > 0).expand(tokens.shape)
    return Task(name, tokens, answers, counted, n_tokens, n_answers, counts)


def _check_size(n_sequences: int, length: int, at_least: int = 2) -> None:
    check_count("n_sequences", n_sequences)
    check_count("length", length, at_least)


def _drawn(n_sequences: int, length: int, n: int, seed: int) -> Int[Tensor, "sequence position"]:
    """Draw n tokens from 1 on, after the 0 that opens every sequence."""
    generator = torch.Generator().manual_seed(seed)
    return _with_start(torch.randint(n, (n_sequences, length - 1), generator=generator) + 1)


def _with_start(tokens: Tensor) -> Int[Tensor, "sequence position"]:
    return torch.nn.functional.pad(tokens, (1, 0))
