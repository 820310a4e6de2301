"""What must hold after the notebook has run; its names are the notebook's."""

from pathlib import Path

said = overview.groupby("figure")["verdict"].agg(list)
assert set(said.index) == {
    "norm-growth", "direction", "saturation", "scaling", "heads", "grid", "threshold"
}  # fmt: skip
assert said["norm-growth"][0] == "holds"
assert said["direction"][0] == said["direction"][2] == "holds"
assert said["direction"][1] != "holds"
assert said["saturation"] == ["holds", "does not hold here", "holds"]
assert said["scaling"] == ["holds", "does not hold here", "holds"]
assert said["heads"] == ["does not hold here"] * 3
assert said["grid"][0] == said["grid"][3] == "holds"
assert said["grid"][2] == "does not hold here"
assert said["threshold"][1] == "holds"
assert "does not hold here" not in said["threshold"]

# Figures 1 to 4, as the text tells them.
by_doubling = np.log2(grown).diff().dropna()
assert by_doubling[1024] < 0.5 < by_doubling.iloc[:-1].min()
assert growth.raw_exponent.value < growth.exponent.value - 0.1
assert doubling["rotation_per_doubling"].iloc[-1] > 10
assert table["cos_saturated"].idxmax() < 64
assert table["lean"][32] < 0.1
assert np.isnan(table["S"][32])
at_one, at_two = (
    scaled[(scaled["grown"] == scaling.ALL) & (scaled["c"] == c)].set_index("network")
    for c in (1, 2)
)
assert abs((at_one["cos_saturated"] - at_one["cos_random"])[scaling.TRAINED]) < 0.1
assert at_two.loc[scaling.TRAINED, "cos_saturated"] > 0.5
assert at_two.loc[scaling.RANDOM, "cos_saturated"] < 0.2

# The mask.
own = positions[positions["trained_with"] == "multiplied"].groupby("masked_by")["positions"]
assert own.max()[heads.OWN] > 5
assert own.max()[heads.RIGHT] < 1.5
assert positions[positions["trained_with"] == "infinite"]["positions"].max() < 1.5
assert losses["multiplied"][0] + 1 < losses["multiplied"][1]
assert losses["multiplied"][0] < losses["infinite"][0] == losses["infinite"][1]
ahead = scores.softmax(-1).triu(1).sum(-1)
assert (ahead[:-1] > 0.99).float().mean() > 0.9
assert (masked(scores, "infinite").softmax(-1) > 1e-5).sum(-1).float().mean() < 1.1

# The threshold.
constructed, natural = (
    stopping.frame[stopping.frame["panel"] == panel]
    for panel in (threshold.CONSTRUCTED, threshold.NATURAL)
)
ordered = constructed.sort_values("accuracy")
assert ordered["norm"].is_monotonic_increasing
assert ordered["threshold"].iloc[-1] == np.inf
assert (constructed[constructed["accuracy"] < 1]["growth_per_doubling"] > 0.01).sum() <= 2
for _, course in natural.groupby("run"):
    norm_by_step = course.set_index("step")["norm"]
    assert norm_by_step[512] > 1.02 * norm_by_step[256]

# What the theory takes for granted.
degrees = parts.frame()
exact = degrees.loc[["blocks.0.ln1", "blocks.0.ln2", "blocks.0.attn, saturated"]]
assert (exact["degree"] - [1, 1, 2]).abs().max() < 1e-3
assert exact["residual"].max() < 1e-5 < 0.05 < degrees.loc["blocks.0.attn", "residual"]
assert abs(degrees.loc["blocks.0.mlp", "at_largest"] - 3) < 0.01
assert abs(degrees.loc["residual stream", "at_largest"] - 5) < 0.05
assert degrees.loc["residual stream", "cosine"] < 0.3
assert 0.6 < parts.degrees["output"].cosines[1] < 0.9
assert growth.frame()["norm"].iloc[-1] > 3 * growth.frame()["norm"].iloc[0]
assert max(euler["2 layers"], euler["3 layers"]) < 1e-5 < 0.01 < euler["2 layers with biases"]
assert ends["norm"].is_monotonic_decreasing
assert ((ends["norm"] - ends["stationary"]).abs() < 1e-3).all()
assert ends["norm"].iloc[-1] < 1e-6 < 1.5 < ends["norm"].iloc[-2]

# The solutions of the exercises, as they stand in the text.
source = Path("06_merrill_et_al_2021.py").read_text()
text = source.partition("# ```python\n")[2].partition("# ```\n")[0]
exec("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()))
assert abs(late.value - growth.exponent.value) > 0.05
assert not soft.homogeneous
assert hard.homogeneous
assert abs(hard.value) < 1e-6
assert {int(n) for layer in counts for n in layer.unique()} == {1}
