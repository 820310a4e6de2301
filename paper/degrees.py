"""The degree of homogeneity of a network or of one of its parts, by measurement.

A function f of parameters theta is homogeneous of degree k if f(c theta) = c^k f(theta) for every
c > 0. A network need not be: then the exponent changes with c, and the outputs change direction.
Both are measured, so that a fitted exponent is never taken for a proof.

What to expect of a transformer without biases, counting the parameters that are multiplied: a
projection raises the degree by one, so attention with a saturated pattern and a ReLU feed-forward
layer have degree 2, and a norm has the degree of its gain, which is 1, or 0 without a gain. In a
pre-norm transformer each layer adds a term of its own degree to the residual stream (3 with gains,
5 where the feed-forward layer is gated), which comes to dominate the embedding (1). In a post-norm
transformer the last norm sets the degree. Soft attention has no degree; as c grows it approaches
that of saturated attention.

When not to use it: on a large model. Each result takes a float64 copy of the parameters.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from sat_lens.data import batches
from sat_lens.errors import ArgumentError, NonFiniteError, NotReachedError
from sat_lens.figures import growth_figure
from sat_lens.intervention import saturate
from sat_lens.models import model_name
from sat_lens.norms.measures import undisturbed
from sat_lens.norms.scaled import Which, scaled_parameters
from sat_lens.results import Provenance, Result
from sat_lens.sites import attention_sites

Forward = Callable[[Any, Any], Any]
SCALES = (1.0, 2.0**0.5, 2.0, 2.0**1.5, 4.0)
PART_SCALES = tuple(2.0**k for k in range(7))
# The largest residual of a power law that counts as exact.
HOMOGENEOUS = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Degree:
    """How an output grows with the parameters, as :func:`degree_of_homogeneity` measures it.

    Attributes:
        name: What was scaled, and where its output was read.
        scales: The factors c, ascending.
        norms: The norm of the output at each.
        cosines: The cosine of each output with that at the least c.
        value: The exponent, fitted to the logarithms of the norms by least squares.
        residual: What a power law does not explain: the outputs are divided by c^value, and this
            is their root mean square distance from their mean, relative to their root mean square.
    """

    name: str
    scales: tuple[float, ...]
    norms: Float[Tensor, " scale"]
    cosines: Float[Tensor, " scale"]
    value: float
    residual: float

    @property
    def local(self) -> tuple[float, ...]:
        """The exponent between each c and the one before it."""
        steps = torch.tensor(self.scales, dtype=torch.float64).log().diff()
        return tuple((self.norms.log().diff() / steps).tolist())

    @property
    def spread(self) -> float:
        """The difference between the largest and the smallest local exponent."""
        return max(self.local) - min(self.local)

    @property
    def homogeneous(self) -> bool:
        """Whether a power law explains all but rounding (a residual of at most 1e-6)."""
        return self.residual <= HOMOGENEOUS

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        kind = "homogeneous" if self.homogeneous else "not homogeneous"
        return (
            f"{self.name}: {kind}, degree {self.value:.3f} (local {min(self.local):.3f} to "
            f"{max(self.local):.3f}), residual {self.residual:.1e}"
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per factor c.

        Columns: ``norm`` of the output; ``exponent`` between this c and the one before, NaN at
        the first; ``cosine`` with the output at the first c.
        """
        columns = {
            "norm": self.norms.tolist(),
            "exponent": [math.nan, *self.local],
            "cosine": self.cosines.tolist(),
        }
        return pd.DataFrame(columns, index=pd.Index(self.scales, name="c"))

    def plot(self, title: str | None = None) -> Figure:
        """Draw the norm of the output against c, both on logarithmic axes."""
        return growth_figure(self.frame(), title or str(self), x="c", columns=["norm"])


def degree_of_homogeneity(
    model: nn.Module,
    inputs: Any,
    *,
    part: str = "",
    at: str | None = None,
    scales: Sequence[float] = SCALES,
    which: Which = "all",
    saturated: bool = False,
    forward: Forward | None = None,
) -> Degree:
    """Measure how an output grows when parameters are multiplied by c (float64, on a copy).

    Args:
        model: Any module; a TransformerLens model for ``saturated``.
        inputs: What the model is called with: a tensor, a tuple of positional arguments, or a dict
            of named ones.
        part: Path of the submodule whose parameters are multiplied; ``""`` is the whole model.
        at: Path of the submodule whose output is read; None is the part itself.
        scales: Factors c > 0, at least two.
        which: Which of its parameters are multiplied; see :func:`sat_lens.norms.scaled_parameters`.
        saturated: Whether attention is saturated (:func:`sat_lens.saturate`).
        forward: Runs the model as ``forward(model, inputs)``; None calls it with the inputs.

    Raises:
        ArgumentError: Fewer than two factors, one that is not positive, or no such submodule.
        NotReachedError: The submodule returned no tensor when the model ran.
        NonFiniteError: An output is zero, NaN or infinite, so it has no exponent.

    Example:
        >>> from torch import nn
        >>> import torch
        >>> from paper.degrees import degree_of_homogeneity
        >>> net = nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False))
        >>> print(degree_of_homogeneity(net, torch.ones(1, 3)).homogeneous)
        True
    """
    factors = _checked(scales)
    copied = in_double(model)
    read_at = part if at is None else at
    scaled, read = _submodule(copied, part), _submodule(copied, read_at)
    run = forward or call
    values = doubled(inputs)
    outputs = []
    saturation = saturate(copied) if saturated else contextlib.nullcontext()
    with undisturbed(copied), saturation:
        for c in factors:
            with scaled_parameters(scaled, c, which), _recorded(read) as seen:
                run(copied, values)
            outputs.append(_only(seen, read_at, c))
    return _degree(_name(model, part, at, saturated), factors, torch.stack(outputs))


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments, or a dict of named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor in a module's output: itself, the logits, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    items = output if isinstance(output, (tuple, list)) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float64."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"Needed a module; found {type(model).__name__}.")
    return copy.deepcopy(model).double()


def doubled(inputs: Any) -> Any:
    """Return inputs with every floating-point tensor in float64."""
    if isinstance(inputs, Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, tuple):
        return tuple(doubled(item) for item in inputs)
    if isinstance(inputs, Mapping):
        return {name: doubled(item) for name, item in inputs.items()}
    return inputs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PartDegrees(Result, kind="part degrees"):
    """Degrees of the parts of a transformer, as :func:`part_degrees` measures them.

    Attributes:
        provenance: The model and the versions.
        degrees: By part.
        left_out: Parts that are never called as a whole, and so have no output to measure.
    """

    degrees: dict[str, Degree]
    left_out: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """Return one row per part.

        Columns: ``degree``, the fitted exponent; ``spread`` of the local exponents;
        ``at_largest``, the local exponent at the largest c; ``residual`` of the power law;
        ``cosine`` between the outputs at the largest and the smallest c; ``homogeneous``.
        """
        rows = {
            name: {
                "degree": degree.value,
                "spread": degree.spread,
                "at_largest": degree.local[-1],
                "residual": degree.residual,
                "cosine": float(degree.cosines[-1]),
                "homogeneous": degree.homogeneous,
            }
            for name, degree in self.degrees.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("part")

    def plot(self, title: str | None = None) -> Figure:
        """Draw the local exponent of each part against c."""
        columns = {name: degree.frame()["exponent"] for name, degree in self.degrees.items()}
        named = title or f"Local degree of homogeneity: {self.provenance}"
        return growth_figure(pd.DataFrame(columns).iloc[1:], named, x="c", log_y=False)


def part_degrees(
    model: Any, data: Any, *, layer: int = 0, scales: Sequence[float] = PART_SCALES
) -> PartDegrees:
    """Measure the degree of every part of one layer of a transformer, and of the whole.

    The parts are the attention module and its siblings in the block, each with its own parameters
    multiplied; and the residual stream after the last layer and the output, with all parameters
    multiplied. Parts with attention in them are measured soft and saturated. Everything is in
    float64, except where the model's own code casts to float32 (the norms of many Hugging Face
    models do).

    Args:
        model: A TransformerLens model.
        data: Tokens, texts or batches; the first batch is read. See :func:`sat_lens.data.batches`.
        layer: The block whose parts are measured.
        scales: Factors c > 0, at least two.

    Raises:
        ArgumentError: There is no attention module in that layer.

    Example:
        >>> import sat_lens as sl
        >>> from paper.degrees import part_degrees
        >>> found = part_degrees(sl.load_model("demo"), ["import os"], scales=[1, 2])
        >>> f"{found.frame().loc['blocks.0.attn, saturated', 'degree']:.2f}"
        '2.00'
    """
    sites = attention_sites(model)
    here = [site for site in sites if site.layer == layer]
    if not here:
        layers = ", ".join(sorted({str(site.layer) for site in sites}))
        raise ArgumentError(f"No attention in layer {layer}; there is some in {layers}.")
    batch = next(iter(batches(model, data)))
    found: dict[str, Degree] = {}

    def record(name: str, part: str, at: str, saturated: bool) -> None:
        found[name] = degree_of_homogeneity(
            model,
            batch,
            part=part,
            at=at,
            scales=scales,
            saturated=saturated,
            forward=lambda m, b: b.run(m),
        )

    attention = {site.path for site in here}
    left_out = []
    for part in _parts(model, here[0].path):
        try:
            record(part, part, part, False)
        except NotReachedError:
            left_out.append(part)
        if part in attention:
            record(f"{part}, saturated", part, part, True)
    last = sites[-1].path.rpartition(".")[0]
    for name, at in (("residual stream", last), ("output", "")):
        record(name, "", at, False)
        record(f"{name}, saturated", "", at, True)
    return PartDegrees(Provenance(model_name(model)), found, tuple(left_out))


def _parts(model: Any, attention: str) -> list[str]:
    """Return the paths of an attention module and its siblings, as far as they have parameters."""
    block = attention.rpartition(".")[0]
    children = model.get_submodule(block).named_children()
    named = [(name, child) for name, child in children if not name.startswith("_original")]
    return [f"{block}.{name}" for name, child in named if any(True for _ in child.parameters())]


def _degree(name: str, factors: tuple[float, ...], outputs: Tensor) -> Degree:
    rows = outputs.flatten(1)
    norms = rows.norm(dim=1)
    logs = torch.tensor(factors, dtype=torch.float64).log()
    spread = logs - logs.mean()
    value = float((spread * norms.log()).sum() / spread.square().sum())
    levelled = rows * (-value * logs).exp()[:, None]
    left = levelled - levelled.mean(0)
    return Degree(
        name=name,
        scales=factors,
        norms=norms,
        cosines=torch.cosine_similarity(rows, rows[:1]),
        value=value,
        residual=float(left.norm() / levelled.norm()),
    )


def _checked(scales: Sequence[float]) -> tuple[float, ...]:
    factors = tuple(sorted({float(c) for c in scales}))
    if len(factors) < 2 or factors[0] <= 0 or not math.isfinite(factors[-1]):
        raise ArgumentError(f"Needed at least two positive factors c; found {list(scales)}.")
    return factors


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        near = ", ".join(name for name, _ in model.named_children())
        raise ArgumentError(f"There is no submodule {path!r}; the model has {near}.") from error


@contextlib.contextmanager
def _recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            seen.append(tensor.detach().double())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _only(seen: list[Tensor], path: str, c: float) -> Tensor:
    if not seen:
        raise NotReachedError(
            f"{path or 'The model'} returned no tensor when the model ran; read another submodule "
            "with at=."
        )
    output = seen[-1]
    size = float(output.norm())
    if size == 0 or not math.isfinite(size):
        raise NonFiniteError(
            f"At c = {c:g} the output of {path or 'the model'} has the norm {size}, which has no "
            "exponent. Use other factors or inputs."
        )
    return output


def _name(model: nn.Module, part: str, at: str | None, saturated: bool) -> str:
    words = [part or type(model).__name__]
    if at is not None and at != part:
        words.append(f"read at {at or 'the output'}")
    return ", ".join([*words, *(["attention saturated"] if saturated else [])])
