"""sat_lens: what the softness of attention is for. A plugin for TransformerLens."""

from sat_lens.errors import SatLensError
from sat_lens.intervention import replace_attention, saturate, saturation_hooks
from sat_lens.models import load_model
from sat_lens.sites import attention_sites
from sat_lens.version import __version__

__all__ = [
    "SatLensError",
    "__version__",
    "attention_sites",
    "load_model",
    "replace_attention",
    "saturate",
    "saturation_hooks",
]
