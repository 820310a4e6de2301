# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Saturation patching
#
# **Question.** The demo model can copy a name from a few lines above. Which heads does that, and
# which of them need soft attention for it?
#
# Activation patching usually goes between two prompts. Here it goes between two runs of one prompt:
# the soft one, and the one in which every head is saturated.
#
# In Colab, first run `%pip install git+ADDRESS`, with the address of the repository that this
# notebook comes from. Nothing is downloaded after that.
#
# > **In a real language model** copying runs on hard attention as well, and little else does: see
# > [tutorial 8](08_a_real_language_model.ipynb).

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.utils.capture import capture_output
from transformer_lens import patching

import sat_lens as sl

torch.set_grad_enabled(False)
model = sl.load_model("demo")

# %% [markdown]
# ## The task
#
# Twice the arguments are `name` and another word; the third time the model has to supply the other
# word. The metric is the logit of that word minus the logit of the one in the *corrupted* prompt,
# which is the same but for that word.

# %%
template = "a = first(name, {0})\nb = second(name, {0})\nc = third(name,"
words = ["value", "line", "data", "text", "index", "size", "mode", "args"]
others = ["line", "value", "text", "data", "size", "index", "args", "mode"]
tokens = model.to_tokens([template.format(word) for word in words])
corrupted = model.to_tokens([template.format(word) for word in others])
answers = [model.to_single_token(f" {word}") for word in words]
wrong = [model.to_single_token(f" {word}") for word in others]
metric = sl.metrics.logit_difference(answers, wrong)


def measure(transform=None):
    if transform is None:
        logits = model(tokens)
    else:
        with sl.replace_attention(model, transform):
            logits = model(tokens)
    chance = logits[range(len(words)), -1].softmax(-1)[range(len(words)), answers]
    return {"logit difference": float(metric(logits)), "p(answer)": float(chance.mean())}


# %% [markdown]
# **Prediction.** Saturating all heads costs part of the logit difference and random keys cost all
# of it; the nearest saturated rows (`ties="nearest"`) cost least.

# %%
pd.DataFrame(
    {
        "soft": measure(),
        "saturated": measure(sl.transforms.Limit()),
        "nearest saturated": measure(sl.transforms.Limit("nearest")),
        "random keys": measure(sl.transforms.RandomKey(seed=0)),
    }
).T.round(2)

# %% [markdown]
# It held: random keys cost nearly all, and the nearest saturated rows nothing. Note the second
# column. The saturated model still prefers the right word to the wrong one, but gives it about a
# fifth of the probability that it had. A logit difference between two words is blind to all the
# others, here and in everything that follows.
#
# ## With TransformerLens's own functions
#
# `run_with_saturation_cache` gives two `ActivationCache` objects, and `transformer_lens.patching`
# takes them as they are.
#
# *Noising*: the z of each head, taken from the saturated run, goes into an otherwise soft run.
# *Denoising*: a soft z goes into an otherwise saturated run, so the call stands inside a
# `saturate` block. (`capture_output` hides their progress bars.)

# %%
pair = sl.run_with_saturation_cache(model, tokens)
patch = patching.get_act_patch_attn_head_out_all_pos
with capture_output():
    noised = patch(model, tokens, pair.saturated.cache, metric)
with capture_output(), sl.saturate(model):
    denoised = patch(model, tokens, pair.soft.cache, metric)
print("shape [layer, head]:", list(noised.shape))

# %% [markdown]
# ## The same, with labels and controls
#
# `sweep_heads` does the same with `source="run"`, in less time where it can run only what comes
# after a head. **Prediction.** The numbers are equal up to rounding.

# %%
run = {
    name: sl.sweep_heads(model, tokens, metric, source="run", direction=name, progress=False)
    for name in ("noising", "denoising")
}
print(f"noising:   {(run['noising'].values - noised).abs().max():.0e} apart")
print(f"denoising: {(run['denoising'].values - denoised).abs().max():.0e} apart")

# %% [markdown]
# It held.
#
# ## Local or run?
#
# With `source="run"` a head brings along what saturating *all heads before it* has done to its
# input. To ask what the head's own softness does, leave the rest alone: `source="local"`, the
# default, saturates the head's pattern in the very run that it sits in.
#
# `baseline="random"` puts random keys in the same place (five draws), and `corrupted=` measures
# ordinary activation patching from the corrupted prompts beside it: how much of the answer the head
# carries. `reduce=None` keeps one value per prompt, which gives a standard error.
#
# **Prediction.** The head that carries the answer (largest corruption effect) is an induction head,
# as the notebook on roles found at this position. It splits its attention between two earlier
# places, so making it hard should hurt.

# %%
local = sl.sweep_heads(
    model, tokens, metric, corrupted=corrupted, baseline="random", reduce=None, progress=False
)
frame = local.frame()
columns = ["effect", "effect_se", "random_effect", "random_spread", "corruption_effect"]
frame.nsmallest(5, "corruption_effect")[columns].round(2)

# %%
carrier = frame["corruption_effect"].idxmin()
layer, head = frame.loc[carrier, ["layer", "head"]]
weights = pair.soft.cache["pattern", layer][0, head, -1]
strings = model.to_str_tokens(tokens[0])
print(carrier, "attends from the last position to")
for weight, place in zip(*weights.topk(4), strict=True):
    print(f"  {weight:.2f}  position {place}, {strings[place]!r} after {strings[place - 1]!r}")

# %% [markdown]
# The first half held, the second did not. The head does copy from both places, and random keys in
# it destroy much of the answer; but both places hold the same word, so it does not matter which of
# them wins. What a head carries and what its softness is for are different questions: of the five
# heads that carry most of the answer, none loses anything, on average, by being hard.
#
# In the map orange means that saturating this one head raises the logit difference, blue that it
# lowers it. The line on the bar is the root mean square of all random-key effects; at the end of
# the bar it means "here or beyond".

# %%
local.plot()

# %%
both = pd.DataFrame({"local": frame["effect"], "run": run["noising"].frame()["effect"]})
apart = (both["local"] - both["run"]).abs().nlargest(3).index
print(f"all heads saturated: {float(local.saturated.mean() - local.soft.mean()):+.2f}")
print(f"sum of the effects of single heads: {frame['effect'].sum():+.2f}")
both.loc[apart].round(2)

# %% [markdown]
# Where `local` and `run` differ, the difference comes from before the head. The first one here does
# not suffer from being hard; its saturated z is bad because the heads before it were hard.
#
# ## Denoising, and its control
#
# Now everything is saturated, and one head at a time is made soft again.
#
# **Prediction.** The heads that restore most do so because of where they look. Then random keys in
# the same head must restore much less.

# %%
restored = sl.sweep_heads(
    model, tokens, metric, direction="denoising", baseline="random", progress=False
).frame()
beyond = restored["effect"] - restored["random_effect"]
restored["spreads"] = beyond / restored["random_spread"]
columns = ["effect", "normalised", "random_effect", "random_spread", "spreads"]
print(f"the shares of all heads add up to {restored['normalised'].sum():.1f}")
restored.nlargest(6, "effect")[columns].round(2)

# %%
restored.nlargest(4, "spreads")[columns].round(2)

# %% [markdown]
# It did not hold. `spreads` is how far the effect lies above that of random keys, in standard
# deviations of their draws. None of the six heads that restore most reaches two: to the first,
# random keys do two thirds of the same good. What is "restored" there is mostly that the saturated
# version of the head does harm, and without the control that line would have been the finding.
#
# The second table has the heads where the soft pattern does differ from a random one. The carrier
# is far ahead, and its own effect is negative: in the saturated run its hard pattern serves better
# than its soft one. It must look at the right place; being soft does not help it.
#
# `normalised` is the share of the gap between soft and saturated. The shares add up to more than
# 1, so single shares are not parts of a whole: heads compensate for each other.
#
# ## One prompt, position by position
#
# **Prediction.** Only the last position reads the answer, so saturating layer 3 can matter only
# there; in earlier layers the positions of the first two calls should matter too.

# %%
one = tokens[:1]
one_metric = sl.metrics.logit_difference(answers[0], wrong[0])
where = sl.sweep_heads(model, one, one_metric, positions="each", progress=False)
largest = where.effect.abs().amax(1)  # [layer, position]: the largest of the layer's heads

figure, axes = plt.subplots(figsize=(9, 2.4), layout="constrained")
image = axes.imshow(largest, cmap="Oranges", vmin=0, aspect="auto")
axes.set(ylabel="layer", yticks=range(len(largest)), title="largest effect of one head saturated")
axes.set_xticks(range(len(strings)), [repr(s)[1:-1] for s in strings], rotation=90, fontsize=8)
figure.colorbar(image, label="|effect|")
plt.show()

# %% [markdown]
# White is no effect, dark orange the largest. The first half holds by construction: after the last
# attention nothing moves between positions. Of the second there is only a trace, at the words to
# be copied; most of what softness does, it does at the end, in every layer.

# %%
strongest = where.frame().sort_values("effect", key=abs, ascending=False)
strongest[["position", "effect"]].head(6).round(2)

# %% [markdown]
# ## What is attribution worth?
#
# `method="attribution"` estimates all heads at once from two forward passes and a backward pass.
#
# **Prediction.** Saturation is no small step, so a first-order estimate will rank heads loosely.
# Noising should do better than denoising: a saturated run passes no gradient through its patterns.

# %%
exact = {"noising": frame["effect"], "denoising": restored["effect"]}
worth = {}
for direction, effects in exact.items():
    guess = sl.sweep_heads(
        model, tokens, metric, direction=direction, method="attribution", progress=False
    ).frame()["effect"]
    top = [set(values.abs().nlargest(5).index) for values in (effects, guess)]
    worth[direction] = {
        "correlation": effects.corr(guess),
        "relative error": ((guess - effects) ** 2).sum() ** 0.5 / (effects**2).sum() ** 0.5,
        "of the top five found": len(top[0] & top[1]),
    }
pd.DataFrame(worth).T.round(2)

# %% [markdown]
# The order held; for noising the estimate was better than predicted. Do not count on it: on other
# texts it was worse (the documentation has a table). `method="screen"` lets the estimate choose and
# recomputes the chosen heads exactly.
#
# ## How many heads can be hard at once?
#
# Single effects do not add up, so this needs a search: `saturable_heads` saturates one head after
# the other, always the one that moves the metric least, by exact runs.
#
# **Prediction.** Most heads can go, but a handful must stay soft to keep the logit difference
# within half a logit.

# %%
found = sl.saturable_heads(model, tokens, metric, tolerance=0.5, progress=False)
soft_ones = sorted(set(frame.index) - set(found.heads))
print(f"{len(found.heads)} of {found.n_heads} heads can be saturated; soft remain {soft_ones}")
with sl.saturate(model, heads=list(found.heads)):
    print({name: round(value, 2) for name, value in measure().items()})

# %%
found.plot()

# %% [markdown]
# It held, and the handful is two. But look at the probability of the answer, which has fallen to
# less than half of what it was. The last steps of the curve show how: heads that move the metric up
# and heads that move it down cancel, and the search makes use of that. A set of heads is found *for
# a metric*. Exercise 1 takes one that asks for the whole prediction to stay.
#
# ## Exercises
#
# 1. Repeat the search with `kl_to_soft(logits, positions=[-1])` and a tolerance of .2 nats. How
#    many heads can be hard now?
# 2. Patch groups: saturate each layer as a whole (`heads={"layer 0": [...], ...}`). Is the effect
#    of a layer the sum of the effects of its heads?
# 3. `ties="nearest"` keeps more of the model than the limit. Run the local sweep with
#    `transform=sl.transforms.Limit("nearest")` and compare the largest effects.
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1
# divergence = sl.metrics.kl_to_soft(model(tokens), positions=[-1])
# stricter = sl.saturable_heads(model, tokens, divergence, tolerance=0.2, progress=False)
# print(len(stricter.heads), "heads; they cost", float(stricter.values[len(stricter.heads) - 1]))
#
# # 2
# layers = {f"layer {i}": [f"L{i}H{h}" for h in range(8)] for i in range(4)}
# by_layer = sl.sweep_heads(model, tokens, metric, heads=layers, progress=False).frame()["effect"]
# sums = frame.groupby("layer")["effect"].sum()
# print(by_layer.round(2).tolist(), sums.round(2).tolist())  # no: heads of a layer interact
#
# # 3
# nearest = sl.transforms.Limit("nearest")
# kept = sl.sweep_heads(model, tokens, metric, transform=nearest, progress=False).frame()["effect"]
# print(kept.abs().max(), frame["effect"].abs().max())
# ```
#
# </details>
