"""What must hold after the notebook has run; its names are the notebook's."""

assert losses["soft"] < losses["saturated"] < losses["random keys"]
assert losses["soft"] < losses["uniform"]
assert hard.amax(-1).min() == 1
frame = curve.frame()
assert abs(frame.loc[1.0, "kl"]) < 1e-5
assert frame.loc[float("inf"), "kl"] > 0.01
assert 0.5 < similarity.s[-1] < 1
assert losses["soft"] <= late_only
