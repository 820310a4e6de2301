"""Norms of a model's parameters: total, by layer, by component, by head.

When not to use it: to compare two different models. Norms grow with width and depth; follow one
model through its training instead (:func:`sat_lens.norm_growth`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence, Set
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sat_lens import figures
from sat_lens._checks import check_module
from sat_lens.errors import ArgumentError, NonFiniteError
from sat_lens.models import model_name
from sat_lens.norms.heads import HEAD_NORMS, heads_of, joint_rows
from sat_lens.norms.names import COMPONENTS, ParameterPlace
from sat_lens.norms.sources import Parameters, module_parameters, squared_norm
from sat_lens.results import Provenance, Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = Literal["component", "layer", "head", "parameter"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ParameterNorms(Result, kind="parameter norms"):
    """Norms of one model's parameters; made by :func:`parameter_norms`.

    Attributes:
        provenance: The model and the versions.
        names: The parameters; one that holds several components stands once for each.
        components: The component of each, one of ``COMPONENTS``.
        layers: The layer of each, such as ``"L3"`` or ``"decoder.L3"``, or ``"outside"``.
        squares: The squared norm of each.
        sizes: The number of elements of each.
        labels: The heads that could be told apart, such as ``"L3H0"``.
        heads: Norms of each head, in the order of ``HEAD_NORMS``.
        notes: What the norms and the products of the heads leave out, in words.
    """

    names: tuple[str, ...]
    components: tuple[str, ...]
    layers: tuple[str, ...]
    squares: Float[Tensor, " parameter"]
    sizes: Int[Tensor, " parameter"]
    labels: tuple[str, ...]
    heads: Float[Tensor, "head norm"]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The Euclidean norm of all parameters, tied ones counted once."""
        return math.sqrt(float(self.squares.sum()))

    def frame(self, by: Table = "component") -> pd.DataFrame:
        """Return a table of norms.

        Args:
            by: ``"component"``, ``"layer"`` (one column a component, and ``total``), ``"head"``
                (raw norms ``W_Q``, ``W_K``, ``W_V``, ``W_O``, and ``qk_product`` and
                ``ov_product``, the norms of ``W_Q W_K^T`` and ``W_V W_O``, which rescaling a pair
                cannot change), or ``"parameter"``.

        Raises:
            ArgumentError: ``by`` is none of these.
        """
        if by == "head":
            index = pd.Index(self.labels, name="label")
            return pd.DataFrame(self.heads.tolist(), index=index, columns=list(HEAD_NORMS))
        fields = {"component": self.components, "layer": self.layers}
        numbers = {"square": self.squares.tolist(), "size": self.sizes.tolist()}
        rows = pd.DataFrame({"parameter": self.names, **fields, **numbers})
        if by == "parameter":
            rows["norm"] = rows.pop("square") ** 0.5
            return rows.set_index("parameter")
        if by == "component":
            sums = rows.groupby("component")[["square", "size"]].sum()
            sums = sums.reindex([name for name in COMPONENTS if name in sums.index])
            squares = sums.pop("square")
            sums.insert(0, "share", squares / squares.sum())
            sums.insert(0, "norm", squares**0.5)
            return sums
        if by == "layer":
            grid = rows.pivot_table(
                "square", "layer", "component", aggfunc="sum", fill_value=0.0, sort=False
            )
            grid = grid[[name for name in COMPONENTS if name in grid.columns]]
            grid["total"] = grid.sum(axis=1)
            return grid**0.5
        raise ArgumentError(f"by is component, layer, head or parameter; found {by!r}.")

    def summary(self) -> dict[str, float]:
        """Return one row of numbers: the total, each component, means over heads of the products.

        Keys are ``norm``, ``norm_<component>``, ``qk_product`` and ``ov_product``.
        """
        components = self.frame("component")["norm"].to_dict()
        row = {"norm": self.total}
        row |= {f"norm_{str(k).replace(' ', '_')}": float(v) for k, v in components.items()}
        if self.labels:
            means = dict(zip(HEAD_NORMS, self.heads.mean(0).tolist(), strict=True))
            row |= {name: means[name] for name in ("qk_product", "ov_product")}
        return row

    def plot(self, title: str | None = None) -> Figure:
        """Draw the norms of the components, block by block in the model's order."""
        blocks = self.frame("layer").drop(index="outside", errors="ignore")
        blocks = blocks.loc[:, (blocks > 0).any()]
        return figures.growth_figure(
            blocks.set_axis(range(len(blocks)), axis=0),
            title or f"Parameter norms by layer: {self.provenance}",
            x="block",
            log_x=False,
            log_y=False,
        )

    def _lines(self) -> list[str]:
        words = {"share": "share of the squared norm", "size": "parameters"}
        table = self.frame().round(4).rename(columns=words)
        return [f"Norm {self.total:.4g}", *str(table).splitlines()]

    def _check(self) -> None:
        for name in ("components", "layers", "squares", "sizes"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"{name} has not one entry for each of {len(self.names)} names")
        if self.heads.shape != (len(self.labels), len(HEAD_NORMS)):
            raise ValueError(f"heads has the shape {list(self.heads.shape)}")


def parameter_norms(model: nn.Module) -> ParameterNorms:
    """Measure the norms of all parameters (Merrill et al. 2021, section 3).

    Works for a TransformerLens model, a Hugging Face model and any other module; heads are told
    apart where the model says how many it has and names its projections in a known way.

    The raw norms are what the paper follows. They also change when a weight pair is rescaled, which
    changes no output; ``qk_product`` and ``ov_product`` of a head do not.

    Adapters, such as LoRA's, count as after merging those that are active.

    Args:
        model: Any module with parameters.

    Raises:
        ArgumentError: It is no module.
        NonFiniteError: A parameter holds NaN or infinity; the message names it.
        ModelError: The model has no parameters, or only quantised ones.

    Example:
        >>> import sat_lens as sl
        >>> norms = sl.parameter_norms(sl.load_model("demo"))
        >>> norms.frame("head").shape
        (32, 6)
    """
    check_module(model)
    return norms_of(module_parameters(model), model, model_name(model))


def norms_of(
    parameters: Parameters, model: nn.Module | None = None, name: str = ""
) -> ParameterNorms:
    """Measure the norms of named parameters; the model, where there is one, shows its heads."""
    rows: list[tuple[str, str, str, float, int]] = []
    for key, place in parameters.places.items():
        for component, part in _parts(parameters, key, place):
            square = squared_norm(part)
            if not math.isfinite(square):
                raise NonFiniteError(
                    f"The parameter {key} of {parameters.name} holds NaN or infinity. Take a "
                    "checkpoint from before the training diverged."
                )
            rows.append((key, component, place.layer_label, square, part.numel()))
    labels: list[str] = []
    heads = [torch.zeros(0, len(HEAD_NORMS), dtype=torch.float64)]
    told_apart = set()
    for module in heads_of(parameters, model):
        labels += module.labels
        heads.append(module.norms())
        told_apart.add(module.path)
    names, components, layers, squares, sizes = zip(*rows, strict=True)
    return ParameterNorms(
        provenance=Provenance(name or parameters.name),
        names=names,
        components=components,
        layers=layers,
        squares=torch.tensor(squares, dtype=torch.float64),
        sizes=torch.tensor(sizes),
        labels=tuple(labels),
        heads=torch.cat(heads),
        notes=_notes(parameters, told_apart, model),
    )


def _parts(
    parameters: Parameters, name: str, place: ParameterPlace
) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter's components; a joint projection serves two."""
    tensor = parameters.read(name)
    joint = joint_rows(place, tensor, parameters.config)
    if joint is None:
        yield place.component, tensor
    else:
        weight, qk_rows, v_rows = joint
        yield "qk", weight[qk_rows]
        yield "ov", weight[v_rows]


def _notes(
    parameters: Parameters, told_apart: Set[str], model: nn.Module | None
) -> tuple[str, ...]:
    """Say in words what norms and products leave out."""
    places, found = parameters.places, []
    if parameters.integers:
        found.append(
            "Integer parameters, such as quantised weights, have no norm and are left out, with "
            f"their adapters: {_first(parameters.integers)}."
        )
    if parameters.adapted:
        found.append(
            f"Adapters that are active count as after merging: {_first(parameters.adapted)}."
        )
    if any(place.bias and place.projection for place in places.values()):
        found.append("Projections have biases, which the products leave out.")
    normed = parameters.normed(model)
    if normed:
        found.append(
            f"Queries, keys, values or latents are normalised inside attention ({normed[0]} and "
            "others): the scale of what comes before such a norm has no effect."
        )
    if any(place.projection in ("kv_a", "kv_b") for place in places.values()):
        found.append("Attention is latent: products are of the factors multiplied out.")
    attention = dict.fromkeys(place.attention for place in places.values() if place.attention)
    unknown = [path for path in attention if path not in told_apart]
    if unknown:
        found.append(
            f"Heads could not be told apart in {_first(unknown)}: the layout or the number of "
            "heads is unknown."
        )
    return tuple(found)


def _first(names: Sequence[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} others' if names[1:] else ''}"
