"""Whether an intervention at each attention module changes the model's output, by trying.

The level of a module is found by watching one run. This goes one step further: all heads of one
module attend to random keys, and the output must change. There is no need to do so before every
run, because interventions check themselves while they run.

Modules are tried side by side: a few made-up tokens stand many times in one batch, and each copy
has another module changed. What does not clearly change its copy is tried again, alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sat_lens.attention import RandomKey
from sat_lens.intervention.attach import attach_edits
from sat_lens.intervention.edits import Edit, NewScores, TransformEdit
from sat_lens.intervention.managers import replace_attention
from sat_lens.models import logits_of, wrapped_model
from sat_lens.sites import AttentionSite, attention_sites
from sat_lens.sites.discovery import on_made_up_inputs

# Modules that are tried in one pass, each in a copy of its own.
TOGETHER = 64
# Copies of one prompt differ by rounding; a change has to be so many times larger.
CLEARLY = 100.0


@dataclasses.dataclass(frozen=True)
class SiteTrial:
    """What a trial at one attention module showed; ``change`` is in units of the logits."""

    site: AttentionSite
    change: float

    @property
    def ok(self) -> bool:
        """Whether heads of this module can be saturated with an effect."""
        return self.site.level is not None and self.change > 0

    def __str__(self) -> str:
        site = self.site
        where = f"{site.path}: {site.kind} attention, {site.n_heads} heads"
        if site.level is None:
            return f"{where}: cannot be saturated: {site.why_not}"
        effect = f"changes the output (by {self.change:.3g})" if self.change else "changes nothing"
        return f"{where}, level {site.level}: a trial {effect}"


def verify_sites(model: Any, *inputs: Any, **kwargs: Any) -> list[SiteTrial]:
    """Try every attention module: does sending its heads to random keys change the output?

    Args:
        model: A TransformerLens model or a plain Hugging Face model.
        *inputs: Example inputs, for a model that made-up tokens do not fit.
        **kwargs: Further arguments of the model's own forward.

    Raises:
        UnsupportedModelError: The model has no softmax attention, or could not be run.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.intervention import verify_sites
        >>> [trial.ok for trial in verify_sites(sl.load_model("demo"))]
        [True, True, True, True]
    """

    def run(args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[Any, ...]:
        return args, extra, logits_of(model(*args, **extra))

    sites = attention_sites(model, *inputs, **kwargs)
    with torch.no_grad():
        given = inputs or kwargs
        args, extra, before = run(inputs, kwargs) if given else on_made_up_inputs(model, run)
        changes: dict[str, float] = {}
        is_text = not extra and len(args) == 1 and not args[0].is_floating_point()
        if not given and is_text:
            within_reach = [site for site in sites if site.level is not None]
            for start in range(0, len(within_reach), TOGETHER):
                some = within_reach[start : start + TOGETHER]
                changes |= _side_by_side(model, sites, some, args[0], before)
        return [
            SiteTrial(site, changes.get(site.path) or _alone(model, site, before, args, extra))
            for site in sites
        ]


def _side_by_side(
    model: Any,
    sites: list[AttentionSite],
    some: list[AttentionSite],
    tokens: Tensor,
    before: Tensor,
) -> dict[str, float]:
    """Return the change by path, of those modules that clearly change their own copy."""
    n_copies = len(some) + 2
    edits = {site.path: _in_copy(site, i, n_copies) for i, site in enumerate(some, start=1)}
    try:
        with attach_edits(model, sites, edits):
            logits = logits_of(model(tokens.repeat(n_copies, 1)))
        changes = (logits - before).abs().flatten(1).amax(1).tolist()
    except Exception:  # noqa: BLE001 - alone, each module says better what is wrong
        return {}
    # The first and the last copy are as they were.
    least = CLEARLY * max(changes[0], changes[-1])
    found = zip(some, changes[1:-1], strict=True)
    return {site.path: change for site, change in found if change > least}


def _in_copy(site: AttentionSite, copy: int, n_copies: int) -> Edit:
    """Return the edit that sends all heads to random keys in one copy."""
    heads = list(range(site.n_heads))
    random_keys = TransformEdit.at(site, [(heads, RandomKey())])

    def edit(scores: Tensor) -> NewScores:
        if len(scores) != n_copies:
            raise ValueError("The scores do not keep the copies apart.")
        whole = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
        whole[copy] = random_keys(scores[copy, None]).scores[0].to(whole.dtype)
        return NewScores(heads, whole)

    return edit


def _alone(
    model: Any, site: AttentionSite, before: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    if site.level is None:
        return 0.0
    with replace_attention(model, RandomKey(), heads=site.labels):
        after = logits_of(model(*args, **kwargs))
    return float((after - before).abs().max())


# Whether a bridge computes what the model that it wraps computes.


@dataclasses.dataclass(frozen=True)
class BridgeTrial:
    """How far a bridge's logits are from those of the model inside, at most; NaN if none is."""

    apart: float
    largest: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the two agree, up to rounding; True where there is no second model."""
        return not self.apart > self.tolerance * max(self.largest, 1.0)

    def __str__(self) -> str:
        if math.isnan(self.apart):
            return (
                "The logits were not compared with a wrapped model's: there is none, its weights "
                "were folded, or it takes other inputs."
            )
        if self.ok:
            return f"The logits are those of the wrapped model, up to {self.apart:.3g}."
        return (
            "The logits are not those of the wrapped model: they differ by up to "
            f"{self.apart:.3g}, and the largest is {self.largest:.3g}. TransformerLens leaves out "
            "a part of it, such as an adapter on projections that it takes apart (LoRA on GPT-2's "
            "c_attn). Merge adapters before the bridge is made (model.merge_and_unload()), or use "
            "the Hugging Face model itself, which sat_lens takes as it is."
        )


def verify_bridge(model: Any, *inputs: Any, **kwargs: Any) -> BridgeTrial:
    """Compare a bridge's soft logits with those of the Hugging Face model that it wraps.

    A bridge's hooks can be right and its model wrong: TransformerLens computes attention by its own
    modules, which know nothing of what somebody else put into those of the wrapped model.

    Args:
        model: A ``TransformerBridge``; for any other model the answer is NaN.
        *inputs: Example inputs, for a model that made-up tokens do not fit.
        **kwargs: Further arguments of the model's own forward.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.intervention import verify_bridge
        >>> verify_bridge(sl.load_model("demo")).ok
        True
    """
    wrapped = wrapped_model(model)
    if wrapped is model or getattr(model, "compatibility_mode", False):
        return BridgeTrial(math.nan, math.nan, 0.0)

    def run(args: tuple[Any, ...], extra: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        own = {_OWN_NAMES.get(name, name): v for name, v in extra.items() if name != "return_type"}
        found = logits_of(model(*args, **extra))
        with _without_bridges(wrapped):
            try:
                return found, logits_of(wrapped(*args, **own))
            except Exception:  # noqa: BLE001 - it takes other inputs than the bridge
                return found, None

    with torch.no_grad():
        given = inputs or kwargs
        found, expected = run(inputs, kwargs) if given else on_made_up_inputs(model, run)
    if expected is None or found.shape != expected.shape:
        return BridgeTrial(math.nan, math.nan, 0.0)
    tolerance = max(LEAST_TOLERANCE, 16 * torch.finfo(found.dtype).eps)
    apart = (found.float() - expected.float()).abs().max()
    return BridgeTrial(float(apart), float(expected.abs().max()), tolerance)


LEAST_TOLERANCE = 1e-3
_OWN_NAMES = {"decoder_input": "decoder_input_ids"}


@contextlib.contextmanager
def _without_bridges(wrapped: nn.Module) -> Iterator[None]:
    """Put the wrapped model's own modules back where TransformerLens put its bridges."""
    replaced: list[tuple[nn.Module, str, nn.Module | None]] = []
    todo, seen = [wrapped], {wrapped}
    while todo:
        module = todo.pop()
        for name, part in module._modules.items():
            own = part
            while own is not None and "_original_component" in own._modules:
                own = own._modules["_original_component"]
            if own is not part:
                replaced.append((module, name, part))
            if own is not None and own not in seen:
                seen.add(own)
                todo.append(own)
            module._modules[name] = own
    try:
        yield
    finally:
        for module, name, part in replaced:
            module._modules[name] = part
