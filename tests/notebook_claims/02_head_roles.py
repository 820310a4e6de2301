"""What must hold after the notebook has run; its names are the notebook's.

The text is that of whichever Python runs this, so what is claimed leaves room for other texts.
"""

assert frame["role"].nunique() >= 4
assert "mean" not in set(frame["role"])
assert (frame["target"] == "previous").sum() >= 2
assert "induction" not in set(frame["target"])
assert set(clearest.index) == set(frame["role"])

# Sinks: the head that rests on the first token is flatter elsewhere.
assert frame.loc[sink, "target"] == "first"
assert frame.loc[sink, "lean_no_sink"] < 0.60 < frame.loc[sink, "lean"]

# Rows: on those that count, it looks at induction keys.
assert weighed.loc[sink, "induction"] > weighed.loc[sink, "first"]
assert frame.loc[sink, "induction"] < frame.loc[sink, "first"]
assert sharper > 0.75 * len(frame)
assert last.loc[sink, "target"] == "first"
assert last.loc["L3H0", "target"] == "induction"
assert last.loc["L3H0", "induction"] > 0.8

# Initialisation, uncertainty.
assert set(at_random.frame()["role"]) == {"mean"}
assert moved["learned"].all()
assert by_place["changed"].sum() > by_turn["changed"].sum() + 1
assert by_turn["changed"].sum() <= 3
assert by_place["change"].abs().max() < 0.1

# Damage: a tendency, and the heads that look at the token itself.
assert 0.6 * (sharp | flat).sum() < as_predicted.sum() <= (sharp | flat).sum()
assert nearest_is_best.sum() >= 24
needed = damaged.nlargest(2, "damage_zero")
assert set(needed["target"]) == {"self"}
assert (needed["damage_argmax"].abs() < 0.01).all()
assert (needed["damage_zero"] > 0.5).all()

assert merged.n_sequences == len(windows)
assert apart < 1e-9

# Exercise 3: about half of the rows are within .1 of the limit at the median scale.
label = (frame["lean"] - 0.5).abs().idxmin()
layer, head = frame.loc[label, ["layer", "head"]]
with sl.saturate(model, heads=label, scale=float(frame.loc[label, "c_hi"])):
    _, sharp_cache = model.run_with_cache(windows, names_filter=lambda name: "pattern" in name)
winner = sharp_cache["pattern", layer][:, head, 7:].amax(-1)
assert 0.4 < (winner >= 0.9).float().mean() < 0.6
