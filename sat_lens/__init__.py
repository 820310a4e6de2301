"""sat_lens: what the softness of attention is for. A plugin for TransformerLens.

The names below are the surface of the library. They are imported when first used, so importing
sat_lens costs next to nothing beside importing TransformerLens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sat_lens.errors import SatLensError
from sat_lens.version import __version__

if TYPE_CHECKING:
    from sat_lens import metrics, norms, tasks, training, viz
    from sat_lens.attention import transforms
    from sat_lens.caching import SaturationPair, run_with_saturation_cache
    from sat_lens.intervention import replace_attention, saturate, saturation_hooks
    from sat_lens.models import load_model
    from sat_lens.norms import norm_growth, parameter_norms, scaled_parameters
    from sat_lens.patching import saturable_heads, sweep_heads
    from sat_lens.results import load
    from sat_lens.roles import HeadRoles, head_roles
    from sat_lens.sites import attention_sites
    from sat_lens.spectrum import scaling_curve
    from sat_lens.temperature import temperature_gradient, tune_temperature
    from sat_lens.training import SaturationTracker
    from sat_lens.viz import write_report

_PLACES = {
    "HeadRoles": "sat_lens.roles",
    "SaturationPair": "sat_lens.caching",
    "SaturationTracker": "sat_lens.training",
    "attention_sites": "sat_lens.sites",
    "head_roles": "sat_lens.roles",
    "load": "sat_lens.results",
    "load_model": "sat_lens.models",
    "norm_growth": "sat_lens.norms",
    "parameter_norms": "sat_lens.norms",
    "replace_attention": "sat_lens.intervention",
    "run_with_saturation_cache": "sat_lens.caching",
    "saturable_heads": "sat_lens.patching",
    "saturate": "sat_lens.intervention",
    "saturation_hooks": "sat_lens.intervention",
    "scaled_parameters": "sat_lens.norms",
    "scaling_curve": "sat_lens.spectrum",
    "sweep_heads": "sat_lens.patching",
    "temperature_gradient": "sat_lens.temperature",
    "transforms": "sat_lens.attention",
    "tune_temperature": "sat_lens.temperature",
    "write_report": "sat_lens.viz",
}
_ROOMS = ("metrics", "norms", "patching", "roles", "tasks", "training", "viz")

__all__ = [
    "HeadRoles",
    "SatLensError",
    "SaturationPair",
    "SaturationTracker",
    "__version__",
    "attention_sites",
    "head_roles",
    "load",
    "load_model",
    "metrics",
    "norm_growth",
    "norms",
    "parameter_norms",
    "replace_attention",
    "run_with_saturation_cache",
    "saturable_heads",
    "saturate",
    "saturation_hooks",
    "scaled_parameters",
    "scaling_curve",
    "sweep_heads",
    "tasks",
    "temperature_gradient",
    "training",
    "transforms",
    "tune_temperature",
    "viz",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"sat_lens.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'sat_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
