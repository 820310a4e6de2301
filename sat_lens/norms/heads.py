"""The weights of single heads, and norms of their products that rescaling cannot change.

Multiplying ``W_Q`` by a and dividing ``W_K`` by a leaves every score as it was, so the norm of
either alone says nothing; that of ``W_Q W_K^T`` does not change. It is found from two d_head by
d_head Gram matrices, ``|A B^T|_F^2 = tr(A^T A B^T B)``, so no d_model by d_model matrix is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sat_lens.norms.naming import ParameterPlace, parameter_places
from sat_lens.norms.sources import Parameters

HEAD_NORMS = ("W_Q", "W_K", "W_V", "W_O", "qk_product", "ov_product")
_PATTERN = ".hook_pattern"
_N_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")


@dataclasses.dataclass(frozen=True)
class HeadWeights:
    """The matrices of one attention module, head by head; keys and values by group of heads.

    Latent attention is given by what its factors multiply to.
    """

    stack: str
    layer: int
    q: Float[Tensor, "head d_model d_qk"]
    k: Float[Tensor, "group d_model d_qk"]
    v: Float[Tensor, "group d_model d_v"]
    o: Float[Tensor, "head d_v d_model"]

    @property
    def labels(self) -> list[str]:
        """The labels of the heads, as everywhere in this library."""
        prefix = f"{self.stack}." if self.stack else ""
        return [f"{prefix}L{self.layer}H{head}" for head in range(len(self.q))]

    def norms(self) -> Float[Tensor, "head norm"]:
        """Give the norms of :data:`HEAD_NORMS` for each head, in float64."""
        q, k, v, o = (t.to(_wide(t)) for t in (self.q, self.k, self.v, self.o))
        heads_per_group = len(q) // len(k)
        k, v = (t.repeat_interleave(heads_per_group, 0) for t in (k, v))
        raw = [t.flatten(1).norm(dim=1) for t in (q, k, v, o)]
        products = [product_norm(q, k), product_norm(v, o.transpose(-1, -2))]
        return torch.stack(raw + products, dim=1).double().cpu()


def product_norm(
    a: Float[Tensor, "head d_model d_head"], b: Float[Tensor, "head d_out d_head"]
) -> Float[Tensor, " head"]:
    """Give the Frobenius norm of ``A B^T`` for each head, without forming the product.

    For queries and keys pass ``W_Q, W_K``; for values and outputs ``W_V, W_O^T``.

    Example:
        >>> product_norm(torch.eye(4)[None], torch.eye(4)[None])
        tensor([2.])
    """
    grams = (a.mT @ a) * (b.mT @ b)
    return grams.sum((-1, -2)).clamp(min=0).sqrt()


def heads_of(parameters: Parameters) -> Iterator[HeadWeights]:
    """Find the heads of a model among its named parameters.

    Modules whose heads cannot be told apart (no number of heads known, experts inside attention, a
    layout that no rule knows) are passed over.
    """
    places = parameter_places(parameters.shapes)
    modules: dict[str, dict[str, str]] = {}
    for name, place in places.items():
        if place.attention and place.role and not place.bias:
            modules.setdefault(place.attention, {})[place.role] = name
    for names in modules.values():
        place = places[next(iter(names.values()))]
        n_heads = head_count(parameters.config, place.stack)
        if n_heads:
            matrices = {role: parameters.read(name) for role, name in names.items()}
            found = _split(matrices, n_heads, parameters.config)
            if found is not None:
                yield HeadWeights("cross" if place.cross else place.stack, place.layer or 0, *found)


def heads_of_lens_model(model: Any) -> Iterator[HeadWeights]:
    """Give the heads of a TransformerLens model's attention modules that show W_Q and its like."""
    from sat_lens.sites.naming import places

    points = {id(point): name for name, point in reversed(list(model.hook_dict.items()))}
    paths = [name.removesuffix(_PATTERN) for name in points.values() if name.endswith(_PATTERN)]
    for place in places(sorted(paths, key=paths.index, reverse=True)):
        try:
            module = model.get_submodule(place.path)
            weights = [getattr(module, name).detach() for name in ("W_Q", "W_K", "W_V", "W_O")]
        except (AttributeError, NotImplementedError, ValueError, RuntimeError):
            # Latent, expert and per-layer geometries have no such view; their names are read.
            continue
        if all(weight.dim() == 3 for weight in weights):
            yield HeadWeights(place.stack, place.layer, *weights)


def head_count(config: Mapping[str, Any], stack: str = "") -> int:
    """Read the number of heads off a model's settings; 0 if they do not say."""
    own = f"{stack or 'decoder'}_attention_heads"
    for key in (own, *_N_HEADS):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    parts = (config.get(name) for name in (stack, f"{stack}_config", "text_config", "encoder"))
    nested = (part for part in parts if isinstance(part, Mapping))
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
    if place.role not in ("joint", "interleaved") or not n_heads:
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


def _split(
    matrices: Mapping[str, Tensor], n_heads: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
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
    if rows is None or len(rows) < 3 or o.shape[1] % n_heads:
        return None
    d_v = o.shape[1] // n_heads
    d_qk = len(rows["k"]) * d_v // len(rows["v"])
    if any(len(rows[name]) % size for name, size in (("q", n_heads), ("k", d_qk), ("v", d_v))):
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


def _wide(tensor: Tensor) -> torch.dtype:
    # Apple's devices have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
