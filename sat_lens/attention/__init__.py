"""Attention as plain tensors: transforms of scores, distances to saturated rows, fused kernels.

Nothing in this room knows a model. Scores are float32 softmax inputs in which a masked key holds
``-inf``; every function works on the last axis (the keys) and treats all axes before it as rows,
so ``[batch, head, query, key]`` is the usual shape and not the only one.
"""

from sat_lens.attention.distances import (
    RowDistances,
    distances_to_saturated,
    effective_keys,
    nearest_saturated,
    total_variation,
)
from sat_lens.attention.engine import transform_scores
from sat_lens.attention.fused import (
    AttentionCall,
    limit_is_exact,
    limit_kernel,
    rescaled_attention,
    without_autocast,
)
from sat_lens.attention.masks import mask_threshold
from sat_lens.attention.transforms import (
    Limit,
    RandomKey,
    Scale,
    StraightThrough,
    Transform,
    Uniform,
    UniformWithoutSinks,
)

__all__ = [
    "AttentionCall",
    "Limit",
    "RandomKey",
    "RowDistances",
    "Scale",
    "StraightThrough",
    "Transform",
    "Uniform",
    "UniformWithoutSinks",
    "distances_to_saturated",
    "effective_keys",
    "limit_is_exact",
    "limit_kernel",
    "mask_threshold",
    "nearest_saturated",
    "rescaled_attention",
    "total_variation",
    "transform_scores",
    "without_autocast",
]
