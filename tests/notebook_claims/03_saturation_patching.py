"""What must hold after the notebook has run; its names are the notebook's."""

soft, hard = measure(), measure(sl.transforms.Limit())
random = measure(sl.transforms.RandomKey(seed=0))["logit difference"]
near = measure(sl.transforms.Limit("nearest"))["logit difference"]
assert random < 1 < hard["logit difference"] < soft["logit difference"] - 1
assert abs(near - soft["logit difference"]) < 0.5
assert hard["p(answer)"] < soft["p(answer)"] / 3

# TransformerLens's functions and sweep_heads agree, in both directions.
assert (run["noising"].values - noised).abs().max() < 1e-4
assert (run["denoising"].values - denoised).abs().max() < 1e-4
assert (noised - denoised).abs().max() > 0.5

# The carrier copies from both places, needs them, and does not need to be soft.
assert carrier == "L3H0"
assert weights[[7, 17]].sum() > 0.8
assert frame.loc[carrier, "corruption_effect"] < -4
assert frame.loc[carrier, "random_effect"] < -1.5
assert frame.loc[carrier, "effect"] > 0
assert (frame.nsmallest(5, "corruption_effect")["effect"] > 0).all()

# Local and run are different questions.
assert apart[0] == "L3H4"
assert both.loc["L3H4", "local"] > 0.1
assert both.loc["L3H4", "run"] < -0.9

# Denoising: what restores most does little more than random keys.
best = restored.nlargest(6, "effect")
assert (best["spreads"] < 2).all()
assert 0.5 < best.iloc[0]["random_effect"] / best.iloc[0]["effect"] < 0.8
assert restored["spreads"].idxmax() == carrier
assert restored.loc[carrier, "effect"] < 0
assert restored["normalised"].sum() > 2

# Positions: layer 3 at the end only, and the end before all else.
assert where.effect[3, :, :-1].abs().max() < 1e-5
assert where.effect[..., :-1].abs().max() < 0.4 * where.effect[..., -1].abs().max()

# Attribution, and how many heads can go.
assert worth["noising"]["correlation"] > 0.9
assert worth["denoising"]["correlation"] < 0.7
assert len(found.heads) >= 28
assert float(found.frame()["change"].abs().max()) > 0.3
with sl.saturate(model, heads=list(found.heads)):
    kept = measure()
assert abs(kept["logit difference"] - soft["logit difference"]) <= 0.5
assert kept["p(answer)"] < soft["p(answer)"] / 2

# Exercises.
divergence = sl.metrics.kl_to_soft(model(tokens), positions=[-1])
stricter = sl.saturable_heads(model, tokens, divergence, tolerance=0.2, progress=False)
assert 15 <= len(stricter.heads) < len(found.heads)
layers = {f"layer {i}": [f"L{i}H{h}" for h in range(8)] for i in range(4)}
by_layer = sl.sweep_heads(model, tokens, metric, heads=layers, progress=False).frame()["effect"]
assert abs(by_layer - frame.groupby("layer")["effect"].sum().to_numpy()).max() > 0.15
nearest = sl.transforms.Limit("nearest")
milder = sl.sweep_heads(model, tokens, metric, transform=nearest, progress=False).frame()["effect"]
assert milder.abs().max() < frame["effect"].abs().max()
