"""Parameter norms: of one model, through training, and scaled on purpose."""

from sat_lens.norms.balance import RescalingShare, rescaling_share
from sat_lens.norms.growth import Exponent, NormGrowth, norm_growth
from sat_lens.norms.measures import lens_model, saturation_measures
from sat_lens.norms.names import COMPONENTS
from sat_lens.norms.narrowing import Narrowing, attention_narrowing
from sat_lens.norms.parameters import ParameterNorms, parameter_norms
from sat_lens.norms.scaled import HomogeneityCurve, homogeneity_curve, scaled_parameters

__all__ = [
    "COMPONENTS",
    "Exponent",
    "HomogeneityCurve",
    "Narrowing",
    "NormGrowth",
    "ParameterNorms",
    "RescalingShare",
    "attention_narrowing",
    "homogeneity_curve",
    "lens_model",
    "norm_growth",
    "parameter_norms",
    "rescaling_share",
    "saturation_measures",
    "scaled_parameters",
]
