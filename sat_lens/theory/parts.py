"""The degree of homogeneity of every part of a transformer: attention, feed-forward, norms, whole.

What to expect where there are no biases, counting the parameters that are multiplied: a projection
raises the degree by one, so attention with a saturated pattern and a ReLU feed-forward have degree
2, and a norm has the degree of its gain, which is 1, or 0 without one. In a pre-norm transformer
each layer adds what has a degree of its own to the stream (3 with gains, 5 where the feed-forward
is gated), and the embedding (1) is drowned; in a post-norm transformer the last norm sets the
degree. Soft attention has no degree, and nears that of saturated attention as c grows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from sat_lens import figures
from sat_lens.errors import ArgumentError, NotReachedError
from sat_lens.results import Provenance
from sat_lens.theory.degrees import Degree, degree_of_homogeneity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sat_lens.data import Batch

SCALES = tuple(2.0**k for k in range(7))


@dataclasses.dataclass(frozen=True, eq=False)
class PartDegrees:
    """Degrees of the parts of a transformer; made by :func:`part_degrees`.

    Attributes:
        provenance: The model and the versions.
        degrees: By part.
        left_out: Parts that are never called as a whole, so that they have no output to measure.
    """

    provenance: Provenance
    degrees: dict[str, Degree]
    left_out: tuple[str, ...] = ()

    def frame(self) -> pd.DataFrame:
        """Return one row a part.

        Columns: ``degree``, the fitted exponent; ``spread`` of the local exponents;
        ``at_largest``, the local exponent at the largest c; ``residual`` of the power law;
        ``cosine``, of the outputs at the largest and the least c; ``homogeneous``.
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
        return figures.growth_figure(pd.DataFrame(columns).iloc[1:], named, x="c", log_y=False)


def part_degrees(
    model: Any, data: Any, *, layer: int = 0, scales: Sequence[float] = SCALES
) -> PartDegrees:
    """Measure the degree of every part of one layer of a transformer, and of the whole.

    The parts are the submodules beside the layer's attention, each with its own parameters
    multiplied; the residual stream after the last layer and the output, with all of them. What
    holds attention is measured soft and saturated. Everything is in float64, as far as the model's
    own code does not turn to float32 (the norms of many Hugging Face models do).

    Args:
        model: A TransformerLens model.
        data: Tokens, texts or batches; the first batch is read. See :func:`sat_lens.data.batches`.
        layer: The block whose parts are measured.
        scales: Factors c > 0, at least two.

    Raises:
        ArgumentError: No attention module is in that layer.

    Example:
        >>> import sat_lens as sl
        >>> from sat_lens.theory import part_degrees
        >>> found = part_degrees(sl.load_model("demo"), ["import os"], scales=[1, 2])
        >>> f"{found.frame().loc['blocks.0.attn, saturated', 'degree']:.2f}"
        '2.00'
    """
    from sat_lens.data import batches
    from sat_lens.models import model_name
    from sat_lens.sites import attention_sites

    sites = attention_sites(model)
    here = [site for site in sites if site.layer == layer]
    if not here:
        layers = ", ".join(sorted({str(site.layer) for site in sites}))
        raise ArgumentError(f"No attention in layer {layer}; there is some in {layers}.")
    batch = next(iter(batches(model, data)))
    found: dict[str, Degree] = {}

    def measure(name: str, part: str, at: str, saturated: bool) -> None:
        found[name] = degree_of_homogeneity(
            model, batch, part=part, at=at, scales=scales, saturated=saturated, forward=_run
        )

    attention = {site.path for site in here}
    left_out = []
    for part in _parts(model, here[0].path):
        try:
            measure(part, part, part, False)
        except NotReachedError:
            left_out.append(part)
        if part in attention:
            measure(f"{part}, saturated", part, part, True)
    last = sites[-1].path.rpartition(".")[0]
    for name, at in (("residual stream", last), ("output", "")):
        measure(name, "", at, False)
        measure(f"{name}, saturated", "", at, True)
    return PartDegrees(Provenance(model_name(model)), found, tuple(left_out))


def _run(model: Any, batch: Batch) -> Any:
    return batch.run(model)


def _parts(model: Any, attention: str) -> list[str]:
    """Name the submodules beside an attention module that have parameters, itself included."""
    block = attention.rpartition(".")[0]
    children = model.get_submodule(block).named_children()
    named = [(name, child) for name, child in children if not name.startswith("_original")]
    return [f"{block}.{name}" for name, child in named if any(True for _ in child.parameters())]
