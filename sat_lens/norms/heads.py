"""The weights of single heads, and norms of their products that rescaling cannot change.

Multiplying ``W_Q`` by a and dividing ``W_K`` by a leaves every score as it was, so the norm of
either alone says nothing; that of ``W_Q W_K^T`` does not change. It is found from two d_head by
d_head Gram matrices, ``|A B^T|_F^2 = tr(A^T A B^T B)``, so no d_model by d_model matrix is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.norms.files import identity
from sat_lens.norms.layouts import head_count, split_heads
from sat_lens.norms.naming import parameter_places
from sat_lens.norms.sources import Parameters

if TYPE_CHECKING:
    from sat_lens.sites.naming import Place

HEAD_NORMS = ("W_Q", "W_K", "W_V", "W_O", "qk_product", "ov_product")
_PATTERN = ".hook_pattern"


@dataclasses.dataclass(frozen=True)
class HeadWeights:
    """The matrices of one attention module, head by head; keys and values by group of heads.

    Latent attention is given by what its factors multiply to. ``path`` is the module's name in the
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
    a: Float[Tensor, "head d_in d_head"], b: Float[Tensor, "head d_out d_head"]
) -> Float[Tensor, " head"]:
    """Give the Frobenius norm of ``A B^T`` for each head, without forming the product.

    For queries and keys pass ``W_Q, W_K``; for values and outputs ``W_V, W_O^T``.

    Example:
        >>> product_norm(torch.eye(4)[None], torch.eye(4)[None])
        tensor([2.])
    """
    grams = (a.mT @ a) * (b.mT @ b)
    return grams.sum((-1, -2)).clamp(min=0).sqrt()


def heads_of(parameters: Parameters, model: Any = None) -> Iterator[HeadWeights]:
    """Give the heads of a model, attention module by attention module.

    A TransformerLens model says itself where its attention is, and often what its matrices are;
    else they are found among the named parameters. Modules whose heads cannot be told apart (no
    number of heads known, experts inside attention, a joint projection in cross-attention, a layout
    that no rule knows) are passed over.

    Args:
        parameters: The parameters by name.
        model: The model that they belong to, where there is one.
    """
    places = parameter_places(parameters.shapes)
    modules: dict[str, dict[str, str]] = {}
    for name, place in places.items():
        if place.attention and place.role and not place.bias:
            modules.setdefault(place.attention, {})[place.role] = name
    seen = set()
    if hasattr(model, "hook_dict"):
        attention = {n: p.attention for n, p in places.items() if p.attention}
        paths = {identity(parameters.read(name)): path for name, path in attention.items()}
        for site, module in _lens_modules(model):
            own = (identity(parameter.detach()) for parameter in module.parameters())
            path = next((paths[key] for key in own if key in paths), "")
            weights = _shown_weights(module) or _named_weights(parameters, modules.get(path, {}))
            seen.add(path)
            if weights:
                yield HeadWeights(site.stack, site.layer, *weights, path=path)
    for path, names in modules.items():
        weights = None if path in seen else _named_weights(parameters, names)
        if weights:
            place = places[next(iter(names.values()))]
            yield HeadWeights(place.label_stack, place.layer or 0, *weights, path=path)


Matrices = tuple[Tensor, Tensor, Tensor, Tensor]


def _named_weights(parameters: Parameters, names: Mapping[str, str]) -> Matrices | None:
    if not names:
        return None
    place = parameter_places(parameters.shapes)[next(iter(names.values()))]
    n_heads = head_count(parameters.config, place.stack)
    if not n_heads or (place.cross and "joint" in names):
        return None
    matrices = {role: parameters.read(name) for role, name in names.items()}
    return split_heads(matrices, n_heads, parameters.config)


def _lens_modules(model: Any) -> Iterator[tuple[Place, nn.Module]]:
    from sat_lens.sites.naming import places

    points = {id(point): name for name, point in reversed(list(model.hook_dict.items()))}
    paths = [name.removesuffix(_PATTERN) for name in points.values() if name.endswith(_PATTERN)]
    for place in places(sorted(paths, key=paths.index, reverse=True)):
        with contextlib.suppress(AttributeError):
            # A layer that was taken out leaves its hook points behind.
            yield place, model.get_submodule(place.path)


def _shown_weights(module: nn.Module) -> Matrices | None:
    try:
        q, k, v, o = (getattr(module, name).detach() for name in ("W_Q", "W_K", "W_V", "W_O"))
    except (AttributeError, NotImplementedError, ValueError, RuntimeError):
        # Latent, expert and per-layer geometries have no such view; their names are read.
        return None
    return (q, k, v, o) if q.dim() == k.dim() == v.dim() == o.dim() == 3 else None


def _wide(tensor: Tensor) -> torch.dtype:
    # Apple's devices have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64
