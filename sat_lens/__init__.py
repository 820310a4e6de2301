"""sat_lens: what the softness of attention is for. A plugin for TransformerLens."""

from sat_lens import metrics
from sat_lens.attention import transforms
from sat_lens.caching import run_with_saturation_cache
from sat_lens.errors import SatLensError
from sat_lens.intervention import replace_attention, saturate, saturation_hooks
from sat_lens.models import load_model
from sat_lens.roles import HeadRoles, head_roles
from sat_lens.sites import attention_sites
from sat_lens.spectrum import scaling_curve
from sat_lens.version import __version__

__all__ = [
    "HeadRoles",
    "SatLensError",
    "__version__",
    "attention_sites",
    "head_roles",
    "load_model",
    "metrics",
    "replace_attention",
    "run_with_saturation_cache",
    "saturate",
    "saturation_hooks",
    "scaling_curve",
    "transforms",
]
