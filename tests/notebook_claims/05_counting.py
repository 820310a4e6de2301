"""What must hold after the notebook has run; its names are the notebook's."""

from pathlib import Path

assert set(roles.frame()["role"]) == {"mean"}
assert replaced["soft"] > 0.98
assert replaced["exact limit"] < min(replaced["guess"], replaced["random key"])
assert replaced["uniform"] > 0.85
# In the limit every head sees one kind of token only.
for head in range(2):
    for current in (1, 2):
        rows = winners[:, head, 16:][test.tokens[:, 16:] == current]
        keys = test.tokens[:, None].expand(-1, 32, -1)[test.tokens[:, 16:] == current]
        assert len(set(keys[rows].tolist())) == 1

assert by_tolerance[1e-5] == by_tolerance[0] == replaced["exact limit"]
assert all(by_tolerance[d] == replaced["uniform"] for d in tolerances if d > widest)
assert max(by_tolerance[d] for d in tolerances if d < widest / 5) < 0.6
assert min(by_lead[k] for k in (2, 3, 4)) > 0.99 > by_lead[0]
for name in ("soft", "uniform"):
    assert abs(int(states[name][-1]) - pairs[-1]) <= 3
assert int(states["exact limit"][-1]) <= 2

assert torch.equal(soft, hard)
assert accuracy(made, test) == 1
assert by_hair["soft, scores 1e-6 apart"] == by_hair["their limit with ties=1e-5"] == 1
assert by_hair["their exact limit"] < 0.6

for name in ("previous token", "induction"):
    assert table.loc[name, "exact limit"] > 0.95 > 0.5 > table.loc[name, "uniform"]
counting = table.drop(["previous token", "induction"])
assert (counting["soft"] > 0.9).all()
assert (counting["exact limit"] < counting["guess"] + 0.1).all()
assert table.loc["Dyck-1 depth", "uniform"] > 0.8
assert table.loc["a^n b^n", "uniform"] < 0.85
assert table.loc["a^n b^n", "nearest"] < table.loc["a^n b^n", "guess"]
assert table.loc["token count", ["nearest", "uniform"]].max() < 0.3
assert (wrong_by == 2).sum() > 2 * (wrong_by == 1).sum()
assert without_positions["soft"] > 0.95 > 0.4 > without_positions["uniform"]
assert summary["a^n b^n"]["roles"] == summary["majority"]["roles"] == "mean, mean"
assert summary["a^n b^n"]["keys moved"] > 2 * summary["majority"]["keys moved"]

# The solutions of the exercises, as they stand in the text.
text = Path("05_counting.py").read_text().partition("# ```python\n")[2].partition("# ```\n")[0]
exec("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()))
limits = roles.frame()
assert limits["c_lo"].min() < first_below < limits["c_hi"].max()
assert int(kept[-1]) > 0.9 * there[-1]
assert accuracy(made, test, without_start) == 1
