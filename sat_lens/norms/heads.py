"""The weights of single heads, and norms of their products that rescaling cannot change.

Multiplying ``W_Q`` by a and dividing ``W_K`` by a leaves every score as it was, so the norm of
either alone says nothing; that of ``W_Q W_K^T`` does not change. It follows from two Gram matrices
of size d_head, ``|A B^T|_F^2 = tr(A^T A B^T B)``, so the product of size d_model is never formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from sat_lens._checks import is_lens_model
from sat_lens.norms.adapters import adapted_layers
from sat_lens.norms.names import ParameterPlace
from sat_lens.norms.sources import Parameters, identity, wide
from sat_lens.sites import head_label, places
from sat_lens.sites.discovery import paths_with_patterns

HEAD_NORMS = ("W_Q", "W_K", "W_V", "W_O", "qk_product", "ov_product")
# GPT-2 keeps its matrices as [in, out], and PyTorch as [out, in].
_CONV1D = ("gpt2", "openai-gpt")
_N_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")

# W_Q [head, d_model, d_qk], W_K [group, d_read, d_qk], W_V [group, d_read, d_v], W_O [head, d_v,
# d_write]: heads of one group share keys and values.
Matrices = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class HeadWeights:
    """The matrices of one attention module, head by head; keys and values by group of heads.

    Latent attention is given by the products of its factors. ``path`` is the module's name in the
    names of its parameters.
    """

    stack: str
    layer: int
    q: Float[Tensor, "head d_model d_qk"]
    k: Float[Tensor, "group d_read d_qk"]
    v: Float[Tensor, "group d_read d_v"]
    o: Float[Tensor, "head d_v d_write"]
    path: str = ""

    @property
    def labels(self) -> list[str]:
        """The labels of the heads, as everywhere in this library."""
        return [head_label(self.stack, self.layer, head) for head in range(len(self.q))]

    def norms(self) -> Float[Tensor, "head norm"]:
        """Return the norms of :data:`HEAD_NORMS` for each head, in float64."""
        q, k, v, o = (wide(t) for t in (self.q, self.k, self.v, self.o))
        heads_per_group = len(q) // len(k)
        k, v = (t.repeat_interleave(heads_per_group, 0) for t in (k, v))
        raw = [t.flatten(1).norm(dim=1) for t in (q, k, v, o)]
        return torch.stack([*raw, product_norm(q, k), product_norm(v, o.mT)], dim=1).cpu()


def product_norm(
    a: Float[Tensor, "head d_in d_head"], b: Float[Tensor, "head d_out d_head"]
) -> Float[Tensor, " head"]:
    """Return the Frobenius norm of ``A B^T`` for each head, without forming the product.

    For queries and keys pass ``W_Q, W_K``; for values and outputs ``W_V, W_O^T``.
    """
    grams = (a.mT @ a) * (b.mT @ b)
    return grams.sum((-1, -2)).clamp(min=0).sqrt()


def heads_of(parameters: Parameters, model: nn.Module | None = None) -> Iterator[HeadWeights]:
    """Yield the heads of a model, attention module by attention module.

    A TransformerLens model says itself where its attention is, and often what its matrices are;
    otherwise they are found among the named parameters. Modules whose heads cannot be told apart
    are skipped: the number of heads is unknown, the module has experts, a joint projection serves
    cross-attention, or no rule knows the layout.

    Args:
        parameters: The parameters by name.
        model: The model that they belong to, where there is one.
    """
    names: dict[str, dict[str, str]] = {}
    for name, place in parameters.places.items():
        if place.projection and not place.bias:
            names.setdefault(place.attention, {})[place.projection] = name
    seen = set()
    if model is not None and is_lens_model(model):
        paths = {
            identity(tensor.memory): parameters.places[name].attention
            for name, tensor in parameters.tensors.items()
            if tensor.memory is not None and parameters.places[name].attention
        }
        for site in places(paths_with_patterns(model)):
            module = model.get_submodule(site.path)
            own = (identity(parameter.detach()) for parameter in module.parameters())
            path = next((paths[key] for key in own if key in paths), "")
            # A TransformerLens model shows what is adapted without its adapters.
            shown = None if any(adapted_layers(module)) else _shown_weights(module)
            weights = shown or _named_weights(parameters, names.get(path, {}))
            seen.add(path)
            if weights:
                yield HeadWeights(site.stack, site.layer, *weights, path=path)
    for path, of_module in names.items():
        weights = None if path in seen else _named_weights(parameters, of_module)
        if weights:
            place = parameters.places[next(iter(of_module.values()))]
            yield HeadWeights(place.label_stack, place.layer or 0, *weights, path=path)


def head_count(config: Mapping[str, Any], stack: str = "") -> int:
    """Return the number of heads that a model's settings name, 0 if they name none."""
    own = f"{stack or 'decoder'}_attention_heads"
    for key in (own, *_N_HEADS):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    tower = stack.partition("_")[0]
    keys = (stack, f"{stack}_config", f"{tower}_config", "text_config", "encoder")
    nested = (config[key] for key in keys if isinstance(config.get(key), Mapping))
    return next(filter(None, (head_count(part, stack) for part in nested)), 0)


def model_width(config: Mapping[str, Any]) -> int:
    """Return the width of the residual stream that a model's settings name, 0 if they name none."""
    widths = (config.get(key) for key in ("hidden_size", "d_model", "n_embd"))
    return next((int(size) for size in widths if size), 0)


def joint_rows(
    place: ParameterPlace, tensor: Tensor, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Find what of a joint projection, or of its bias, makes queries and keys, and what values.

    Returns:
        A view of the tensor as [out, ...], the numbers of its rows for queries and keys, and those
        for values; None for what is no joint projection, or one whose layout is not known.
    """
    n_heads = head_count(config, place.stack)
    # In cross-attention a joint projection makes keys and values alone.
    if place.projection not in ("joint", "interleaved") or place.cross or not n_heads:
        return None
    width = model_width(config) or (min(tensor.shape) if tensor.dim() == 2 else 0)
    d_head = int(config.get("head_dim") or 0) or width // n_heads
    if not d_head:
        return None
    weight = tensor.T if _is_conv1d(tensor) else tensor
    numbers = torch.arange(len(weight), device=tensor.device)
    rows = _split_joint(numbers, place.projection, n_heads, d_head, config)
    return None if rows is None else (weight, torch.cat([rows["q"], rows["k"]]), rows["v"])


def split_heads(
    matrices: Mapping[str, Tensor], n_heads: int, config: Mapping[str, Any]
) -> Matrices | None:
    """Split an attention module's matrices, by projection, into those of its heads.

    Returns:
        None for a layout that no rule knows.
    """
    if "o" not in matrices:
        return None
    o = matrices["o"]
    if o.dim() == 3:
        if any(name not in matrices or matrices[name].dim() != 3 for name in "qkv"):
            return None
        return matrices["q"], matrices["k"], matrices["v"], o
    if "kv_b" in matrices:
        return _latent(matrices, n_heads, config)
    joint = next((name for name in ("joint", "interleaved") if name in matrices), None)
    if joint:
        weight = matrices[joint]
        if _is_conv1d(weight):
            weight, o = weight.T, o.T
        rows = _split_joint(weight, joint, n_heads, o.shape[1] // n_heads, config)
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


def _split_joint(
    weight: Shaped[Tensor, "out *rest"],
    projection: str,
    n_heads: int,
    d_head: int,
    config: Mapping[str, Any],
) -> dict[str, Tensor] | None:
    """Split a joint projection into the rows of queries, keys and values; None if sizes do not fit.

    A plain one holds all queries, then all keys, then all values. An interleaved one holds the
    queries of one group of heads, their key and their value, group by group.
    """
    groups, odd = divmod(len(weight) - n_heads * d_head, 2 * d_head)
    if odd or groups < 1 or n_heads % groups:
        return None
    kind = config.get("model_type")
    # GPT-BigCode interleaves under a name that others use for the plain layout.
    bigcode = kind == "gpt_bigcode" and not config.get("multi_query", True)
    if projection == "interleaved" or bigcode:
        blocks = weight.unflatten(0, (groups, n_heads // groups + 2, d_head))
        parts = [blocks[:, :-2], blocks[:, -2:-1], blocks[:, -1:]]
        return {name: part.flatten(0, 2) for name, part in zip("qkv", parts, strict=True)}
    if kind == "codegen":
        # CodeGen was trained on four cores, and keeps queries, values and keys core by core.
        q, v, k = weight.unflatten(0, (4, -1)).split(n_heads * d_head // 4, dim=1)
        return {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)}
    sizes = [n_heads * d_head, groups * d_head, groups * d_head]
    return dict(zip("qkv", weight.split(sizes), strict=True))


def _is_conv1d(weight: Tensor) -> bool:
    """Whether a joint projection is [in, out]: it has more outputs than inputs."""
    return weight.dim() == 2 and weight.shape[0] < weight.shape[1]


def _latent(
    matrices: Mapping[str, Tensor], n_heads: int, config: Mapping[str, Any]
) -> Matrices | None:
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


def _named_weights(parameters: Parameters, names: Mapping[str, str]) -> Matrices | None:
    if not names:
        return None
    place = parameters.places[next(iter(names.values()))]
    n_heads = head_count(parameters.config, place.stack)
    if not n_heads or (place.cross and "joint" in names):
        return None
    matrices = {projection: parameters.read(name) for projection, name in names.items()}
    return split_heads(matrices, n_heads, parameters.config)


def _shown_weights(module: nn.Module) -> Matrices | None:
    try:
        q, k, v, o = (getattr(module, name).detach() for name in ("W_Q", "W_K", "W_V", "W_O"))
    except (AttributeError, NotImplementedError, ValueError, RuntimeError):
        # Latent, expert and per-layer geometries have no such view; their names are read.
        return None
    return (q, k, v, o) if q.dim() == k.dim() == v.dim() == o.dim() == 3 else None
