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
# # 2. Head roles
#
# **Question.** What does each head do with its attention: look at one key, at a few, or average
# over all? And how could such a label mislead us?
#
# In Colab, first run `%pip install git+ADDRESS`, with the address of the repository that this
# notebook comes from. Nothing is downloaded after that: the model and its text come with the
# library.
#
# `MODEL` may be any name that TransformerLens can load. With a network, try `"gpt2"`; the cells
# below choose heads by their numbers, not by name, so they run as they stand (the check of damages
# then takes minutes). The text, and what it says about results, is about `"demo"`.
#
# > **In a real language model** labels hold for groups of heads and say little of single ones,
# > and sinks hide what many heads do: see [tutorial 8](08_a_real_language_model.ipynb) and
# > [real models](../docs/real_models.md).

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import sat_lens as sl
from sat_lens.data import text_windows
from sat_lens.demo.corpus import corpus_name, held_out_texts
from sat_lens.roles import merge

MODEL = "demo"
torch.set_grad_enabled(False)
model = sl.load_model(MODEL)
windows = text_windows(model, held_out_texts(), context=128, limit=48)
size = sum(len(model.to_string(row)) for row in windows)
print(f"{len(windows)} windows of {windows.shape[1]} tokens, {size / 1000:.0f} kB: {corpus_name()}")

# %% [markdown]
# ## The map
#
# Every row of attention lies somewhere between two extremes: *argmax* (all weight on one key) and
# *mean* (the same weight on every visible key). For each row the library measures the total
# variation to both, that is, how much of the weight would have to move: `tv_argmax` and `tv_mean`.
# `lean` is tv_mean / (tv_argmax + tv_mean), so 1 is argmax and 0 is mean. A head's role comes from
# the means over its rows.
#
# **Prediction.** In a trained model a few heads are sharp and look at the previous token, most lie
# in between, and none is `mean`. Source code is full of repetition, so at least one head should
# have the target `induction`: the key after an earlier occurrence of the present token.

# %%
roles = sl.head_roles(model, windows, progress=False, data_name="held-out source code")
frame = roles.frame()
print(frame["role"].value_counts().to_dict())
print(frame.loc[frame["target"] != "", ["role", "target", "lean"]].round(2))
print("largest share of weight on induction keys:")
print(frame["induction"].nlargest(3).round(2).to_dict())

# %%
roles.plot()

# %% [markdown]
# A cell is a head, layer 0 on top. The colour names the role and is stronger where more rows agree;
# the sign in a cell says where the head looks.
#
# The first part of the prediction held, but for the two sharpest heads, which look at the token
# itself. The second did not: no head is labelled `induction`. One head does put much weight on
# induction keys, but its label says `first`. We come back to it.
#
# ## One head of each kind
#
# For each role we take the head whose rows agree most, and look at its attention on one window.
# Rows are queries, columns are keys; white is no weight, dark blue is all of it.

# %%
_, cache = model.run_with_cache(windows[5:6, :48])
clearest = frame.sort_values("lean").groupby("role", sort=False)["agreement"].idxmax()[::-1]
figure, panels = plt.subplots(
    1, len(clearest), figsize=(2.3 * len(clearest), 2.6), layout="constrained", squeeze=False
)
for axes, (role, label) in zip(panels[0], clearest.items(), strict=True):
    layer, head = frame.loc[label, ["layer", "head"]]
    axes.imshow(cache["pattern", layer][0, head], cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"{label}: {role}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Labels are means: the `mean-lean` head has a few rows that are as sharp as any, and the `soft` one
# seems to copy something in the lower half. That is no contradiction, but it is a warning.
#
# For a version that answers to the mouse, and shows the saturated pattern beside the soft one, use
# `sl.viz.attention(pair, heads)`; `sl.write_report` puts all of it into one page.
#
# The rest of this notebook is about five ways in which such a map can mislead.
#
# ## 1. Sinks
#
# Many heads put their weight on the first token when they have nothing to say. That looks like a
# head that picks one key.
#
# **Prediction.** The head with the most weight on sinks is on the sharp side because of them: leave
# those keys out, and its lean falls below .60, where the label `argmax-lean` ends.

# %%
sink = frame["sink_mass"].idxmax()
columns = ["role", "target", "sink_mass", "lean", "lean_no_sink"]
frame.nlargest(4, "sink_mass")[columns].round(2)

# %% [markdown]
# It held. What the head does elsewhere is not sharp. `lean_no_sink` is always in the table; read
# it before calling a head sharp.
#
# ## 2. Rows
#
# A role is a mean over query rows, and a head need not be doing its work on all of them. `metric=`
# weighs each row by its first-order effect on a metric, here the loss.
#
# **Prediction.** The sink head rests on most rows. On the rows that matter to the loss it should
# put more weight on induction keys than on the first token. Rows that matter should be sharper in
# most heads.

# %%
weighed = sl.head_roles(model, windows, metric="loss", progress=False).frame()
sharper = int((weighed["lean"] > frame["lean"]).sum())
for name, table in {"all rows alike": frame, "by effect on the loss": weighed}.items():
    role, target, first, induction = table.loc[sink, ["role", "target", "first", "induction"]]
    print(f"{sink}, {name}: {role} {target}, first {first:.2f}, induction {induction:.2f}")
print(f"{sharper} of {len(frame)} heads are sharper on the rows that matter")

# %% [markdown]
# Both parts held, and the induction head that we missed above turns up: same head, same text, other
# rows. (Means of the columns `induction` and `duplicate` are over rows that have such a key.)
#
# When the question is about one position, name it.
#
# **Prediction.** At the end of the prompts below, where the next token has been seen twice after
# the same `name,`, the same head is an induction head as well.

# %%
prompts = [
    f"a = first(name, {word})\nb = second(name, {word})\nc = third(name,"
    for word in ("value", "line", "data", "text", "index", "size", "mode", "args")
]
last = sl.head_roles(model, prompts, query_positions=[-1], progress=False).frame()
heads = [sink, *last["induction"].nlargest(2).index]
last.loc[heads, ["role", "target", "first", "induction"]].round(2)

# %% [markdown]
# It did not hold. Here the head rests on the first token, and others look at the keys to be copied.
# "The induction head" of a corpus is not the induction head of a prompt; the next notebook shows
# which heads carry the answer here.
#
# ## 3. Initialisation
#
# **Prediction.** An untrained model has nearly equal scores everywhere, so every one of its heads
# gets the label `mean`. All heads of the trained model have moved from there.

# %%
torch.manual_seed(0)
untrained = TransformerBridge.boot_transformers(
    model.cfg.model_name,
    hf_model=AutoModelForCausalLM.from_config(model.original_model.config),
    tokenizer=model.tokenizer,
).eval()
at_random = sl.head_roles(untrained, windows, progress=False)
print(at_random.frame()["role"].value_counts().to_dict())
moved = roles.relative_to(at_random)
print("heads whose lean moved by more than two standard errors:", int(moved["learned"].sum()))

# %% [markdown]
# It held. So a `mean` head is no evidence that a model counts: it may never have been needed. Had
# the trained model such heads, `learned` would say which of them came from there.
#
# ## 4. Uncertainty
#
# `lean_se` is a standard error over sequences, and `compare` asks which heads differ by more than
# two of them.
#
# **Prediction.** Two halves of one corpus differ by chance alone. Beyond two standard errors that
# is one head in twenty, so one or two here, however the halves are made.

# %%
halves = [sl.head_roles(model, half, progress=False) for half in (windows[:24], windows[24:])]
mixed = [sl.head_roles(model, half, progress=False) for half in (windows[::2], windows[1::2])]
by_place, by_turn = halves[0].compare(halves[1]), mixed[0].compare(mixed[1])
print("first against second half:", int(by_place["changed"].sum()), "heads changed")
print("every other window:       ", int(by_turn["changed"].sum()), "heads changed")
print("most that a lean moved:   ", round(float(by_place["change"].abs().max()), 3))

# %% [markdown]
# It did not hold. The windows follow each other in the files, so each half is about its own files,
# and windows of one file resemble each other. The error says how well *these* texts were measured,
# and nothing of code in general. For that, take one window per file. The changes are small,
# though: few of them cross the border of a role.

# %%
crossed = by_place[by_place["role"] != by_place["role_other"]]
crossed[["role", "role_other", "lean", "lean_other"]].round(3)

# %% [markdown]
# ## 5. Shape is not use
#
# `damage=True` puts a label to the test. It replaces each head's pattern by its argmax, by uniform
# attention and by the nearest saturated row of each query, and its output by zero, and says how
# much the loss rises, in nats.
#
# **Prediction.** Sharp heads (lean at least .60) lose less by argmax than by uniform attention,
# flat ones (at most .45) the other way round. The nearest saturated row is best for nearly all.

# %%
damaged = sl.head_roles(model, windows[:8], damage=True, progress=False).frame()
argmax_is_better = damaged["damage_argmax"] < damaged["damage_uniform"]
sharp, flat = damaged["lean"] >= 0.60, damaged["lean"] <= 0.45
as_predicted = (sharp & argmax_is_better) | (flat & ~argmax_is_better)
columns = ["damage_argmax", "damage_uniform", "damage_nearest", "damage_zero"]
print(f"as predicted: {int(as_predicted.sum())} of {int((sharp | flat).sum())}; against it:")
print(damaged.loc[(sharp | flat) & ~as_predicted, ["lean", *columns[:3]]].round(3))
extremes = damaged[["damage_argmax", "damage_uniform"]].min(axis=1)
nearest_is_best = damaged["damage_nearest"] <= extremes
print(f"nearest is best for {int(nearest_is_best.sum())} of {len(damaged)}")

# %%
damaged.nlargest(5, "damage_zero")[["role", "target", *columns]].round(3)

# %% [markdown]
# The prediction held for most heads, and not for all. For the exceptions the two replacements cost
# nearly the same, to a few thousandths of a nat. That is what a label is worth: it says which
# replacement is the better one, as a tendency.
#
# It does not say what a head is worth. The heads that the model cannot do without, in the table
# above, are the plainest of all: they look at the token itself. Their softness is not needed
# (`damage_argmax`), the heads are (`damage_zero`).
#
# ## Keep and merge
#
# A result is one file that runs no code when it is read, and results of disjoint texts add up:
# several workers together measure what a single one would.

# %%
with tempfile.TemporaryDirectory() as folder:
    halves[0].save(Path(folder) / "first.safetensors")
    first = sl.HeadRoles.load(Path(folder) / "first.safetensors")
merged = merge([first, halves[1]])
apart = (merged.frame()["lean"] - frame["lean"]).abs().max()
print(f"{merged.n_sequences} sequences; leans differ from one pass by at most {apart:.1e}")

# %% [markdown]
# ## Exercises
#
# 1. The border of `argmax` and `mean` is a total variation of .25. Which heads get another role at
#    .35? (`thresholds=`)
# 2. Rows with fewer than eight visible keys are left out. What happens to the leans if only rows
#    with at least 64 are counted?
# 3. `c_hi` says how much sharper a head must be made to be within .1 of its limit. Take the head
#    nearest to .5 in lean, and check that number with `sl.saturate`.
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1
# from sat_lens.roles import Thresholds
#
# wider = Thresholds(near=0.35)
# relaxed = sl.head_roles(model, windows, thresholds=wider, progress=False).frame()
# other = relaxed["role"] != frame["role"]
# print(relaxed.loc[other, "role"].to_dict())
#
# # 2: long rows are flatter relative to their length, and further from uniform in total variation
# long = sl.head_roles(model, windows, min_keys=64, progress=False).frame()
# print((long["lean"] - frame["lean"]).describe().round(3))
#
# # 3: a median over rows, so about half of them should be within .1
# label = (frame["lean"] - 0.5).abs().idxmin()
# layer, head = frame.loc[label, ["layer", "head"]]
# c = float(frame.loc[label, "c_hi"])
# with sl.saturate(model, heads=label, scale=c):
#     _, sharp_cache = model.run_with_cache(windows, names_filter=lambda name: "pattern" in name)
# winner = sharp_cache["pattern", layer][:, head, 7:].amax(-1)
# print(label, round(c, 2), "share of rows:", round(float((winner >= 0.9).float().mean()), 2))
# ```
#
# </details>
