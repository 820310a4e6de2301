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
# # 6. Merrill et al. 2021, figure by figure
#
# **Question.** "Effects of Parameter Norm Growth During Transformer Training" ([arXiv
# 2010.09697](https://arxiv.org/abs/2010.09697)) is the paper that this library grew out of. Which
# of its claims hold on a small language model trained here, which need a correction, and which do
# not hold?
#
# `python -m paper` redoes each figure and computes its verdict: *holds*, *holds with a correction*
# or *does not hold here*, by a rule that stands beside the numbers. The verdicts that count are
# those of full runs, on [the page on the paper](../docs/paper.md). Full runs take ten minutes, so
# this notebook calls the functions behind the command with smaller models and fewer steps, enough
# to see what each figure shows. Where a verdict differs from that of the full run we say so. "Here"
# means one small model, one seed, and the source of Python's standard library as text.
#
# The figures are redone by `paper/`, which lies beside the library in the repository and is not
# part of the installed package. In Colab, first run the following, with the address of the
# repository that this notebook comes from; nothing is downloaded after that.
#
# ```
# !git clone ADDRESS checkout
# %cd checkout/tutorials
# %pip install -e ..
# ```

# %%
import sys
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

sys.path.insert(0, "..")  # the repository, where paper/ is

import sat_lens as sl
from paper import direction, grid, heads, language, saturation, scaling, threshold
from paper import norm_growth as growth_figure
from paper.degrees import part_degrees
from paper.flow import descend, norm_flow
from paper.grid import growth_grid, growth_maps
from paper.network import Shape, log_spaced_steps, masked, scores_of
from paper.threshold import flipped_problem, relu_network

plt.rcParams["figure.dpi"] = 80
verdicts = {}


def show(figure, claims):
    verdicts[figure] = claims
    for claim in claims:
        print(f"[{claim.verdict}] {claim.text}")
        print(textwrap.fill(claim.why, 96, initial_indent="    ", subsequent_indent="    "))


def draw(panel, title, table, names, control=None):
    for name, words in names.items():
        panel.plot(table.index, table[name], "--" if name == control else "-o", ms=3, label=words)
    panel.set(title=title, xlabel="step")
    panel.legend(frameon=False, fontsize=8)


setting = language.Setting(steps=1024, layers=2, heads=4, context=64, batch=8, files=100)
run = language.train(setting, seed=0, progress=False)
print(setting)

# %% [markdown]
# ## 1. The norm grows like the square root of the step
#
# **The claim.** The norm of T5's parameters grows during training in proportion to the square root
# of the number of steps.
#
# **What we measure.** The norm of all parameters at log-spaced steps, AdamW at a constant learning
# rate without weight decay; the exponent over the last five doublings, raw and with the initial
# norm taken out, $\sqrt{|\theta_t|^2 - |\theta_0|^2}$.
#
# **Prediction.** Not raw, since the initial norm hides the growth; with the initial norm taken out,
# yes.

# %%
growth = sl.norm_growth(
    {step: run.checkpoints[step] for step in log_spaced_steps(run.last, halves_from=16)},
    run.tokens,
    progress=False,
    data_name="held-out text",
)
show("norm-growth", growth_figure.judged(growth))

grown = growth.frame()["norm_grown"].loc[[32, 64, 128, 256, 512, 1024]]
print("\nexponent by doubling:", np.log2(grown).diff().dropna().round(2).to_dict())

# %%
norms = growth.frame()[["norm", "norm_grown"]].loc[1:]
norms["root"] = norms["norm_grown"].iloc[-1] * np.sqrt(norms.index / norms.index[-1])
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
named = {"norm": "raw", "norm_grown": "initial norm taken out", "root": "square root of the step"}
draw(axes, "norm of all parameters", norms, named, control="root")
axes.set(xscale="log", yscale="log", ylim=(0.5, None))
plt.show()

# %% [markdown]
# Half of the prediction failed: with the initial norm taken out the exponent is above the rule's
# margin around 1/2. The last line says why a verdict on a short run has to be read with care: the
# exponent is no constant here. It goes up and down above 1/2, and falls below it in the last
# doubling. In the full run, which is longer and of a larger model, the average over five doublings
# is a square root, and the verdict is *holds with a correction*. [Tutorial
# 4](04_norm_growth_and_saturation.ipynb) shows what weight decay and a decaying learning rate make
# of it.
#
# ## 2. The direction of the parameters converges
#
# **The claim.** While the norm grows, the direction of the parameters comes to rest: the cosine of
# successive checkpoints rises towards 1.
#
# **What we measure.** That cosine at equal spaces in steps, beside the cosine that independent
# steps of the same lengths would give; degrees turned while the steps double; and whether the path
# is straighter than a random walk.
#
# **Prediction.** The cosine rises for anything whose norm grows, so it will rise. A direction that
# converges turns less with each doubling; we expect a slowing at best.

# %%
equal = direction.successive(run)
doubling = growth.frame()[["rotation_per_doubling", "straightness", "random_walk"]]
show("direction", direction.judged(equal, doubling))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
named = {"cosine": "measured", "independent": "independent steps"}
draw(axes[0], "cosine of successive checkpoints", equal, named, control="independent")
draw(axes[1], "turning", doubling, {"rotation_per_doubling": "degrees per doubling"})
named = {"straightness": "measured", "random_walk": "random walk"}
draw(axes[2], "straightness", doubling, named, control="random_walk")
for panel in axes[1:]:
    panel.set_xscale("log")
plt.show()

# %% [markdown]
# The prediction held. A path of independent steps would give rising cosines as well (dashed, on the
# left), so that their rise is no evidence of convergence. Per doubling of steps the model still
# turns by some 15 degrees, less than it did at most; the rule calls that slowing, a correction. In
# the full run it does not slow, and the verdict is *does not hold here*. What can be said of both
# runs is that the path is straighter than a random walk.
#
# ## 3. Training brings a network near its saturated version
#
# **The claim.** Trained transformers are close to their saturated version, randomly initialised
# ones are far from it; closeness is a cosine of their representations.
#
# **What we measure.** The residual stream of the soft network against that of the exactly saturated
# one, beside random keys in place of the saturated ones. S is the cosine beyond that control.
#
# **Prediction.** S and lean rise. The raw cosine is high already where attention counts for little,
# for random keys as well.

# %%
table = growth.frame()[list(saturation.MEASURES)]
show("saturation", saturation.judged(table))

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
named = {"cos_saturated": "saturated", "cos_random": "random keys (control)"}
draw(axes[0], "cosine to the soft network", table, named, control="cos_random")
draw(axes[1], "beyond the control", table, {"S": "S", "lean": "lean of the heads"})
draw(axes[2], "loss, nats per token", table, {"loss": "soft", "loss_saturated": "saturated"})
for panel in axes:
    panel.set_xscale("symlog", linthresh=1)
plt.show()

# %% [markdown]
# The prediction held, and so does the claim if the first step is compared with the last. But the
# raw cosine is no way to see it: it is highest around step 32, where heads are nearly uniform (lean
# is close to 0) and random keys do just as well. S is missing there, because the control leaves no
# room below 1, and erratic beside it for the same reason; lean depends on no control.
#
# ## 4. Parameters times c
#
# **The claim.** As all parameters are multiplied by a growing c, a network approaches its saturated
# version, and a trained network starts out nearer than a random one.
#
# **What we measure.** Cosine to the network at c = 1000 against c: once with all parameters
# multiplied, once with $W_Q$ and $W_K$ alone, which multiplies scores by the square of c and
# touches nothing else.
#
# **Prediction.** Convergence with c, yes. But multiplying everything changes far more than
# attention, so "nearer" should hold for attention alone and be unclear for all parameters.

# %%
scaled = scaling.measured(run, progress=False)
show("scaling", scaling.judged(scaled))

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for panel, grown_by in zip(axes, (scaling.ALL, scaling.SCORES), strict=True):
    for colour, network in (("C0", scaling.TRAINED), ("C1", scaling.RANDOM)):
        rows = scaled[(scaled["grown"] == grown_by) & (scaled["network"] == network)]
        panel.plot(rows["c"], rows["cos_saturated"], "-o", ms=3, color=colour, label=network)
        words = f"{network}, random keys"
        panel.plot(rows["c"], rows["cos_random"], "--", color=colour, label=words)
    panel.set(xscale="log", xlabel="c", ylabel="cosine to c = 1000", title=f"{grown_by} times c")
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# The prediction held. With all parameters multiplied, the cosine at c = 1 is as low as with random
# keys (dashed): what is reached at c = 1000 has little to do with the model as it was trained. At c
# = 2 the trained network is far nearer than the random one, so the verdict depends on where on this
# curve a model happens to stop. [A page of its own](../docs/pitfalls/scaled_parameters.md) says
# why.
#
# ## 5. Two kinds of saturated heads, and the mask
#
# **The claim.** Once saturated, some heads attend to one position or a few, others average over
# many.
#
# **What we measure.** For each head, the number of positions with weight when parameters are
# multiplied by 1000, as in the paper. The code published with the paper masks the future by
# *multiplying scores by zero* (`src/si_transformer.py` of viking-sudo-rm/norm-growth at `bca0576`).
# Zero is not minus infinity: where all visible scores of a row are negative, the zeros of the
# future win, and share the row among them. So we train two small networks that differ in the mask
# alone, and put the right mask on the scores of the first.
#
# **Prediction.** The language model, whose mask is right, has heads of the first kind only, because
# scores of trained models are not tied. The multiplied mask gives heads of the second kind, which
# vanish with the right mask on the very same scores.

# %%
setting = heads.MaskSetting(Shape(width=32, context=32), steps=600, batch=8)
networks = {mask: heads.trained_network(setting, mask, progress=False) for mask in heads.MASKS}
text = heads.held_out_windows(setting, seed=0)
positions, losses = heads.measured(run, networks, text)
show("heads", heads.judged(positions, losses))

# %%
multiplied = networks["multiplied"]
with torch.no_grad(), sl.scaled_parameters(multiplied, 1000.0):
    scores = scores_of(multiplied, text)[1][0, 0]
ways = [
    ("multiplied", heads.OWN, "o"),
    ("multiplied", heads.RIGHT, "s"),
    ("infinite", heads.OWN, "D"),
]

figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
for size, (trained_with, way, marker) in zip((9, 6, 3), ways, strict=True):
    chosen = (positions["trained_with"] == trained_with) & (positions["masked_by"] == way)
    dots = positions[chosen]
    axes[0].plot(dots["head"], dots["positions"], marker, ms=size, label=f"{trained_with}, {way}")
axes[0].set(title="positions per saturated head", yscale="log", ylim=(0.8, 100))
axes[0].legend(frameon=False, fontsize=8, loc="upper left")
axes[1].set_title("L1H0, scores multiplied by zero")
axes[2].set_title("L1H0, the same scores, -inf")
for panel, shown in zip(axes[1:], (scores, masked(scores, "infinite")), strict=True):
    panel.imshow(shown.softmax(-1), cmap="Blues", vmin=0, vmax=0.3)
    panel.set(xlabel="key", ylabel="query")
plt.show()

# %% [markdown]
# The prediction held, and the pictures are the finding. In the middle a head averages over all that
# it must not see, over many positions in early rows; on the right are the very same scores with the
# right mask, and it attends to one. On the left, the heads that attend to many positions (blue)
# come down to one when nothing but the mask changes (orange), and do not appear after training with
# the right mask (green). The multiplied mask does not even hide the future: another row's future
# changes the loss, and the low loss of that network comes from reading ahead.
#
# What follows, and what does not. In small models of ours this mask is *sufficient* to make heads
# that seem to average over many positions once saturated. It does not follow that every such head
# in the paper comes from it: we have not run the authors' models, and ours are two small networks,
# one seed, trained for 600 steps here (the full run: 1500, same verdicts). Nor does it touch heads
# that are *soft* means: those exist (see [tutorial 5](05_counting.ipynb)), and saturating them
# destroys them, because their scores are close and not tied. The
# [pitfall](../docs/pitfalls/multiplicative_masks.md) says how to test a model for such a mask.
#
# ## 6. Where norms grow: learning rate and weight decay
#
# **The claim.** Over a wide range of learning rates, under AdamW as under SGD, norms grow up to
# usual amounts of weight decay; enough weight decay ends growth.
#
# **What we measure.** End norm over start norm of small models for both optimisers, 200 steps each
# (the full run: 500, larger models, ten by ten).
#
# **Prediction.** AdamW's steps have a length that does not depend on the gradient's, so norms grow
# wherever the learning rate is large enough. SGD's steps become small with the gradient while its
# weight decay does not, so norms grow in few cells.

# %%
maps = [
    growth_grid(
        rates, [0.0, 1e-3, 1e-2, 1e-1, 1.0], optimiser=optimiser, steps=200,
        shape=Shape(width=16, heads=2), progress=False,
    )
    for optimiser, rates in [
        ("adamw", [1e-4, 1e-3, 3e-3, 1e-2, 1e-1]),
        ("sgd", [1e-3, 1e-2, 1e-1, 3e-1, 1.0]),
    ]
]  # fmt: skip
show("grid", [claim for each in maps for claim in grid.judged(each.optimiser, each.frame())])

# %%
growth_maps(maps, "Where norms grow, by learning rate and weight decay")

# %% [markdown]
# Vermilion: the norm grew; blue: it shrank; white: it stayed. The prediction held: under SGD
# without momentum growth needs a large learning rate and next to no decay. With a small learning
# rate 200 steps move nothing, under either optimiser; longer training may.
#
# ## 7. The first version's claim: a threshold
#
# **The claim.** The abstract of the paper's first version says that gradient descent increases the
# norm up to a threshold, which itself rises with training accuracy.
#
# **What we measure.** Bias-free ReLU networks on labels of which a share was flipped, so that
# accuracy is limited and the norm at which growth stops is known; and a language model, where it is
# found by trying which multiple of the parameters has the least loss.
#
# **Prediction.** Where accuracy stays below 1 there has to be a threshold: a larger norm makes
# mistakes cost more. Where it reaches 1, growth never stops.

# %%
plan = threshold.Plan(
    depths=(2,), flipped=(0.0, 0.1, 0.2, 0.3, 0.4), seeds=1, points=500, steps=4096, model_steps=512
)
stopping = threshold.reproduce(quick=True, progress=False, plan=plan)
show("threshold", stopping.claims)

# %%
stopping.figure

# %% [markdown]
# Filled: the norm; open: the norm at which growth would stop. The prediction held on the
# constructed problems: where accuracy stayed below 1 the norm sits on its threshold, which is
# higher where accuracy is, and with accuracy 1 there is none and the norm grows on. In one run of
# four it had not come to rest: it sits on its threshold, and the threshold moves, because the
# direction does.
#
# The language models stay within a few per cent of theirs, and it rises as they learn. Read that
# with care: under SGD the norm grew by a tenth in all, so that a few per cent are not little. What
# is plain is that growth stopped at no accuracy which these runs reached. Longer runs, and deeper
# networks, are on the page on the paper.
#
# ## 8. What the theory takes for granted
#
# **The claim.** The argument from growth to saturation rests on homogeneity: multiply all
# parameters by c, and the output is multiplied by a power of c, its degree. A transformer is said
# to be homogeneous approximately. For what is homogeneous, Euler's theorem gives the growth of the
# squared norm under gradient flow from the outputs alone.
#
# **What we measure.** The degree of each part of our language model, with what a power law does not
# explain (`residual`), its parameters multiplied by 1 to 64; Euler's formula against gradient
# descent with ever smaller steps; and the norm at the end of descent with weight decay, where
# growth and decay should balance.
#
# **Predictions.** A norm has degree 1, that of its gain; attention has degree 2 once saturated, and
# none while it is soft; a gated feed-forward layer has 3, nearly. The residual stream adds parts of
# different degree, so it has none, and turns as c grows. Euler's formula is exact without biases
# and wrong with them. The norm falls with weight decay, and always ends where the two balance.

# %%
parts = part_degrees(run.lens(run.last), run.tokens[:4])
print("cosine of the output with that at c = 1:")
print(parts.degrees["output"].frame()["cosine"].round(2).to_dict())
parts.frame()[["degree", "at_largest", "residual", "cosine"]].round(3)

# %%
x, labels = flipped_problem(500, 0.1, seed=0)


def logistic(outputs):
    return F.softplus(-labels * outputs[:, 0]).mean()


torch.manual_seed(0)
with_biases = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
euler = {
    "2 layers": norm_flow(relu_network([2, 4, 1], seed=0), x, logistic).error,
    "3 layers": norm_flow(relu_network([2, 4, 4, 1], seed=0), x, logistic).error,
    "2 layers with biases": norm_flow(with_biases, x, logistic, degree=2).error,
}
print("relative error of Euler's formula:", {name: f"{error:.0e}" for name, error in euler.items()})

descents = {
    decay: descend(
        relu_network([2, 4, 1], seed=0), x, logistic,
        steps=4096, learning_rate=0.3, weight_decay=decay, degree=2,
    ).frame()
    for decay in (0.003, 0.01, 0.03, 0.1, 0.3)
}  # fmt: skip
ends = pd.DataFrame({decay: frame.iloc[-1] for decay, frame in descents.items()}).T
print(
    ends[["norm", "stationary", "gradient", "decay", "loss"]].rename_axis("weight decay").round(4)
)

# %%
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for number, (decay, frame) in enumerate(descents.items()):
    axes.plot(frame["norm"].loc[1:], "-", color=f"C{number}", label=f"weight decay {decay:g}")
    axes.plot(frame["stationary"].loc[1:], ":", color=f"C{number}")
axes.set(title="norm, and where it would stop (dotted)", xscale="log", xlabel="step")
axes.legend(frameon=False, fontsize=8, loc="center right", bbox_to_anchor=(1, 0.3))
plt.show()

# %% [markdown]
# The predictions held. Attention and feed-forward layer near degrees 2 and 3 as c grows, because
# softmax and gate harden; with attention saturated the degree is exact. The residual stream has
# none: its degree becomes that of its fastest part, the feed-forward layers with their norms, and
# its direction at c = 64 has little to do with that at c = 1. That is what happened on the left of
# figure 4. So "approximately homogeneous" can be said of small changes of c: at c = 2 the cosine of
# the output is .79 already, and while the model trained its norm more than tripled.
#
# Euler's formula is exact to the precision of the extrapolation where there are no biases. Growth
# stops where it balances decay. At a decay of .3 the balance is at zero: near zero both go with the
# square of the norm when the degree is 2, so a decay that wins there wins everywhere.
#
# ## All verdicts

# %%
overview = pd.DataFrame(
    [
        {"figure": figure, "verdict": claim.verdict, "claim": textwrap.shorten(claim.text, 88)}
        for figure, claims in verdicts.items()
        for claim in claims
    ]
).set_index("figure")
print(overview["verdict"].value_counts().to_string(), "\n")
with pd.option_context("display.max_colwidth", None, "display.width", 150):
    print(overview.to_string())

# %% [markdown]
# **In short.** Norms grow, and attention hardens with training: that holds, with the initial norm
# taken out and with a control beside each cosine. The convergence of the direction, the raw cosine
# as a measure, and saturation by multiplying all parameters do not carry the weight that is put on
# them. Heads that average over many positions once saturated did not appear here without the wrong
# mask. Two verdicts, on the square root and on the direction, differ between this short run and the
# full one, so treat them as open. All of it is on small models; nothing here contradicts what was
# measured on T5. The page on the paper has two neighbouring results as well: attention that narrows
# to distinct tokens ("scan and snap"), and how much of a norm is mere rescaling of weight pairs.
#
# ## Exercises
#
# 1. The rule of figure 1 fits the last five doublings. Fit the last two. What is the verdict by the
#    same margin of .1, and which of the two fits would you report?
# 2. Multiply queries and keys alone (`which="qk"`). Which degree has attention now, soft and
#    saturated? What does that say about the two panels of figure 4?
# 3. How many keys does a saturated head attend to in the demo model, at the exact limit? Count them
#    for all heads at once, in rows of at least 8 visible keys.
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1: a range that is chosen after looking can give any verdict; report the one stated before
# late = growth.fit("norm_grown", first=256)
# print(late, abs(late.value - 0.5) <= 0.1)
#
# # 2: soft, none; saturated, 0: only which key wins counts. So on the right nothing but attention
# # moves, and what is reached is the same network with hard attention.
# from paper.degrees import degree_of_homogeneity
#
# lens = run.lens(run.last)
# soft, hard = (
#     degree_of_homogeneity(lens, run.tokens[:2], at="blocks.0.attn", which="qk", saturated=limit)
#     for limit in (False, True)
# )
# print(soft, hard, sep="\n")
#
# # 3: one; exact ties do not happen by chance
# model = sl.load_model("demo")
# prompt = "def area(width, height):\n    return width * height\n\ndef volume(width, height"
# with sl.saturate(model):
#     _, cache = model.run_with_cache(prompt)
# counts = [(cache["pattern", layer][..., 7:, :] > 0).sum(-1) for layer in range(4)]
# print({int(n) for layer in counts for n in layer.unique()})
# ```
#
# </details>
