"""Where norms grow: a small language model at every learning rate and weight decay of a grid.

All cells start from the same parameters and see the same batches; they train together
(:mod:`sat_lens.paper.batched`). Text is the source of Python's standard library, by character.

When not to use it: to choose settings for a large model. Where growth turns into shrinking depends
on the initial norm, on the number of steps and on the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sat_lens._checks import check_choice, check_count
from sat_lens.demo.corpus import corpus_name, held_out_texts, training_texts
from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.paper.batched import SGD, AdamW, CellsRun, Stack, cell, stacked, train_cells
from sat_lens.paper.measures import saturation
from sat_lens.paper.network import (
    Shape,
    SmallTransformer,
    characters,
    new_network,
    next_token_loss,
    windows,
)
from sat_lens.results import Provenance, read_result, write_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "growth grid"
Rule = Literal["adamw", "sgd"]
BATCH = 8
HELD_OUT = 16
CHARACTERS = 2_000_000
# A norm within this share of its start has neither grown nor shrunk.
STAYED = 0.01
# A cell whose held-out loss ends this much above its start, in nats, has diverged.
WORSE = 1.0
MEASURED = ("start_norm", "end_norm", "growth", "start_loss", "loss", "S", "lean")


@dataclasses.dataclass(frozen=True, eq=False)
class GrowthGrid:
    """Norms before and after training, a cell a setting; made by :func:`growth_grid`.

    Attributes:
        provenance: The text and the versions.
        optimiser: ``"adamw"`` or ``"sgd"``.
        momentum: Of SGD.
        seed: Of the initial parameters and the batches.
        steps: How many steps were taken.
        planned: How many were asked for.
        columns: One value a cell; see :meth:`frame`.
    """

    provenance: Provenance
    optimiser: str
    momentum: float
    seed: int
    steps: int
    planned: int
    columns: dict[str, Tensor]

    @property
    def complete(self) -> bool:
        """False if the run was interrupted: the numbers are those of the steps taken until then."""
        return self.steps == self.planned

    def frame(self) -> pd.DataFrame:
        """Return one row a cell.

        Columns: ``lr``, ``wd``, ``optimiser``, ``steps``; ``start_norm`` and ``end_norm`` of all
        parameters and their ratio ``growth``; held-out ``start_loss`` and ``loss`` (nats per
        character); ``S`` and ``lean`` at the end, as elsewhere in the library; ``outcome``:
        ``"grows"``, ``"stays"`` (within 1%), ``"shrinks"`` or ``"diverged"``; and ``broke_at``,
        the first step whose loss was not finite, 0 where all were. A diverged cell's loss ended
        more than 1 nat above its start, or was not finite; then its numbers are NaN.
        """
        table = pd.DataFrame({name: values.tolist() for name, values in self.columns.items()})
        table.insert(2, "optimiser", self.optimiser)
        table.insert(3, "steps", self.steps)
        table["outcome"] = [_outcome(row) for row in table.to_dict("records")]
        return table

    def plot(self, title: str | None = None) -> Figure:
        """Draw the growth of every cell; grey and hatched where it diverged."""
        from sat_lens.paper.drawing import growth_maps

        return growth_maps([self], title or f"Norm growth: {self.provenance}")

    def save(self, path: str | Path) -> None:
        """Write the result as one safetensors file with a JSON header."""
        meta = dataclasses.asdict(dataclasses.replace(self, columns={}))
        write_result(path, KIND, self.columns, meta | {"columns": list(self.columns)})

    @classmethod
    def load(cls, path: str | Path) -> GrowthGrid:
        """Read a result that :meth:`save` wrote.

        Raises:
            FileFormatError: The file is missing, broken, foreign, or holds something else.
        """
        tensors, meta = read_result(path, KIND)
        try:
            columns = {name: tensors[name] for name in meta["columns"]}
            own = meta | {"columns": columns, "provenance": Provenance(**meta["provenance"])}
            return cls(**own)
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} lacks or garbles an entry: {error}.") from error


def growth_grid(
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
    *,
    optimiser: Rule = "adamw",
    momentum: float = 0.0,
    steps: int = 500,
    shape: Shape | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GrowthGrid:
    """Train a small language model at every learning rate and weight decay, all together.

    The figures on AdamW and SGD in Merrill et al. 2021, arXiv 2010.09697. Learning rates are
    constant. AdamW's weight decay is taken off the parameters, SGD's is added to the gradient. An
    interrupt keeps what the steps taken until then gave.

    Args:
        learning_rates: Each above 0.
        weight_decays: Each 0 or above.
        optimiser: ``"adamw"`` or ``"sgd"``.
        momentum: Of SGD, in [0, 1); AdamW has none.
        steps: Steps of 8 windows of text each.
        shape: The model; None is 2 layers of 4 heads, width 32, context 32.
        seed: Seed of the initial parameters and the batches.
        progress: Whether to show a progress bar.

    Raises:
        ArgumentError: An empty axis, a value that is out of range or given twice, an unknown
            optimiser, AdamW with momentum, less than one step, or a shape that is none.

    Example:
        >>> grid = growth_grid([1e-3, 1e-2], [0.0], steps=2, progress=False)
        >>> grid.frame()[["lr", "wd", "outcome"]].shape
        (2, 3)
    """
    _check(optimiser, momentum, steps, seed)
    size = shape or Shape()
    if not isinstance(size, Shape):
        raise ArgumentError(f"shape is a sat_lens.paper.network.Shape; found {shape!r}.")
    axes = _axis("learning rate", learning_rates), _axis("weight decay", weight_decays, least=0.0)
    model = new_network(size, seed=seed)
    rates, decays = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    single = rates.float(), decays.float()
    rule = AdamW(*single) if optimiser == "adamw" else SGD(*single, momentum)
    text = characters(held_out_texts(), CHARACTERS)
    held_out = windows(text, size.context, HELD_OUT, seed)
    start = stacked(model, len(rates))
    before = {"start_norm": _norms(start), "start_loss": _loss(model, held_out).expand(len(rates))}
    run = train_cells(
        model, start, rule, _batches(size, steps, seed), next_token_loss,
        total=steps, progress=progress, name=optimiser,
    )  # fmt: skip
    columns = {"lr": rates, "wd": decays} | before | _after(model, run, held_out)
    columns["growth"] = columns["end_norm"] / columns["start_norm"]
    ordered = {name: columns[name] for name in ("lr", "wd", *MEASURED, "broke_at")}
    made_of = f"{size.layers} layers of {size.heads} heads, width {size.width}"
    where = Provenance(f"small transformer ({made_of})", corpus_name())
    return GrowthGrid(where, optimiser, momentum, seed, run.steps, steps, ordered)


def _batches(shape: Shape, steps: int, seed: int) -> Iterator[Int[Tensor, "batch context"]]:
    text = characters(training_texts(), CHARACTERS)
    for step in range(steps):
        yield windows(text, shape.context, BATCH, seed * 1_000_003 + step)


def _norms(parameters: Stack) -> Float[Tensor, " cell"]:
    squares = [stack.double().flatten(1).square().sum(1) for stack in parameters.values()]
    return torch.stack(squares).sum(0).sqrt()


def _after(model: SmallTransformer, run: CellsRun, held_out: Tensor) -> dict[str, Tensor]:
    """Measure every cell; what is not finite anywhere is NaN everywhere."""
    norms = _norms(run.parameters)
    rows = [
        _measured(model, cell(run.parameters, index), held_out)
        if run.broke_at[index] == 0 and norms[index].isfinite()
        else dict.fromkeys(("loss", "S", "lean"), math.nan)
        for index in range(len(norms))
    ]
    found = {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]
    }
    found["end_norm"] = norms.where(found["loss"].isfinite(), math.nan)
    return found | {"broke_at": run.broke_at}


def _measured(model: SmallTransformer, own: Stack, held_out: Tensor) -> dict[str, float]:
    trained = new_network(model.shape)
    trained.load_state_dict(own)
    found = saturation(trained, held_out)
    return {"loss": float(_loss(trained, held_out)), "S": found["S"], "lean": found["lean"]}


@torch.no_grad()
def _loss(model: SmallTransformer, held_out: Tensor) -> Float[Tensor, ""]:
    return next_token_loss(model(held_out), held_out).double()


def _outcome(row: dict[str, Any]) -> str:
    lost = not math.isfinite(row["loss"]) or row["loss"] > row["start_loss"] + WORSE
    if lost or row["broke_at"]:
        return "diverged"
    if abs(row["growth"] - 1) <= STAYED:
        return "stays"
    return "grows" if row["growth"] > 1 else "shrinks"


def _axis(name: str, values: Any, least: float | None = None) -> Float[Tensor, " value"]:
    """Read an axis: numbers above 0, or from ``least`` on."""
    try:
        axis = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        axis = torch.zeros(())
    in_range = axis > 0 if least is None else axis >= least
    fine = axis.dim() == 1 and len(axis) and bool((in_range & axis.isfinite()).all())
    if not fine or len(axis.unique()) < len(axis):
        raise ArgumentError(
            f"Each {name} is a number {'above 0' if least is None else f'from {least:g} on'}, "
            f"given once, in a list of at least one; found {values!r}."
        )
    return axis


def _check(optimiser: str, momentum: float, steps: int, seed: int) -> None:
    check_count("steps", steps)
    check_count("seed", seed, at_least=0)
    check_choice("optimiser", optimiser, get_args(Rule))
    if not 0 <= momentum < 1 or (momentum and optimiser == "adamw"):
        raise ArgumentError(
            f"Momentum is in [0, 1) and SGD's alone; found {momentum} with {optimiser}."
        )
