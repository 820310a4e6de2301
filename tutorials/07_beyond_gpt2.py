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
# # 7. Beyond GPT-2
#
# **Question.** The other notebooks use a decoder that reads text. Can attention be saturated in an
# encoder (BERT), an encoder-decoder with cross-attention (T5), an image model (ViT), and a plain
# Hugging Face model, and what has to be read differently there?
#
# The models here are tiny and random, so that nothing is downloaded. Their numbers say what can be
# *reached and measured*, and nothing about trained models; the last section runs the same code on
# real ones. In Colab, first run `%pip install git+ADDRESS`, with the address of the repository that
# this notebook comes from.

# %%
import warnings

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

import sat_lens as sl

torch.set_grad_enabled(False)

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
BERT = {"vocab_size": 96, "num_hidden_layers": 3, **SIZE}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
      "decoder_start_token_id": 0}  # fmt: skip


def build(architecture, config, attention="eager"):
    torch.manual_seed(0)
    model_class = getattr(transformers, architecture)
    model = model_class._from_config(config, attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.3)  # at the usual 0.02, attention is nearly uniform
    return model


def bridge(model):
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


bert = bridge(build("BertForMaskedLM", transformers.BertConfig(**BERT)))
t5 = bridge(build("T5ForConditionalGeneration", transformers.T5Config(**T5)))
demo = sl.load_model("demo")

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(4, 96, (48, 14), generator=generator)
answers = torch.randint(4, 96, (48, 18), generator=generator)  # for T5's decoder

# %% [markdown]
# ## Where can each be reached?
#
# TransformerLens computes the attention of GPT-2 and Llama itself: its hook on the scores fires
# before the softmax (level `scores`). For BERT, T5 and ViT it lets Hugging Face's code compute
# and fills its hooks afterwards. **Prediction.** `attention_sites`, which runs the model and
# watches, finds `scores` for the demo model (a Llama) and another level for the others.

# %%
rows = [
    {"model": name, "module": site.path, "heads": f"{site.labels[0]} to {site.labels[-1]}",
     "level": site.level, "edits thrown away": ", ".join(sorted(site.discarded))}
    for name, model in {"demo": demo, "bert": bert, "t5": t5}.items()
    for site in sl.attention_sites(model)
]  # fmt: skip
pd.DataFrame(rows).set_index(["model", "module"])

# %% [markdown]
# It holds. `softmax` means that sat_lens steps in where the softmax of that module is called. The
# last column names the hooks whose edits TransformerLens discards there.
#
# ## A silent no-op
#
# Multiply BERT's scores by 100 with a hook, as one would in GPT-2. **Prediction.** The output does
# not change, and TransformerLens warns.

# %%
HOOK = "blocks.0.attn.hook_attn_scores"


def try_hook(model, edit):
    with warnings.catch_warnings(record=True) as said, model.hooks(fwd_hooks=[(HOOK, edit)]):
        warnings.simplefilter("always")
        logits, cache = model.run_with_cache(tokens)
    change = float((logits - model(tokens)).abs().max())
    print(f"logits changed by {change}, {len(said)} warnings")
    return change, len(said), cache


returned = try_hook(bert, lambda scores, hook: 100 * scores)

# %% [markdown]
# It holds: a no-op that is not silent. Two that are: an edit *in place*, which leaves nothing to
# compare and shows the edited values in the cache; and a bridge built around a model with fused
# attention, whose hook never fires.


# %%
def zero_in_place(scores, **_):
    scores.zero_()


in_place = try_hook(bert, zero_in_place)
print("but the cache shows scores of", float(in_place[2][HOOK].abs().max()))

fused = bridge(build("BertForMaskedLM", transformers.BertConfig(**BERT), attention="sdpa"))
calls = []
never_fired = try_hook(fused, lambda scores, hook: calls.append(1))
print("calls of the hook:", len(calls))

# %% [markdown]
# sat_lens acts on the first model, and refuses the second with a reason.


# %%
def hardness(pattern):
    return float(pattern.amax(-1).mean())


with sl.saturate(bert):
    hard, cache = bert.run_with_cache(tokens)
change = float((hard - bert(tokens)).abs().max())
print("logits changed by", round(change, 2))
print("mean weight of the winning key:", hardness(cache["pattern", 0]))

try:
    with sl.saturate(fused):
        fused(tokens)
except sl.SatLensError as error:
    refusal = str(error)
    print(refusal)

# %% [markdown]
# ## An encoder, padded
#
# In an encoder every query sees every key of its own sequence, but no padding. **Prediction.** In
# the limit padding gets exactly no weight, and each sequence has the logits that it has alone.

# %%
lengths = [14, 9, 12, 14, 8, 11] * 8
mask = (torch.arange(14) < torch.tensor(lengths)[:, None]).long()
with sl.saturate(bert):
    together, cache = bert.run_with_cache(tokens, attention_mask=mask)
    alone = [bert(tokens[i : i + 1, :n]) for i, n in enumerate(lengths)]
apart = max(
    float((together[i, :n] - logits[0]).abs().max())
    for i, (n, logits) in enumerate(zip(lengths, alone, strict=True))
)
on_padding = float((cache["pattern", 1] * (1 - mask)[:, None, None, :]).max())
print(f"largest weight on padding: {on_padding}; largest difference to alone: {apart:.5f}")

# %% [markdown]
# It holds. Roles are measured over rows without padding as well; data are dictionaries of the
# model's arguments.

# %%
padded = {"input": tokens, "attention_mask": mask}
roles = sl.head_roles(bert, [padded], progress=False)
frame = roles.frame()
print("rows counted:", int(frame["n_rows"].iloc[0]), "of", tokens.numel(), "; real:", sum(lengths))
frame[["role", "target", "tv_argmax", "tv_mean", "sink_mass"]].round(2).head(4)

# %% [markdown]
# Two things to keep in mind with encoders. A short sequence may have fewer than `min_keys` keys in
# *all* its rows, and then counts nothing. And the next-token loss means nothing, since the model
# sees the token: give a metric of your own.
#
# ## A sweep over an encoder's heads
#
# Each head is saturated by itself. The metric is the divergence of the prediction at position 3
# from the soft one, in nats. **Prediction.** The farther a head's attention at that position is
# from one key (`tv_argmax` over that query alone), the more its saturation changes the prediction.

# %%
metric = sl.metrics.kl_to_soft(bert(**padded), positions=[3])
sweep = sl.sweep_heads(bert, padded, metric, progress=False)
at_three = sl.head_roles(bert, [padded], query_positions=[3], progress=False).frame()
moved = pd.DataFrame({"kl": sweep.frame()["value"], "tv_argmax": at_three["tv_argmax"]})
print("rank correlation:", round(moved.corr("spearman").iloc[0, 1], 2))

# %%
sweep.plot()

# %% [markdown]
# The deeper the orange, the more the prediction changes. Ours does not hold: the correlation is
# negative, and the first layer (top row) matters most. What was forgotten: a head of an early layer
# is saturated at *every* query, and the other positions reach position 3 through later layers.
# **New prediction.** Saturated at query 3 alone, the correlation is positive, as it should be in
# the last layer, where no other row matters.

# %%
one_row = sl.sweep_heads(bert, padded, metric, positions=[3], progress=False)
moved["kl, query 3"] = one_row.frame()["value"].to_numpy()
correlations = {
    "all queries": moved.corr("spearman").loc["kl", "tv_argmax"],
    "query 3": moved.corr("spearman").loc["kl, query 3", "tv_argmax"],
    "last layer": moved.loc["L2H0":].corr("spearman").loc["kl", "tv_argmax"],
}
print({name: round(float(value), 2) for name, value in correlations.items()})

# %% [markdown]
# Only in part. The correlation rises, but is not positive over all layers; within the last layer
# it is, as far as four heads can tell. A change in an early layer grows on its way to the output,
# so heads of different layers cannot be ranked by their shape. What a head's softness does is
# measured by a sweep, not read off its role.
#
# ## An encoder-decoder
#
# T5 has three kinds of attention, and three prefixes: `encoder.`, `decoder.` and `cross.`. A label
# without one is an error that says so.

# %%
try:
    with sl.saturate(t5, heads="L0H1"):
        pass
except sl.SatLensError as error:
    no_prefix = str(error)
    print(no_prefix)

# %% [markdown]
# **Predictions.** Saturating the decoder or the cross-attention leaves the encoder's output as it
# is, to the last bit. Saturating the encoder changes cross-attention, whose keys it makes, and
# leaves the first decoder block's self-attention alone.

# %%
ENCODED = "encoder_blocks.1.hook_resid_post"
SELF = "decoder_blocks.0.self_attn.hook_pattern"
CROSS = "decoder_blocks.0.cross_attn.hook_pattern"
pair = {"input": tokens, "decoder_input": answers}
_, soft_cache = t5.run_with_cache(**pair)


def unchanged(chosen):
    with sl.saturate(t5, heads=lambda stack, layer, head: stack == chosen):
        _, cache = t5.run_with_cache(**pair)
    return {name: torch.equal(cache[name], soft_cache[name]) for name in (ENCODED, SELF, CROSS)}


kept = pd.DataFrame({stack: unchanged(stack) for stack in ("encoder", "decoder", "cross")}).T
kept.columns = ["encoder's output", "decoder pattern", "cross pattern"]
print("unchanged when saturated:")
kept

# %% [markdown]
# It holds. Roles come for all three stacks at once.

# %%
t5_roles = sl.head_roles(t5, [pair], progress=False)
t5_roles.plot("Head roles of the tiny T5")

# %% [markdown]
# Colours are roles, named in the legend. Random weights of this size make attention sharp, so that
# all heads are on the side of one key; with weights of 0.02 they would all be `mean`.
#
# **Prediction.** In cross-attention queries and keys belong to different sequences, so "previous"
# or "the third key before" mean nothing, and no such number should be given.

# %%
print("shape of a cross pattern (batch, head, query, key):", tuple(soft_cache[CROSS].shape))
t5_frame = t5_roles.frame()
t5_frame.groupby("stack", sort=False)[
    ["tv_argmax", "lean", "previous", "modal_offset"]
].mean().round(2)

# %% [markdown]
# It holds: NaN, not some meaningless number. Sweeps keep the stacks apart too; their `.values` is
# a dictionary of tensors `[layer, head]`.

# %%
t5_sweep = sl.sweep_heads(t5, pair, sl.metrics.kl_to_soft(t5(**pair)), progress=False)
print({stack: tuple(values.shape) for stack, values in t5_sweep.values.items()})
t5_sweep.frame().groupby("stack", sort=False)["value"].mean()

# %% [markdown]
# ## A vision transformer
#
# Its tokens are [CLS] and the patches of an image, row by row: 4 x 4 patches here. To know what to
# expect, we write two heads into the first layer. Position embeddings are one-hot; head 0 looks at
# the patch to the left, head 1 at the patch above, and both at [CLS] where there is none.

# %%
WIDTH = 4
N_TOKENS = WIDTH * WIDTH + 1
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 64,
       "num_attention_heads": 2, "num_hidden_layers": 2, "num_labels": 8}  # fmt: skip
vit_model = build("ViTForImageClassification", transformers.ViTConfig(**VIT))
embeddings = vit_model.vit.embeddings
embeddings.cls_token[..., :N_TOKENS] = 0
embeddings.patch_embeddings.projection.weight[:N_TOKENS] = 0
embeddings.position_embeddings.zero_()
embeddings.position_embeddings[0, :, :N_TOKENS] = 20 * torch.eye(N_TOKENS)
vit = bridge(vit_model)


def look_at(head, down, right):
    query = vit.blocks[0].attn.q.weight[32 * head : 32 * (head + 1)]
    key = vit.blocks[0].attn.k.weight[32 * head : 32 * (head + 1)]
    query.zero_(), key.zero_()
    key[:N_TOKENS, :N_TOKENS] = torch.eye(N_TOKENS)
    query[0, 0] = 3
    for y in range(WIDTH):
        for x in range(WIDTH):
            inside = 0 <= y + down < WIDTH and 0 <= x + right < WIDTH
            target = 1 + WIDTH * (y + down) + x + right if inside else 0
            query[target, 1 + WIDTH * y + x] = 3


look_at(0, down=0, right=-1)
look_at(1, down=-1, right=0)
images = torch.randn(16, 3, 32, 32, generator=generator)

# %% [markdown]
# **Prediction.** Both are `argmax`. The library counts positions and does not know that they form
# a picture, so it will call "left" `previous` and "above" `offset -4`.

# %%
vit_roles = sl.head_roles(vit, images, progress=False).frame()
vit_roles[["role", "target", "tv_argmax", "modal_offset", "modal_share", "first"]].round(2)

# %% [markdown]
# It holds, and it shows what not to say. There is no previous token here: `previous` is the patch
# to the left, or for one at the left edge the end of the row above; `first` is the mass on [CLS].
# Read the patterns of image models in two dimensions: here as the mean attention by displacement.


# %%
def by_displacement(pattern):
    """Mean attention of patches to patches, by rows down and columns right."""
    y, x = torch.arange(WIDTH**2) // WIDTH, torch.arange(WIDTH**2) % WIDTH
    down = y[None, :] - y[:, None] + WIDTH - 1
    right = x[None, :] - x[:, None] + WIDTH - 1
    place = (down * (2 * WIDTH - 1) + right).flatten()
    size = (2 * WIDTH - 1) ** 2
    weights = pattern[:, 1:, 1:].mean(0).flatten()
    total = torch.zeros(size).index_add(0, place, weights)
    count = torch.zeros(size).index_add(0, place, torch.ones(len(place)))
    return (total / count).reshape(2 * WIDTH - 1, -1)


_, cache = vit.run_with_cache(images)
figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
maps = {f"L{i}H{j}": by_displacement(cache["pattern", i][:, j]) for i in (0, 1) for j in (0, 1)}
for axis, (label, values) in zip(axes, maps.items(), strict=True):
    shown = axis.imshow(values, vmin=0, vmax=1, extent=(-3.5, 3.5, 3.5, -3.5))
    axis.set(title=label, xlabel="columns to the right", xticks=(-2, 0, 2))
axes[0].set_ylabel("rows down")
figure.colorbar(shown, ax=axes, label="mean attention")
plt.show()

# %% [markdown]
# Yellow is all of a patch's attention, dark purple none. The two heads of the first layer are at
# one place each, left and above; those of the second are random and have no place of their own.
#
# ## A plain Hugging Face model
#
# A model that TransformerLens does not wrap can be saturated as well. Its fused attention (`sdpa`)
# shows no scores, so sat_lens acts on what goes into it: the level `kernel`. **Prediction.** The
# same weights give the same saturated logits as through the bridge, up to rounding. T5's own
# attention is an exception: it adds a position bias to its scores inside the kernel, which a factor
# on the queries does not reach.

# %%
plain = build("BertForMaskedLM", transformers.BertConfig(**BERT), attention="sdpa")
with sl.saturate(plain):
    fast = plain(tokens, attention_mask=mask).logits
gap = float((fast - together)[mask.bool()].abs().max())
print("level:", {site.level for site in sl.attention_sites(plain)})
print("differs from the bridge by less than 1e-4:", gap < 1e-4)

plain_t5 = build("T5ForConditionalGeneration", transformers.T5Config(**T5), attention="sdpa")
for site in sl.attention_sites(plain_t5):
    print(
        f"{site.stack:>8} L{site.layer}: {site.level}", f"({site.why_not})" if site.why_not else ""
    )

# %% [markdown]
# It holds. Where `why_not` gives a reason, the model runs its attention eagerly while the block
# lasts, and a warning says so once. What needs hooks (caches, sweeps) needs the bridge.
#
# ## Real models
#
# With a network, set `REAL = True`. The same function reports on the tiny models and on real ones.

# %%
REAL = False


def reach(model, *inputs, **kwargs):
    levels = {f"{site.stack or 'all'}: {site.level}" for site in sl.attention_sites(model)}
    soft = model(*inputs, **kwargs)
    with sl.saturate(model):
        hard = model(*inputs, **kwargs)
    same = (soft.argmax(-1) == hard.argmax(-1)).float().mean()
    print(f"{', '.join(sorted(levels))}; likeliest answer kept in {same:.0%} of places")


reach(bert, tokens)
reach(t5, **pair)
reach(vit, images)
if REAL:
    text = "The capital of France is [MASK], and the capital of Italy is Rome."
    reach(sl.load_model("bert-base-uncased"), text)
    real_t5 = sl.load_model("t5-small")
    german = real_t5.tokenizer("<pad>Das Haus ist wunderbar.", return_tensors="pt").input_ids
    reach(real_t5, "translate English to German: The house is wonderful.", decoder_input=german)
    # Noise has no likeliest class worth keeping: give it pictures of yours, [batch, 3, 224, 224].
    reach(sl.load_model("google/vit-base-patch16-224"), torch.randn(4, 3, 224, 224))

# %% [markdown]
# **What we learned.** Ask `attention_sites` before you hook: whether an edit acts depends on who
# computes the attention. With that settled, encoders, decoders, cross-attention and images are
# saturated by the same line. What changes is how to read the numbers: which rows count, which
# distances mean something, and which metric fits.
#
# ## Exercises
#
# 1. Make head 0 of the vision transformer look at the patch below and to the right. What will the
#    library call it?
# 2. T5 knows the order of its input only through biases on the encoder's scores. Does the order
#    still matter if the encoder's and the cross-attention are uniform? And if they are saturated?
# 3. `ties="nearest"` needs scores. Use it on the plain BERT: how far is it from the bridge, and
#    what is said?
#
# <details><summary>Solutions</summary>
#
# ```python
# # 1: four tokens on and one more.
# look_at(0, down=1, right=1)
# print(sl.head_roles(vit, images, progress=False).frame().loc["L0H0", "target"])
#
# # 2: uniform attention over the input is blind to its order; the limit is not, because the
# # biases help to decide which key wins.
# shuffled = tokens[:, torch.randperm(14, generator=generator)]
# order_matters = {}
# for scale in (0, torch.inf):
#     with sl.saturate(t5, heads=lambda stack, layer, head: stack != "decoder", scale=scale):
#         both = [t5(each, decoder_input=answers) for each in (tokens, shuffled)]
#     order_matters[scale] = not torch.allclose(*both, atol=1e-4)
# print(order_matters)
#
# # 3: it runs eagerly inside the block, as a logged warning says, and agrees.
# with sl.saturate(bert, ties="nearest"):
#     by_bridge = bert(tokens)
# with sl.saturate(plain, ties="nearest"):
#     by_plain = plain(tokens).logits
# print(float((by_bridge - by_plain).abs().max()))
# ```
#
# </details>
