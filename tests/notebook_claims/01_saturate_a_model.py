"""What must hold after the notebook has run; its names are the notebook's."""

assert losses["soft"] + 0.3 < losses["saturated"] < losses["soft"] + 0.8
assert losses["saturated"] + 3 < losses["uniform"]
assert losses["saturated"] + 3 < losses["random keys"]
assert hard.amax(-1).min() == 1
assert soft_neighbour.amax(-1).mean() < 0.9

# Effects of single heads do not follow how far they are from saturated; many are negative.
assert abs(correlation) < 0.3
assert 8 <= len(helped) <= 20

# The curve: nothing changes at 1, the loss is least a little beyond, S falls on both sides.
frame = curve.frame()
assert abs(frame.loc[1.0, "kl"]) < 1e-5
assert frame.loc[float("inf"), "kl"] > 0.01
assert 1 < frame["loss"].idxmin() < 4
for name in ("S_L0", "S_L1", "S_L2", "S_L3"):
    assert frame.loc[:1.0, name].drop(0.0).is_monotonic_increasing
    assert frame.loc[1.0:, name].is_monotonic_decreasing

# Raw cosine and S, trained and not.
assert 0.5 < similarity.s[-1] < 1
assert untrained_similarity.s.abs().max() < 0.2
assert 0.2 < untrained_similarity.cos_saturated[-1] < similarity.cos_saturated[-1]

# Halves.
assert costs["early"] > 0.05
assert abs(costs["early"] - costs["late"]) < 0.1
assert costs["all"] > 1.3 * (costs["early"] + costs["late"])
