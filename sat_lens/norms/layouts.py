"""How projections are laid out in the weights of many families, and how they fall into heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from sat_lens.norms.naming import ParameterPlace

_CONV1D = ("gpt2", "openai-gpt")
_N_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


def head_count(config: Mapping[str, Any], stack: str = "") -> int:
    """Read the number of heads off a model's settings; 0 if they do not say."""
    own = f"{stack or 'decoder'}_attention_heads"
    for key in (own, *_N_HEADS):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    tower = stack.partition("_")[0]
    keys = (stack, f"{stack}_config", f"{tower}_config", "text_config", "encoder")
    nested = (config[key] for key in keys if isinstance(config.get(key), Mapping))
    return next(filter(None, (head_count(part, stack) for part in nested)), 0)


def split_joint(
    weight: Shaped[Tensor, "out *rest"], role: str, n_heads: int, d_head: int, model_type: str = ""
) -> dict[str, Tensor] | None:
    """Split a joint projection into the rows of queries, keys and values.

    ``joint`` matrices hold all queries, then all keys, then all values; ``interleaved`` ones hold
    the queries of one group of heads, their key and their value, group by group.

    Returns:
        Rows by ``"q"``, ``"k"`` and ``"v"``, or None where the sizes do not fit.
    """
    rows = len(weight)
    groups, odd = divmod(rows - n_heads * d_head, 2 * d_head)
    if odd or groups < 1 or n_heads % groups:
        return None
    if role == "interleaved":
        blocks = weight.unflatten(0, (groups, n_heads // groups + 2, d_head))
        parts = [blocks[:, :-2], blocks[:, -2:-1], blocks[:, -1:]]
        return {name: part.flatten(0, 2) for name, part in zip("qkv", parts, strict=True)}
    if model_type == "codegen":
        # CodeGen was trained on four cores, and keeps queries, values and keys core by core.
        q, v, k = weight.unflatten(0, (4, -1)).split(n_heads * d_head // 4, dim=1)
        return {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
    sizes = [n_heads * d_head, groups * d_head, groups * d_head]
    return dict(zip("qkv", weight.split(sizes), strict=True))


def joint_rows(
    place: ParameterPlace, shape: Sequence[int], config: Mapping[str, Any]
) -> tuple[bool, dict[str, Tensor]] | None:
    """Say which rows of a joint projection, or of its bias, make queries, keys and values.

    Returns:
        Whether the matrix must be transposed first, and row numbers by ``"q"``, ``"k"``, ``"v"``;
        None for what is no joint projection, or one whose layout is not known.
    """
    n_heads = head_count(config, place.stack)
    # In cross-attention a joint projection makes keys and values alone.
    if place.role not in ("joint", "interleaved") or place.cross or not n_heads:
        return None
    transposed = len(shape) == 2 and shape[0] < shape[1]
    widths = (config.get(key) for key in ("hidden_size", "d_model", "n_embd"))
    width = next((int(size) for size in widths if size), min(shape) if len(shape) == 2 else 0)
    d_head = int(config.get("head_dim") or 0) or width // n_heads
    if not d_head:
        return None
    numbers = torch.arange(max(shape))
    layout, kind = joint_layout(place.role, config), str(config.get("model_type", ""))
    rows = split_joint(numbers, layout, n_heads, d_head, kind)
    return None if rows is None else (transposed, rows)


def split_heads(
    matrices: Mapping[str, Tensor], n_heads: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Split an attention module's matrices, by role, into queries, keys, values and outputs.

    Returns:
        W_Q [head, d_model, d_qk], W_K [group, d_model, d_qk], W_V [group, d_model, d_v] and
        W_O [head, d_v, d_model]; None for a layout that no rule knows.
    """
    if "o" not in matrices:
        return None
    if matrices["o"].dim() == 3:
        return _already_split(matrices)
    if "kv_b" in matrices:
        return _latent(matrices, n_heads, config)
    o = matrices["o"]
    joint = next((role for role in ("joint", "interleaved") if role in matrices), None)
    if joint:
        weight = matrices[joint]
        if _is_conv1d(weight):
            weight, o = weight.T, o.T
        rows = split_joint(
            weight,
            joint_layout(joint, config),
            n_heads,
            o.shape[1] // n_heads,
            str(config.get("model_type", "")),
        )
    else:
        rows = {name: matrices[name] for name in "qkv" if name in matrices}
        # A bridge splits their joint projection into [out, in], and leaves the output as it is.
        o = o.T if config.get("model_type") in _CONV1D else o
    if rows is None or len(rows) < 3 or o.shape[1] % n_heads:
        return None
    d_v = o.shape[1] // n_heads
    d_qk = len(rows["k"]) * d_v // len(rows["v"])
    if any(len(rows[name]) % size for name, size in (("q", n_heads), ("k", d_qk), ("v", d_v))):
        return None
    if n_heads % (len(rows["v"]) // d_v):
        return None
    return (
        # A gated query projection holds the gate's rows after the query's, head by head.
        rows["q"].unflatten(0, (n_heads, -1))[:, :d_qk].mT,
        rows["k"].unflatten(0, (-1, d_qk)).mT,
        rows["v"].unflatten(0, (-1, d_v)).mT,
        o.unflatten(1, (n_heads, d_v)).permute(1, 2, 0),
    )


def joint_layout(role: str, config: Mapping[str, Any]) -> str:
    """Say how a joint projection is laid out; GPT-BigCode interleaves under a name that others use
    for the plain layout."""
    bigcode = config.get("model_type") == "gpt_bigcode" and not config.get("multi_query", True)
    return "interleaved" if bigcode else role


def _is_conv1d(weight: Tensor) -> bool:
    """Tell GPT-2's layout [in, out]: a joint projection has more outputs than inputs."""
    return weight.dim() == 2 and weight.shape[0] < weight.shape[1]


def _already_split(matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    weights = [matrices.get(role) for role in ("q", "k", "v", "o")]
    if any(weight is None or weight.dim() != 3 for weight in weights):
        return None
    q, k, v, o = (weight for weight in weights if weight is not None)
    return q, k, v, o


def _latent(
    matrices: Mapping[str, Tensor], n_heads: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Multiply out the factors of latent attention; the gains of the norms between are left out."""
    sizes = [config.get(key) for key in ("qk_nope_head_dim", "kv_lora_rank", "v_head_dim")]
    if not all(isinstance(size, int) for size in sizes) or "kv_a" not in matrices:
        return None
    nope, rank, d_v = (int(size or 0) for size in sizes)
    kv_a, kv_b, o = matrices["kv_a"], matrices["kv_b"], matrices["o"]
    q = matrices["q"] if "q" in matrices else matrices["q_b"] @ matrices["q_a"]
    latent, rotary = kv_a[:rank], kv_a[rank:]
    per_head = kv_b.unflatten(0, (n_heads, nope + d_v)) @ latent
    k = torch.cat([per_head[:, :nope], rotary.expand(n_heads, -1, -1)], dim=1)
    return (
        q.unflatten(0, (n_heads, -1)).mT,
        k.mT,
        per_head[:, nope:].mT,
        o.unflatten(1, (n_heads, d_v)).permute(1, 2, 0),
    )
