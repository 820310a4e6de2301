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
# # 1. Saturate a model
#
# **Question.** A softmax attention head spreads its weight over many keys. How much of what a
# trained model does depends on that spread, and how much would survive if every head looked only at
# the key (or keys) with the highest score?
#
# **What the limit does.** Multiply a head's attention scores by a number c, the inverse
# temperature, before the softmax. At c = 1 nothing changes. As c grows, weight moves to the row's
# highest score; in the limit attention is *saturated*: uniform over the keys that reach the
# maximum (Merrill et al. 2021). At c = 0 it is uniform over all visible keys.
#
# We use the demo model that comes with the library: four layers of eight heads, trained on the
# source of Python's standard library. Nothing is downloaded. (How to run a notebook locally stands
# in the [README](README.md). In Colab, first run `%pip install git+ADDRESS`, with the address of
# the repository that this notebook comes from.)
#
# > **In a real language model** saturation costs nearly what uniform attention costs: the model
# > is gone. [Tutorial 8](08_a_real_language_model.ipynb) shows that.

# %%
import math

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import sat_lens as sl

torch.set_grad_enabled(False)
model = sl.load_model("demo")
prompt = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return area(width, height"""
tokens = model.to_tokens(prompt)
print(tokens.shape[1], "tokens")

# %% [markdown]
# ## Where can this model be touched?
#
# `attention_sites` runs the model once and watches. `scores` means that the hook on the scores
# fires before the softmax and carries exactly what the softmax receives.

# %%
for site in sl.attention_sites(model):
    print(site.path, site.n_heads, "heads, level", site.level)

# %% [markdown]
# ## Predict, then measure
#
# **Prediction.** Saturating all 32 heads at once should hurt: the loss should rise, but not to the
# loss of a model whose attention looks at random keys, because the highest score is usually where
# a head wants to look.


# %%
def loss(transform=None):
    metric = sl.metrics.next_token_loss(tokens)
    if transform is None:
        return float(metric(model(tokens)))
    with sl.replace_attention(model, transform):
        return float(metric(model(tokens)))


losses = {
    "soft": loss(),
    "saturated": loss(sl.transforms.Limit()),
    "uniform": loss(sl.transforms.Uniform()),
    "random keys": loss(sl.transforms.RandomKey(seed=0)),
}
for name, value in losses.items():
    print(f"{name:>12}: {value:.2f} nats")

# %% [markdown]
# It held, and by far: the saturated model is half a nat worse, while with uniform attention or
# random keys it can do nothing of what it learned.
#
# ## One head at a time
#
# `saturate` takes heads by label. Inside the block every run of the model is saturated, whoever
# starts it, and `run_with_cache` shows the saturated pattern.

# %%
with sl.saturate(model, heads="L2H1"):
    _, cache = model.run_with_cache(tokens)
hard, soft_neighbour = cache["pattern", 2][0, 1], cache["pattern", 2][0, 2]
print("L2H1, weight of the winning key:", hard.amax(-1).min().item())
print("L2H2, weight of the winning key:", round(soft_neighbour.amax(-1).mean().item(), 2))

# %% [markdown]
# **Prediction.** It hurts most to saturate the heads that are furthest from saturated now: those
# with a large `tv_argmax`, the weight that would have to move to the winning key.

# %%
metric = sl.metrics.next_token_loss(tokens)
effects = {}
for site in sl.attention_sites(model):
    for label in site.labels:
        with sl.saturate(model, heads=label):
            effects[label] = float(metric(model(tokens))) - losses["soft"]
worst = sorted(effects, key=effects.get, reverse=True)[:3]
distance = sl.head_roles(model, tokens, progress=False).frame()["tv_argmax"]
correlation = distance.corr(pd.Series(effects))
helped = [label for label, effect in effects.items() if effect < 0]
print("it hurts most to saturate", {label: round(effects[label], 3) for label in worst})
print(f"effect against tv_argmax: correlation {correlation:.2f}")
print(f"{len(helped)} of {len(effects)} heads do better when saturated")

# %% [markdown]
# It did not hold: how much a pattern changes says nothing about how much that matters here. And on
# this one short text many heads are better hard than soft, by a little. The notebook on patching
# takes up both, with controls.
#
# ## From 0 to infinity
#
# **Prediction.** The loss has its minimum not far from c = 1, where the model was trained. S, the
# similarity to the soft run beyond what random keys give, is 1 there and falls on both sides.

# %%
curve = sl.scaling_curve(model, tokens, progress=False)
curve.frame().round(3)

# %%
curve.plot()

# %% [markdown]
# The points at 0 and infinity stand apart from the lines because no finite scale is near them.
#
# The part about S held. The loss has its minimum a little beyond 1: on this text the model would
# gain from attention that is up to twice as sharp. Its predictions change all the same, as KL and
# the most likely tokens show.
#
# ## Raw cosine misleads
#
# The cosine between soft and saturated activations is not zero for attention that looks anywhere: a
# random key gives some cosine as well. S counts only what is beyond that, and the control is always
# shown beside it.
#
# **Prediction.** An untrained copy of the model has nothing to keep, so its S is about 0; its raw
# cosine is as high as that of the trained model.

# %%
pair = sl.run_with_saturation_cache(model, tokens)
similarity = pair.similarity("resid_post")
similarity.frame().round(3)

# %%
torch.manual_seed(0)
untrained = TransformerBridge.boot_transformers(
    model.cfg.model_name,
    hf_model=AutoModelForCausalLM.from_config(model.original_model.config),
    tokenizer=model.tokenizer,
).eval()
untrained_similarity = sl.run_with_saturation_cache(untrained, tokens).similarity("resid_post")
untrained_similarity.frame().round(3)

# %% [markdown]
# The part about S held, the other did not: in this model the untrained cosine is lower. But a
# cosine of .3 or .4 would look like some similarity, and the control shows that it is none. How
# high the control is depends on the model (with GPT-2's own initialisation it reaches .9), so
# raw cosines of two models cannot be compared.
#
# ## A schedule through the forward pass
#
# The scale may differ by head, so half of the layers can be saturated.
#
# **Prediction.** What goes wrong in the early layers passes through the late ones, so it costs more
# to saturate the early half. Both halves together cost about the sum.

# %%
halves = {"early": lambda layer, head: math.inf if layer < 2 else 1.0}
halves["late"] = lambda layer, head: 1.0 if layer < 2 else math.inf
costs = {"all": losses["saturated"] - losses["soft"]}
for name, scale in halves.items():
    with sl.saturate(model, scale=scale):
        costs[name] = float(metric(model(tokens))) - losses["soft"]
print({name: round(cost, 2) for name, cost in costs.items()})

# %% [markdown]
# Neither held. The two halves cost about the same, and together far more than their sum, as if a
# soft half could make up for a hard one.

# %% [markdown]
# ## Exercises
#
# 1. Which single head can be saturated with the *smallest* change of the loss? Is it one whose
#    attention was nearly saturated before?
# 2. `ties="nearest"` replaces each row by the saturated row nearest to it. Compare its loss with
#    that of the exact limit.
# 3. Write a transform that keeps the two highest scores of each row and drops the others.
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1
# best = min(effects, key=lambda label: abs(effects[label]))
# roles = sl.head_roles(model, tokens, progress=False).frame()
# print(best, roles.loc[best, ["role", "tv_argmax"]].to_dict())
#
# # 2
# print(loss(sl.transforms.Limit("nearest")), loss(sl.transforms.Limit()))
#
# # 3
# def top_two(scores):
#     second = scores.topk(min(2, scores.shape[-1]), dim=-1).values[..., -1:]
#     return scores.masked_fill(scores < second, -torch.inf)
# print(loss(top_two))
# ```
#
# </details>
