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
# source of Python's standard library. Nothing is downloaded.

# %%
import math

import torch

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

# %%
metric = sl.metrics.next_token_loss(tokens)
effects = {}
for site in sl.attention_sites(model):
    for label in site.labels:
        with sl.saturate(model, heads=label):
            effects[label] = float(metric(model(tokens))) - losses["soft"]
worst = sorted(effects, key=effects.get, reverse=True)[:3]
print("it hurts most to saturate", {label: round(effects[label], 3) for label in worst})

# %% [markdown]
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
# ## Raw cosine misleads
#
# The cosine between soft and saturated activations looks high for any model, because a random key
# gives a high cosine as well. So the control is always shown beside it.

# %%
pair = sl.run_with_saturation_cache(model, tokens)
similarity = pair.similarity("resid_post")
similarity.frame().round(3)

# %% [markdown]
# ## A schedule through the forward pass
#
# The scale may differ by head: here early layers stay soft and late layers are saturated.

# %%
with sl.saturate(model, scale=lambda layer, head: 1.0 if layer < 2 else math.inf):
    late_only = float(metric(model(tokens)))
print(
    f"soft {losses['soft']:.2f}, layers 2 and 3 saturated {late_only:.2f}, "
    f"all saturated {losses['saturated']:.2f}"
)

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
