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
# # 4. Norm growth and saturation
#
# **Question.** While a transformer trains, its parameters grow. Merrill et al. 2021 ([arXiv
# 2010.09697](https://arxiv.org/abs/2010.09697)) say that the norm grows like the square root of the
# number of steps, and that growth carries the network towards its saturated version. Is that what
# happens in a small model that we train here, and is it the *norm* that does it?
#
# The grid and the log near the end come from `paper/`, which lies beside the library in the
# repository and is not part of the installed package. In Colab, first run the following, with the
# address of the repository that this notebook comes from; nothing is downloaded after that. The
# notebook takes about a minute on one thread of a CPU.
#
# ```
# !git clone ADDRESS checkout
# %cd checkout/tutorials
# %pip install -e ..
# ```

# %%
import copy
import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sat_lens as sl
from sat_lens.demo.corpus import held_out_texts, training_texts

CONTEXT, BATCH, STEPS = 64, 16, 1024


def characters(texts, most=2_000_000):
    data = b"".join(text.encode("ascii", "replace") for text in texts)[:most]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def windows(stream, count, generator):
    starts = torch.randint(len(stream) - CONTEXT, (count, 1), generator=generator)
    return stream[starts + torch.arange(CONTEXT)]


train_text, held_out = characters(training_texts()), characters(held_out_texts())
fixed = windows(held_out, 16, torch.Generator().manual_seed(1))
print(len(train_text), "characters to train on;", tuple(fixed.shape), "to measure on")

# %% [markdown]
# ## Train, and follow it
#
# The model has the shape of a small Llama: two layers of four heads, width 64, a token a character.
# The text is the source of Python's standard library. AdamW runs at a constant learning rate
# *without* weight decay, so that nothing but the gradient moves the norm.
#
# `SaturationTracker.step(model, step)` is called after every step and decides itself when to
# measure: norms at powers of two and half-way between them, saturation at powers of two. It changes
# nothing of the run. `budget=None` lets it measure whenever it wants to; by default it keeps to 2%
# of the time, which a toy's short steps do not allow for. (With the Trainer of Hugging Face it goes
# into `callbacks`.) We also keep copies of the model.

# %%
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
generator = torch.Generator().manual_seed(0)
tracker = sl.SaturationTracker(data=fixed, budget=None)
checkpoints = {0: copy.deepcopy(model)}
tracker.step(model, 0)

for step in range(1, STEPS + 1):
    tokens = windows(train_text, BATCH, generator)
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if tracker.step(model, step):
        checkpoints[step] = copy.deepcopy(model)

tracker.close()
columns = ["norm", "loss", "loss_saturated", "cos_saturated", "cos_random", "S", "lean"]
tracker.frame()[columns].dropna().round(3)

# %% [markdown]
# `S` is the cosine between the residual streams of the soft and the saturated model, beyond what
# random keys give (0: no better than random keys; 1: the same; it has no lower bound). `lean` is
# the mean over heads: 0 is uniform attention, 1 is one key.
#
# ## The square root
#
# **Prediction.** Suppose that each step goes at a right angle to the parameters and has the same
# length. Then $|\theta_t|^2 = |\theta_0|^2 + a t$. So it is not the norm that goes with the square
# root of the step but the norm *with the initial norm taken out*, $\sqrt{|\theta_t|^2 -
# |\theta_0|^2}$: its exponent should be near 1/2, and that of the raw norm well below.
#
# `norm_growth` takes checkpoints on disk, of the hub, or in memory as here.

# %%
growth = sl.norm_growth(checkpoints, fixed, progress=False, data_name="held-out text")
print("raw norm:              ", growth.raw_exponent)
print("initial norm taken out:", growth.exponent)

# %%
growth.plot(
    "Norms of the model trained here", columns=["norm", "norm_grown", "qk_product", "ov_product"]
)

# %% [markdown]
# It held. Both axes are logarithmic: the raw norm seems to start to grow only late, because the
# initial norm hides what is added to it, and the norm with the initial part taken out (`norm
# grown`) is near a straight line of slope 1/2 from step 32 on. Anyone who fits a power law to the
# raw norm measures mostly how large the initialisation was.
#
# The other two lines are means over heads of $|W_Q W_K^\top|$ and $|W_V W_O|$. Scores know queries
# and keys only by that product: a head may have its $W_Q$ doubled and its $W_K$ halved, which
# changes raw norms and no output.
#
# **Prediction.** If all parameters grew alike, by a factor g, the products of two would grow by
# g². What attention needs to sharpen is the first product, so it should grow by more than that.

# %%
frame = growth.frame()
parts = [name for name in frame if name.startswith("norm_") and name != "norm_grown"]
squares = frame[parts].iloc[[0, -1]] ** 2
factors = frame.iloc[-1] / frame.iloc[0]
print(f"all parameters: times {factors['norm']:.2f}, and {factors['norm'] ** 2:.1f} is its square")
print(f"W_Q W_K times {factors['qk_product']:.0f}, W_V W_O times {factors['ov_product']:.1f}")
squares.div(squares.sum(axis=1), axis=0).round(2)

# %% [markdown]
# It held by far. The table says what the norm of all parameters is made of, as shares of its
# square: at first nearly all of it is the gains of the layer norms, which start at 1. The one
# number that the law is about says next to nothing about attention here.
#
# ## Which way does it go?
#
# **Predictions.** The argument for the square root can be tested. If steps go at right angles to
# the parameters, the displacement from one checkpoint to the next is so too (`alignment` near
# 0), and all growth comes from such steps. If they are independent of each other, the path is no
# straighter than a random walk (`straightness` near `random_walk`). Last, the paper says that the
# direction of the parameters converges: then they turn by fewer degrees with each doubling of
# steps.

# %%
way = frame[["alignment", "straightness", "random_walk", "rotation_per_doubling"]].loc[2:]
now, angle = frame["norm"], np.radians(frame["rotation_per_doubling"])
half = now.reindex(frame["rotation_from"]).set_axis(now.index)
sideways = now**2 + half**2 - 2 * now * half * np.cos(angle)  # squared length of the way
way["at_right_angles"] = sideways / (now**2 - half**2)
way.loc[[2, 8, 32, 128, 256, 512, 1024]].round(2)

# %% [markdown]
# None of the three held. The path is far straighter than a random walk, and it leads outwards: in
# the last doubling steps at right angles make about a third of the growth (`at_right_angles`), the
# rest is from steps that point away from the origin. And the turning per doubling rises and stays;
# the cosine of neighbouring checkpoints would have hidden that, because it rises towards 1 for a
# random walk too. So the exponent is as predicted, but the reason given for it is wrong.
#
# ## Norm and saturation against each other
#
# **Prediction.** If growth carries the model towards its saturated version, then every measure of
# saturation rises with the norm: the raw cosine to the saturated model, S and lean.

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for name, words in [
    ("cos_saturated", "cosine to saturated"),
    ("cos_random", "cosine to random keys (control)"),
    ("S", "S: beyond the control"),
    ("lean", "lean of the heads"),
]:
    style = "--" if name == "cos_random" else "-o"
    axes[0].plot(frame["norm"], frame[name], style, ms=3, label=words)
axes[0].axhline(0, color="#BBBBBB", lw=0.8)
axes[0].legend(frameon=False, fontsize=8)
axes[0].set_title("similarity to the saturated model", size=9)
cost = frame["loss_saturated"] - frame["loss"]
axes[1].plot(frame["norm"], cost, "-o", ms=3, color="C3")
for step in (32, 128, 256, 512, STEPS):
    place = (frame["norm"][step], cost[step])
    axes[1].annotate(f"step {step}", place, (5, -10), textcoords="offset points", fontsize=8)
axes[1].set_title("what saturating costs, nats per character", size=9)
axes[1].set(xlim=(None, 31.5), ylim=(-0.025, None))
for panel in axes:
    panel.set_xlabel("norm of all parameters (training goes to the right)")
plt.show()

late = frame.loc[128:]
late.loc[[128, STEPS], ["cos_saturated", "cos_random", "S", "lean"]].round(3)

# %% [markdown]
# It held for lean. It held for S only while the model learned to attend at all: S jumps about
# before, and is nearly level after. It failed for the raw cosine, which is highest early and then
# *falls* while the norm goes on growing. The dashed line says why: early in training random keys do
# as well, because attention hardly counts yet. S is made to correct for that.
#
# The right panel is a warning against the word "near". Heads come nearer to saturated ones, and yet
# saturating them costs more and more, since the model depends more and more on what they do.
#
# ## Is it the norm?
#
# The two grow together, but so do all things in training. The library can set the norm by hand:
# `scaled_parameters` multiplies parameters for as long as its block lasts. (`lens_model` shows a
# Hugging Face model to TransformerLens, without a copy.)
#
# **Prediction.** If the norm as such were the cause, then the *initial* model, with its parameters
# multiplied until it has the norm of the trained one, would lean like the trained one, and the
# trained model taken back to the initial norm would not lean at all. Queries and keys are given the
# same test alone: the factor makes the mean norm of $W_Q W_K^\top$ over heads the other model's.

# %%
by_norm = factors["norm"]
by_qk = math.sqrt(factors["qk_product"])


def measured(step, factor=1.0, which="all"):
    lens = sl.norms.lens_model(checkpoints[step])
    with sl.scaled_parameters(lens, factor, which=which):
        return sl.norms.saturation_measures(lens, fixed)


scaled = pd.DataFrame(
    {
        "initial": measured(0),
        f"initial, all x {by_norm:.2f}": measured(0, by_norm),
        f"initial, queries and keys x {by_qk:.2f}": measured(0, by_qk, "qk"),
        "trained": measured(STEPS),
        f"trained, all / {by_norm:.2f}": measured(STEPS, 1 / by_norm),
        f"trained, queries and keys / {by_qk:.2f}": measured(STEPS, 1 / by_qk, "qk"),
    }
).T
scaled[["lean", "S", "loss"]].round(3)

# %% [markdown]
# Half of it held. The norm is *needed*: with less of it trained heads flatten, and are nearly
# uniform again when queries and keys alone go back to their initial size. It is not *enough*: the
# initial model's random directions, as large as the trained ones, lean far less, and S stays near
# 0. So training adds more than size: the product $W_Q W_K^\top$ comes to point where keys differ.
# The norm of all parameters together says least.
#
# ## All parameters times c is not saturated attention
#
# The paper's saturated network is the limit of *all* parameters times c. The library's `saturate`
# multiplies the scores of attention, and nothing else. Here queries and keys have no biases and no
# norms of their own, so multiplying them by c multiplies scores by c², and the two ways agree.
#
# **Predictions.** Queries and keys times c end at the exact limit. All parameters times c end
# elsewhere, because the parts of the network do not grow alike: an embedding grows like c,
# attention's output like c³ (a norm's gain, values, output), an MLP's like c⁵ (a gain on each of
# two branches, three matrices). As a test of that explanation we take the hardening of attention
# back: all parameters times c multiplies scores by c⁴, so we multiply them by c⁻⁴. If attention is
# not what changes the model, this should not help.

# %%
lens = sl.norms.lens_model(checkpoints[STEPS])
PARTS = {"embedding": "hook_embed"} | {
    f"{words}, layer {layer}": f"blocks.{layer}.hook_{name}_out"
    for layer in (0, 1)
    for name, words in (("attn", "attention"), ("mlp", "MLP"))
}


def activations(c=1.0, which="all", scale=1.0):
    with torch.no_grad(), sl.scaled_parameters(lens, c, which), sl.saturate(lens, scale=scale):
        return lens.run_with_cache(fixed)[1]


def cosine(cache):
    last = "blocks.1.hook_resid_post"
    return float(torch.cosine_similarity(cache[last], trained[last], dim=-1).mean())


trained = activations()
limit = cosine(activations(scale=math.inf))
cosines, sizes = {}, {}
for c in (1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 1000):
    everything = activations(c)
    cosines[c] = {
        "queries and keys times c": cosine(activations(c, "qk")),
        "all parameters times c": cosine(everything),
        "all times c, scores times c⁻⁴": cosine(activations(c, scale=c**-4.0)),
    }
    sizes[c] = {words: float(everything[name].norm()) for words, name in PARTS.items()}
cosines, sizes = pd.DataFrame(cosines).T, pd.DataFrame(sizes).T
degrees = np.log10(sizes.loc[1000] / sizes.loc[100])
print("exact limit of attention:", round(limit, 3))
print("times 1000:", cosines.loc[1000].round(3).to_dict())

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (road, values), style in zip(cosines.items(), ("-o", "-o", "--"), strict=True):
    axes[0].semilogx(values, style, ms=3, label=road)
axes[0].axhline(limit, color="#888888", ls=":", label="exact limit of attention")
axes[0].set_title("cosine to the trained model, after the last layer", size=9)
axes[0].set_ylim(0, 1.02)
for words, style in zip(PARTS, ("k-", "C0-", "C1-", "C0--", "C1--"), strict=True):
    axes[1].loglog(sizes[words], style, label=f"{words}: degree {degrees[words]:.2f}")
axes[1].set_title("size of what each part adds, all parameters times c", size=9)
for panel in axes:
    panel.set_xlabel("c")
    panel.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# All three held. Queries and keys end at the exact limit; all parameters end at a network that has
# little to do with the trained one, and undoing the hardening of attention restores hardly any of
# it. By then attention outweighs the embedding, and the MLPs outweigh both. So similarity to the
# network at c = 1000 does not say how saturated attention is; [a pitfall of its
# own](../docs/pitfalls/scaled_parameters.md).
#
# ## Learning rate and weight decay
#
# `growth_grid` trains one small model per cell, all cells together (on the command line: `python -m
# paper grid --lr 1e-4:1e-1:10 --wd 0:1:10`). Here twenty models of width 16 take 200 steps of
# AdamW.
#
# **Predictions.** Norms grow where the learning rate is large enough to get anywhere in 200 steps,
# and less with more weight decay. Over the cells, more growth goes with more lean.

# %%
import sys

sys.path.insert(0, "..")  # the repository, where paper/ is

from paper.grid import growth_grid
from paper.network import Shape

grid = growth_grid(
    [1e-4, 1e-3, 3e-3, 1e-2, 1e-1],
    [0.0, 1e-2, 1e-1, 1.0],
    steps=200,
    shape=Shape(width=16, heads=2),
    progress=False,
)
cells = grid.frame()
grid.plot()

# %% [markdown]
# Vermilion: the norm grew; blue: it shrank; white: it stayed. The colour is a ratio, on a
# logarithmic scale that ends at a factor of four.

# %%
rank = cells["growth"].rank().corr(cells["lean"].rank())
print(f"rank correlation of growth and lean over {len(cells)} cells: {rank:.2f}")
best_rate = cells[cells["lr"] == 1e-2].set_index("wd")
fall = best_rate["start_loss"] - best_rate["loss"]
best_rate["share_of_fall"] = fall / fall.max()
best_rate[["growth", "lean", "loss", "share_of_fall"]].round(3)

# %% [markdown]
# Both held. But look at the last row of the table, which is for the learning rate with the least
# losses: with a weight decay of 1 the norm *shrank* and attention stayed uniform, and yet the loss
# fell by more than nine tenths of what it fell elsewhere. As far as models this small get in 200
# steps, which is not far, the loss does not demand growth and saturation; the optimiser adds them
# where weight decay lets it.
#
# ## The demo model's own run
#
# The demo model comes with the log of its training: 6,000 steps of AdamW with a warm-up, a cosine
# decay of the learning rate to zero, and a weight decay of .1. There the square root cannot last.
# What it says is that each step adds the same amount to the squared norm. Let that amount be
# proportional to the square of the learning rate $\eta_t$, and let weight decay $\lambda$ take its
# share:
#
# $$|\theta_{t+1}|^2 = (1 - \eta_t \lambda)^2 |\theta_t|^2 + a \eta_t^2.$$
#
# **Prediction.** With its one free number $a$ taken from the norm at step 512, this gives the rest
# of the run: a peak between steps 2,000 and 3,000, then a fall.

# %%
from paper.demo_training import LOG, Recipe, learning_rate_at

log = json.loads(LOG.read_text())
recipe = Recipe(**log["recipe"])
demo = pd.DataFrame(log["steps"]).set_index("step")
demo["lean"] = [np.mean([head["lean"] for head in heads.values()]) for heads in demo["heads"]]
rates = [learning_rate_at(step, recipe) for step in range(recipe.steps)]


def norms_by_rule(a, decay=recipe.weight_decay, rates=rates):
    squares = [demo["norm"][0] ** 2]
    for rate in rates:
        squares.append((1 - rate * decay) ** 2 * squares[-1] + a * rate**2)
    return np.sqrt(squares)


# The square of the norm is linear in a.
base, unit = norms_by_rule(0.0)[512] ** 2, norms_by_rule(1.0)[512] ** 2
a = (demo["norm"][512] ** 2 - base) / (unit - base)
predicted = norms_by_rule(a)
peak = demo["norm"].idxmax()
print(f"peak: predicted {predicted.max():.1f}, step {predicted.argmax()}; ", end="")
print(f"measured {demo['norm'].max():.1f}, step {peak} (checkpoints are half an octave apart)")
print(f"end: predicted {predicted[-1]:.1f}, measured {demo['norm'][6000]:.1f}")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
axes[0].semilogx(demo.index[1:], demo["norm"].iloc[1:], "o", ms=4, label="measured")
axes[0].semilogx(range(1, recipe.steps + 1), predicted[1:], "-", label="rule, a from step 512")
root = np.sqrt(predicted[0] ** 2 + (predicted[512] ** 2 - predicted[0] ** 2) * demo.index[1:] / 512)
axes[0].semilogx(demo.index[1:], root, "--", color="#888888", label="square root of the step")
axes[0].axvline(512, color="#CCCCCC", lw=0.8)
axes[0].set(xlabel="step", ylim=(30, 190))
axes[0].set_title("norm of the demo model", size=9)
demo_cost = demo["loss_saturated"] - demo["loss"]
axes[1].plot(demo["norm"], demo["lean"], "-o", ms=3, label="lean of the heads")
axes[1].plot(demo["norm"], demo_cost, "-s", ms=3, color="C3", label="cost of saturating, nats")
axes[1].set_xlabel("norm of all parameters")
axes[1].set_title("lean, and what saturating costs, against the norm", size=9)
for panel in axes:
    panel.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# It held: with one number from step 512 (the grey line), the rule puts the peak 6% too high and the
# end 1% too high. The square root is what remains of it at a constant learning rate without weight
# decay, the setting of our own run above.
#
# On the right, the demo model's heads get most of their lean while the norm grows by a quarter, and
# little more while it doubles; the cost of saturating them keeps rising, even when the norm falls.
#
# **In short.** Norms grew like the square root of the step where nothing but steps moved them,
# though not for the reason given. Heads leaned more as norms grew, and needed them for it; but a
# large norm alone made them lean little, most of the lean came early, and a raw cosine would have
# told the story the wrong way round. All this is of two small models, one seed each.
#
# ## Exercises
#
# 1. Which component of the trained model carries most of the growth of the *squared* norm? Is it
#    the one that makes attention sharp?
# 2. Is the growth of `qk_product` a power law? Fit its exponent on two ranges of steps.
# 3. By the rule, what norm would the demo model have ended with without weight decay? And with
#    weight decay, had its learning rate stayed at its maximum?
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1: the MLPs; queries and keys, which make attention sharp, have a fifth
# added = squares.iloc[1] - squares.iloc[0]
# print((added / added.sum()).sort_values().round(2))
#
# # 2: no; it jumps while heads find what to look at, then slows
# early, later = growth.fit("qk_product", 32, 181), growth.fit("qk_product", 181, STEPS)
# print(early, later, sep="\n")
#
# # 3: the second is a balance, sqrt(a * rate / (2 * decay))
# without_decay = norms_by_rule(a, decay=0.0)[-1]
# constant = norms_by_rule(a, rates=[recipe.learning_rate] * recipe.steps)[-1]
# balance = math.sqrt(a * recipe.learning_rate / (2 * recipe.weight_decay))
# print(without_decay, constant, balance)
# ```
#
# </details>
