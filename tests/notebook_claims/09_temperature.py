"""What must hold after the notebook has run; its names are the notebook's."""

from pathlib import Path

for head in (table.index[0], table.index[-1]):
    difference = loss_at(head, math.exp(step)) - loss_at(head, math.exp(-step))
    assert abs(table.loc[head, "gradient"] - difference / (2 * step)) < 2e-4

assert abs(fits["model"].scales[0] - 1) < 0.05
assert -0.01 < rows["one c per model"]["change of the held-out loss"] < 0
assert rows["one c per head"]["change of the held-out loss"] > -0.002
assert 1.2 < float(fits["head"].scales.max()) < 2
assert fits["head"].history[-5:].mean() < fits["head"].history[:5].mean()
assert moved["fitted on English"][0] < -2 * moved["fitted on English"][1]
assert moved["fitted on code"][0] > 2 * moved["fitted on code"][1]

for task in ("majority", "Dyck-1 depth"):
    assert results[task, "soft"]["soft"] > 0.98
    assert results[task, "straight-through, exact"]["exact"] < 0.7
    hard = max(results[task, way][name] for way in WAYS for name in ("exact", "nearest"))
    assert hard == results[task, "soft"]["nearest"] or task != "majority"
    assert hard < 0.5 or task == "majority"
    annealed = results[task, "c from 1 to 256"]
    assert max(annealed.values()) < results[task, "soft"]["soft"]
assert results["majority", "soft"]["nearest"] > 0.9

# The solutions of the exercises, as they stand in the text.
text = Path("09_temperature.py").read_text().partition("# ```python\n")[2].partition("# ```\n")[0]
exec("\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines()))
assert 0.5 < agreeing < 1
assert at_two > 0
assert copied > 0.9
