"""Run a model soft and saturated, keep the activations of both, and compare them."""

from sat_lens.caching.pair import (
    NO_ROOM,
    CachedRun,
    SaturationPair,
    Similarity,
    mean_cosine,
    normalised_similarity,
    run_with_saturation_cache,
)

__all__ = [
    "NO_ROOM",
    "CachedRun",
    "SaturationPair",
    "Similarity",
    "mean_cosine",
    "normalised_similarity",
    "run_with_saturation_cache",
]
