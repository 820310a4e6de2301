"""How much of a norm is mere rescaling: pairs of matrices of which only the product counts.

Scores see ``W_Q`` and ``W_K`` only as ``W_Q W_K^T``, and what a head writes sees ``W_V`` and
``W_O`` only as ``W_V W_O``: an invertible matrix A may go into the one and its inverse into the
other. The same holds, with a positive number, for each neuron of a ReLU layer and, whatever the
gate, for each neuron of the linear branch of a gated layer. Such changes alter the norm and not the
network, so part of every raw norm is arbitrary.

By the inequality of arithmetic and geometric means ``|P|^2 + |R|^2 >= 2 |P| |R|``, with equality
where one number has balanced the pair. Over all invertible A the least ``|P A|^2 + |R A^-T|^2`` is
twice the nuclear norm of ``P R^T`` (the variational form of that norm, see Srebro, Rennie and
Jaakkola 2004); ``P = U S^1/2`` and ``R = V S^1/2`` from the singular value decomposition of the
product attain it.

Biases are left out of these norms, although they belong to the symmetry: a bias of queries, keys,
values or neurons is multiplied as its matrix is. Other symmetries (between layers, through norms)
are not considered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sat_lens import figures
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.models import model_name
from sat_lens.norms.heads import HeadWeights, heads_of, model_width
from sat_lens.norms.sources import Parameters, module_parameters, squared_norm, wide
from sat_lens.results import Provenance, Result, largest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QK, VO, MLP = "W_Q, W_K", "W_V, W_O", "mlp"
_RELU = ("relu", "leaky_relu")
_ACTIVATION = ("act_fn", "hidden_act", "activation_function", "feed_forward_proj", "activation")
_ROTARY = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_pct", "rotary_dim", "rotary")
_ADJACENT = ("gptj", "codegen", "cohere", "cohere2", "glm", "glm4")
_IN = ("in", "up_proj", "c_fc", "fc1", "lin1", "linear1", "w_in", "fc_in", "wi")
_GATED_IN = ("in", "up_proj", "w_in", "w3", "wi_1")
_GATE = ("gate", "gate_proj", "w_gate", "w1", "wi_0")
_OUT = ("out", "down_proj", "c_proj", "fc2", "lin2", "linear2", "w_out", "fc_out", "wo", "w2")

# The label of a pair, which pair it is, and its squared norms.
Row = tuple[str, str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RescalingShare(Result, kind="rescaling share"):
    """How much of each pair's squared norm is mere rescaling; made by :func:`rescaling_share`.

    Attributes:
        provenance: The model and the versions.
        labels: The head of each pair, the heads that share keys and values (``"L0H0-3"``), or the
            layer (``"L0"``).
        pairs: Which pair: ``"W_Q, W_K"``, ``"W_V, W_O"`` or ``"mlp"``.
        squares: Squared norms of each pair: raw, balanced, and least over all its symmetries.
        total: The squared norm of all parameters of the model.
        notes: What was left out, in words.
    """

    labels: tuple[str, ...]
    pairs: tuple[str, ...]
    squares: Float[Tensor, "pair 3"]
    total: float
    notes: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """Return one row a pair, indexed by label and pair.

        Columns: ``raw``, ``balanced`` and ``minimal``, norms of the two matrices together as they
        are, after one number has balanced them, and after the best of all that leaves the network
        as it is; ``share_balanced`` and ``share_minimal``, the shares of the raw squared norm that
        this removes.
        """
        raw, balanced, minimal = self.squares.T
        columns = {
            "raw": raw.sqrt(),
            "balanced": balanced.sqrt(),
            "minimal": minimal.sqrt(),
            "share_balanced": 1 - balanced / raw,
            "share_minimal": 1 - minimal / raw,
        }
        index = pd.MultiIndex.from_arrays([self.labels, self.pairs], names=["label", "pair"])
        return pd.DataFrame({k: v.tolist() for k, v in columns.items()}, index=index)

    @property
    def share(self) -> float:
        """The share of the model's whole squared norm that is mere rescaling of these pairs."""
        return float((self.squares[:, 0] - self.squares[:, 2]).sum()) / self.total

    def plot(self, title: str | None = None) -> Figure:
        """Draw the share that the best rescaling removes, pair by pair in the model's order."""
        by_pair = self.frame()["share_minimal"].unstack("pair", sort=False)
        drawn = by_pair.reindex(list(dict.fromkeys(self.labels))).reset_index(drop=True)
        return figures.growth_figure(
            drawn.rename_axis("pair, in the model's order"),
            title or f"Share of the squared norm that is rescaling: {self.provenance}",
            x="pair, in the model's order",
            log_x=False,
            log_y=False,
        )

    def _lines(self) -> list[str]:
        shares = self.frame()["share_minimal"]
        shares.index = pd.Index([f"{label} ({pair})" for label, pair in shares.index])
        return [
            f"{self.share:.2%} of the model's squared norm is rescaling",
            f"Largest shares of a pair's squared norm: {largest(shares)}",
        ]

    def _check(self) -> None:
        if not len(self.labels) == len(self.pairs) == len(self.squares):
            raise ValueError("labels, pairs and squares differ in length")


def rescaling_share(model: Any) -> RescalingShare:
    """Measure how much of a model's norm is mere rescaling of weight pairs.

    Heads that share keys and values are measured as one pair. With rotary positions, queries and
    keys can exchange only one number for each plane of rotation; where the planes are not known to
    be (i, i + d/2), a single number is used. Pairs with a norm between projection and scores are
    left out, as are feed-forward layers that are neither ReLU nor gated.

    Args:
        model: A TransformerLens model or any other module.

    Raises:
        UnsupportedModelError: No pair was found.
        ModelError: The model has no parameters.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.norms import rescaling_share
        >>> shares = rescaling_share(sl.load_model("demo"))
        >>> 0 < shares.share < 1
        True
    """
    parameters = module_parameters(model)
    rotary = rotary_kind(parameters.config)
    normed, normed_values = parameters.normed(model, "qk"), parameters.normed(model, "v")
    rows: list[Row] = []
    for module in heads_of(parameters, model):
        attention = _attention_rows(module, rotary)
        rows += [row for row in attention if not (normed_values if row[1] == VO else normed)]
    rows += _mlp_rows(parameters)
    if not rows:
        raise UnsupportedModelError(
            f"{type(model).__name__} shows no weight pair: no heads that could be told apart, and "
            "no feed-forward layer that is ReLU or gated."
        )
    notes = []
    if normed:
        notes.append("Queries and keys are normalised: their pairs are left out.")
    if normed_values:
        notes.append("Values are normalised: their pairs are left out.")
    if not any(pair == MLP for _, pair, _ in rows):
        notes.append("No feed-forward layer was found to be ReLU or gated.")
    if rotary:
        notes.append(f"Positions are rotary ({rotary}): fewer rescalings of queries and keys.")
    labels, pairs, squares = zip(*rows, strict=True)
    total = sum(squared_norm(parameters.read(name)) for name in parameters.shapes)
    provenance = Provenance(model_name(model))
    return RescalingShare(provenance, labels, pairs, torch.stack(squares), total, tuple(notes))


def pair_squares(
    first: Float[Tensor, "rows inner"], second: Float[Tensor, "others inner"], blocks: int = 1
) -> Float[Tensor, "3"]:
    """Return the squared norms of a pair: raw, balanced by one number, and least.

    Args:
        first: One matrix; the network sees ``first @ second.T`` alone.
        second: The other.
        blocks: How many independent blocks the symmetry has: 1 where any invertible matrix may
            stand between the two, the inner size where only one number for each dimension may.
    """
    if first.shape[1] % blocks:
        raise ArgumentError(f"{blocks} blocks do not divide {first.shape[1]} dimensions.")
    a, b = wide(first.detach()), wide(second.detach())
    raw = a.square().sum() + b.square().sum()
    by_block = (t.unflatten(1, (blocks, -1)).transpose(0, 1) for t in (a, b))
    return torch.stack([raw, 2 * a.norm() * b.norm(), 2 * nuclear_norm(*by_block).sum()])


def nuclear_norm(
    first: Float[Tensor, "*batch rows inner"], second: Float[Tensor, "*batch others inner"]
) -> Float[Tensor, "*batch"]:
    """Return the sum of the singular values of ``first @ second.T``, without forming it."""
    small_a, small_b = (torch.linalg.qr(t, mode="r").R for t in (first, second))
    return torch.linalg.svdvals(small_a @ small_b.mT).sum(-1)


def rotary_kind(config: Mapping[str, Any]) -> str:
    """Return which planes rotary positions turn: ``""`` for none, ``"halves"``, or ``"other"``."""
    native = config.get("positional_embedding_type") == "rotary"
    if not native and not any(config.get(key) for key in _ROTARY):
        return ""
    partial = float(config.get("partial_rotary_factor") or config.get("rotary_pct") or 1) < 1
    partial |= bool(config.get("rotary_dim")) or native
    return "other" if partial or config.get("model_type") in _ADJACENT else "halves"


def _attention_rows(module: HeadWeights, rotary: str) -> Iterator[Row]:
    groups = len(module.k)
    per_group = len(module.q) // groups
    for group in range(groups):
        heads = slice(group * per_group, (group + 1) * per_group)
        label = module.labels[heads.start]
        label += f"-{heads.stop - 1}" if per_group > 1 else ""
        yield label, QK, _qk_squares(module.q[heads].flatten(0, 1), module.k[group], rotary)
        outputs = module.o[heads].permute(0, 2, 1).flatten(0, 1)
        yield label, VO, pair_squares(module.v[group], outputs)


def _qk_squares(q: Tensor, k: Tensor, rotary: str) -> Tensor:
    squares = pair_squares(q, k)
    if not rotary:
        return squares
    if rotary == "other":
        return squares[[0, 1, 1]]
    planes = [wide(t).unflatten(1, (2, -1)).square().sum((0, 1)).sqrt() for t in (q, k)]
    squares[2] = 2 * (planes[0] * planes[1]).sum()
    return squares


def _mlp_rows(parameters: Parameters) -> Iterator[Row]:
    places = parameters.places
    modules: dict[str, dict[str, str]] = {}
    for name, shape in parameters.shapes.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        if places[name].component == "mlp" and not places[name].bias and len(shape) == 2:
            modules.setdefault(parent, {})[leaf.lower()] = name
    for leaves in modules.values():
        pair = _mlp_pair(leaves, parameters.config)
        if pair is not None:
            reads, writes = (parameters.read(name) for name in pair)
            if _columns_are_neurons(reads, "w_in" in leaves, parameters.config):
                reads, writes = reads.T, writes.T
            yield places[pair[0]].layer_label, MLP, pair_squares(reads.T, writes, blocks=len(reads))


def _mlp_pair(leaves: Mapping[str, str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    gated = any(leaf in leaves for leaf in _GATE)
    known = [str(config[key]).lower() for key in _ACTIVATION if isinstance(config.get(key), str)]
    if not gated and (not known or known[0] not in _RELU):
        return None
    inner = next((leaves[leaf] for leaf in (_GATED_IN if gated else _IN) if leaf in leaves), None)
    outer = next((leaves[leaf] for leaf in _OUT if leaf in leaves), None)
    return None if inner is None or outer is None else (inner, outer)


def _columns_are_neurons(reads: Tensor, named_so: bool, config: Mapping[str, Any]) -> bool:
    """Whether a matrix is [in, out], as in TransformerLens's own W_in and in GPT-2."""
    width = model_width(config)
    return named_so or (len(reads) == width and reads.shape[1] != width)
