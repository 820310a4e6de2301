"""What must hold after the notebook has run; its names are the notebook's."""

from pathlib import Path

tracked = tracker.frame()
assert tracked.index[-1] == STEPS
assert (tracked["norm"] - frame["norm"]).abs().max() < 1e-3

# The square root, and what the norm is made of.
assert abs(growth.exponent.value - 0.5) < 0.1
assert growth.raw_exponent.value < 0.25
assert factors["qk_product"] > 3 * factors["norm"] ** 2
assert factors["ov_product"] > factors["norm"] ** 2
assert squares["norm_layer_norm"].iloc[0] > 0.8 * squares.iloc[0].sum()

# The way: outwards, straighter than a random walk, and still turning.
later_path = way.loc[128:]
assert (later_path["straightness"] > later_path["random_walk"] + 0.05).all()
assert way["alignment"].loc[1024] > 0.15 > way["alignment"].loc[2]
assert way["at_right_angles"].loc[1024] < 0.5
assert way["rotation_per_doubling"].loc[1024] > 10 > 3 > way["rotation_per_doubling"].loc[8]

# Norm and saturation.
assert late["cos_saturated"].iloc[-1] < late["cos_saturated"].iloc[0]
assert frame["cos_saturated"].idxmax() < 128
assert late["lean"].iloc[-1] > late["lean"].iloc[0] + 0.1
assert late["S"].iloc[-1] > 0.5
assert cost[STEPS] > cost[128] + 0.05

initial, all_up, qk_up, as_trained, all_down, qk_down = scaled["lean"]
assert initial < 0.02
assert all_up < 0.15
assert all_up < qk_up < as_trained - 0.2
assert qk_down < all_down < as_trained - 0.2
assert qk_down < 0.15
assert abs(scaled["S"].iloc[2]) < 0.25
assert abs(scaled["loss"].iloc[0] - scaled["loss"].iloc[2]) < 0.1

# All parameters times c.
qk_road, all_road, soft_road = cosines.loc[1000]
assert abs(qk_road - limit) < 1e-3
assert limit > 0.75 > 0.4 > soft_road
assert abs(soft_road - all_road) < 0.1
for part, degree in degrees.items():
    assert abs(degree - {"e": 1, "a": 3, "M": 5}[part[0]]) < 0.02
for c in (1.5, 3.0):
    assert abs(cosine(activations(c, "qk")) - cosine(activations(scale=c**2))) < 1e-3

# The grid.
assert rank > 0.8
assert (cells[cells["wd"] == 1.0]["growth"] < 1).all()
assert best_rate.loc[1.0, "growth"] < 0.8 < 1.2 < best_rate.loc[0.0, "growth"]
assert best_rate.loc[1.0, "lean"] < 0.1 < best_rate.loc[0.0, "lean"]
assert best_rate.loc[1.0, "share_of_fall"] > 0.9
assert cells.groupby("lr")["loss"].min().idxmin() == 1e-2

# The demo model's run.
assert peak == 2896
assert 2000 < predicted.argmax() < 3000
assert 0.04 < predicted.max() / demo["norm"].max() - 1 < 0.08
assert abs(predicted[-1] / demo["norm"][6000] - 1) < 0.03
assert demo["lean"][128] > 0.8 * demo["lean"][6000]
assert demo["norm"][128] < 1.3 * demo["norm"][0]
assert demo_cost[6000] > demo_cost[peak]

# The solutions of the exercises, as they stand in the text.
source = Path("04_norm_growth_and_saturation.py").read_text()
text = source.partition("# ```python\n")[2].partition("# ```\n")[0]
exec("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()))
assert abs(added.sum() / (frame["norm"].iloc[-1] ** 2 - frame["norm"].iloc[0] ** 2) - 1) < 0.01
assert added.idxmax() == "norm_mlp"
assert 0.1 < added["norm_qk"] / added.sum() < 0.35
assert early.value > 2 * later.value
assert without_decay > 1.3 * predicted[-1]
assert abs(constant / balance - 1) < 0.05
