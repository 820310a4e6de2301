"""Norms of a pair of matrices of which only the product counts.

By the inequality of arithmetic and geometric means ``|P|^2 + |R|^2 >= 2 |P| |R|``, with equality
where one number has balanced the pair. Over all invertible A the least ``|P A|^2 + |R A^-T|^2`` is
twice the nuclear norm of ``P R^T`` (the variational form of that norm); it is reached by
``P = U S^1/2`` and ``R = V S^1/2`` from the singular value decomposition of the product.

When not to use it: for whole models; :func:`sat_lens.norms.rescaling_share` finds the pairs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sat_lens.errors import ArgumentError


def pair_squares(
    first: Float[Tensor, "rows inner"], second: Float[Tensor, "others inner"], blocks: int = 1
) -> Float[Tensor, "3"]:
    """Give the squared norms of a pair: raw, balanced by one number, and least.

    Args:
        first: One matrix; the network sees ``first @ second.T`` alone.
        second: The other.
        blocks: Into how many blocks of its own the symmetry falls apart: 1 for any invertible
            matrix; the inner size for one number for each inner dimension.

    Raises:
        ArgumentError: The blocks do not divide the inner size.

    Example:
        >>> pair_squares(4 * torch.eye(2), torch.eye(2)).round().tolist()
        [34.0, 16.0, 16.0]
    """
    if first.shape[1] % blocks:
        raise ArgumentError(f"{blocks} blocks do not divide {first.shape[1]} dimensions.")
    a, b = first.detach().double(), second.detach().double()
    raw = a.square().sum() + b.square().sum()
    by_block = (t.unflatten(1, (blocks, -1)).transpose(0, 1) for t in (a, b))
    return torch.stack([raw, 2 * a.norm() * b.norm(), 2 * nuclear_norm(*by_block).sum()])


def balanced_pair(
    first: Float[Tensor, "rows inner"], second: Float[Tensor, "others inner"]
) -> tuple[Float[Tensor, "rows inner"], Float[Tensor, "others inner"]]:
    """Give the pair of least norm with the same product ``first @ second.T``.

    Multiply biases along: the first bias joins the first matrix as one more row.

    Example:
        >>> a, b = balanced_pair(4 * torch.eye(2), torch.eye(2))
        >>> torch.allclose(a @ b.T, 4 * torch.eye(2)), round(a.norm().item(), 4)
        (True, 2.8284)
    """
    basis_a, small_a = torch.linalg.qr(first)
    basis_b, small_b = torch.linalg.qr(second)
    u, s, vh = torch.linalg.svd(small_a @ small_b.mT)
    root = s.sqrt()
    pair = basis_a @ (u[:, : len(s)] * root), basis_b @ (vh[: len(s)].mT * root)
    # A product of lower rank needs fewer dimensions than there are.
    missing = (0, first.shape[1] - len(s))
    return nn.functional.pad(pair[0], missing), nn.functional.pad(pair[1], missing)


def nuclear_norm(
    first: Float[Tensor, "*batch rows inner"], second: Float[Tensor, "*batch others inner"]
) -> Float[Tensor, "*batch"]:
    """Give the sum of the singular values of ``first @ second.T``, without forming it."""
    small_a, small_b = (torch.linalg.qr(t, mode="r").R for t in (first, second))
    return torch.linalg.svdvals(small_a @ small_b.mT).sum(-1)
