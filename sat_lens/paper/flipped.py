"""Constructed problems of limited accuracy: labels of which a share was flipped.

Two classes on two sides of a gap, so that right labels are easy to learn and flipped ones hard.
Bias-free ReLU networks learn them; they are homogeneous, so the norm at which growth stops is
known at every step (:mod:`sat_lens.theory.stationary`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_lens.theory.descent import Descent, descend


def flipped_run(layers: int, share: float, seed: int, points: int, steps: int) -> Descent:
    """Learn labels of which a share was flipped, by gradient descent on all points at once.

    Example:
        >>> flipped_run(2, 0.2, seed=0, points=50, steps=8).degree
        2
    """
    x, labels = flipped_problem(points, share, seed)
    return descend(
        relu_network([2, *[4] * (layers - 1), 1], seed),
        x,
        lambda f: F.softplus(-labels * f[:, 0]).mean(),
        steps=steps,
        learning_rate=0.3,
        degree=layers,
        accuracy=lambda f: float((f[:, 0].sign() == labels).double().mean()),
    )


def relu_network(sizes: Sequence[int], seed: int) -> nn.Sequential:
    """Build a bias-free ReLU network; its degree of homogeneity is the number of its layers.

    Example:
        >>> len(relu_network([2, 4, 1], seed=0))
        3
    """
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for wide, narrow in itertools.pairwise(sizes):
            layers += [nn.Linear(wide, narrow, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def flipped_problem(points: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points on two sides of a gap, labelled by side but for a share that is flipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(points, 2, generator=generator, dtype=torch.float64)
    x[:, 0] += 0.5 * x[:, 0].sign()
    labels = x[:, 0].sign()
    labels[torch.randperm(points, generator=generator)[: round(share * points)]] *= -1
    return x, labels
