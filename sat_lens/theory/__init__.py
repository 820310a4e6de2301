"""What is proved about parameter norms, held against measurement.

The degree of homogeneity of a layer, the growth of the squared norm under gradient descent, and
the norm at which that growth stops, with weight decay and without. Background: Merrill et al. 2021,
arXiv 2010.09697; the argument for each formula stands in the module that measures it. Everything is
computed in float64, on copies.

When not to use it: on a large model. Each result takes a float64 copy of the parameters.
"""

from sat_lens.theory.degrees import Degree, degree_of_homogeneity
from sat_lens.theory.descent import Descent, descend
from sat_lens.theory.flow import NormFlow, norm_flow
from sat_lens.theory.parts import PartDegrees, part_degrees
from sat_lens.theory.stationary import stationary_norm

__all__ = [
    "Degree",
    "Descent",
    "NormFlow",
    "PartDegrees",
    "degree_of_homogeneity",
    "descend",
    "norm_flow",
    "part_degrees",
    "stationary_norm",
]
