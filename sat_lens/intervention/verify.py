"""Whether an intervention at each attention module changes the model's output, by trying.

The level of a module is found by watching one run. This goes one step further: all heads of one
module attend to random keys, and the output must change. There is no need to do so before every
run, because interventions check themselves while they run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sat_lens.attention import RandomKey
from sat_lens.intervention.managers import replace_attention
from sat_lens.models import logits_of
from sat_lens.sites import AttentionSite, attention_sites
from sat_lens.sites.discovery import on_made_up_inputs


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
        return [SiteTrial(site, _change(model, site, before, args, extra)) for site in sites]


def _change(
    model: Any, site: AttentionSite, before: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    if site.level is None:
        return 0.0
    with replace_attention(model, RandomKey(), heads=lambda other, _head: other.path == site.path):
        after = logits_of(model(*args, **kwargs))
    return float((after - before).abs().max())
