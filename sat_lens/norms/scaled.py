"""Parameters multiplied by a factor while a block runs: the paper's own road to saturation.

Multiplying all parameters by c is not attention-only saturation (:func:`sat_lens.saturate`).
Scores grow with c squared, but biases, gains of layer norms and MLPs grow too, each at a power of
its own; what they add drowns the residual stream, and the output has little in common with the
model's long before attention is saturated. On a pretrained sentence encoder the cosine to the model
was .19 at c = 1.5 and .01 at c = 2, while under attention-only saturation it was .66 (control:
random keys, .10). Read a result as a statement about the paper's construction; for one about
attention use ``which="qk"`` or :func:`sat_lens.saturate`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeVar, get_args

from torch import Tensor, nn

from sat_lens._checks import check_choice, check_module, check_number
from sat_lens.errors import ArgumentError, ModelError
from sat_lens.norms.heads import joint_rows
from sat_lens.norms.names import ParameterPlace, canonical_name, parameter_places, superseded
from sat_lens.norms.sources import config_of

Which = Literal["all", "attention", "qk", "matrices"]
Model = TypeVar("Model", bound=nn.Module)


@contextlib.contextmanager
def scaled_parameters(model: Model, c: float, which: Which = "all") -> Iterator[Model]:
    """Multiply parameters by c while the block lasts (Merrill et al. 2021, section 4).

    Afterwards the parameters hold the very bits that they held before, also if an exception or an
    interrupt ends the block, or several blocks end in another order than they began. Tied
    parameters are multiplied once. The block keeps copies as large as the parameters. Move or cast
    the model before the block, not in it.

    This is not attention-only saturation: biases, gains and MLPs grow as well, and the output soon
    has little to do with the model's; see the module's own text. With ``which="qk"`` scores are
    multiplied by c squared and nothing else changes, where queries and keys have no norms of
    their own.

    Args:
        model: A TransformerLens model or any other module.
        c: The factor, finite.
        which: ``"all"`` parameters; those of ``"attention"``; ``"qk"``, the queries' and keys'
            projections with their biases; or ``"matrices"``, all but biases and gains.

    Yields:
        The model.

    Raises:
        ArgumentError: ``c`` is not finite, ``which`` is unknown, or the model has no such
            parameters; at the end, the model was moved, cast or given other parameters in the
            block. Those that it had are back as they were nevertheless.
        ModelError: The model has parameters without values, or quantised ones.

    Example:
        >>> import torch
        >>> from sat_lens.norms import scaled_parameters
        >>> layer = torch.nn.Linear(2, 2)
        >>> with scaled_parameters(layer, 10.0):
        ...     large = layer.weight.norm()
        >>> round((large / layer.weight.norm()).item(), 4)
        10.0
    """
    check_module(model)
    check_number("c", c)
    check_choice("which", which, get_args(Which))
    block = _Block(model, float(c), which)
    try:
        block.begin()
        yield model
    finally:
        moved = block.end()
    if moved:
        raise ArgumentError(
            f"{moved[0]} was moved, cast or replaced while its model's parameters were scaled. The "
            "parameters that the model had are back, where and as they were; do such things before "
            "the block."
        )


class _Block:
    """What one block multiplied, and what was there before.

    Blocks over the same memory are a stack: to end one below the top, those above are undone, last
    first, and done again without it.
    """

    def __init__(self, model: nn.Module, c: float, which: Which) -> None:
        self.model, self.c, self.which = model, c, which
        self.memory: list[tuple[str, nn.Parameter, Tensor]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.parts: list[_Part] = []
        self.saved: list[Tensor] = []

    def begin(self) -> None:
        _open_blocks.append(self)
        self._multiply()

    def end(self) -> list[str]:
        """Undo this block, and name the parameters that were not where they had been."""
        above = self._above()
        for block in reversed(above):
            block._restore()
        moved = self._restore()
        _open_blocks.remove(self)
        for block in above:
            block._multiply()
        return moved

    def _multiply(self) -> None:
        self.memory = [(name, p, p.detach()) for name, p in self.model.named_parameters()]
        self.buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.parts = _parts(self.model, self.which)
        self.saved = [part.read().clone() for part in self.parts]
        for part, copy in zip(self.parts, self.saved, strict=True):
            part.write(copy * self.c)

    def _restore(self) -> list[str]:
        # An interrupt may have come before the copies were there; then nothing was multiplied.
        for part, copy in zip(self.parts, self.saved, strict=False):
            part.write(copy)
        now = dict(self.model.named_parameters())
        moved = [n for n, p, data in self.memory if now.get(n) is not p or not _same(p, data)]
        for _, parameter, data in self.memory:
            if not _same(parameter, data):
                parameter.data = data
        if moved:
            for module, name, buffer in self.buffers:
                module._buffers[name] = buffer
        return moved

    def _above(self) -> list[_Block]:
        touched, above = self._keys(), []
        for block in _open_blocks[_open_blocks.index(self) + 1 :]:
            if touched & block._keys():
                touched |= block._keys()
                above.append(block)
        return above

    def _keys(self) -> set[int]:
        return {key for _, p, data in self.memory for key in (id(p), data.data_ptr())}


_open_blocks: list[_Block] = []


def _same(parameter: Tensor, data: Tensor) -> bool:
    return parameter.dtype == data.dtype and parameter.data_ptr() == data.data_ptr()


@dataclasses.dataclass(frozen=True)
class _Part:
    """A parameter, or some rows of one."""

    tensor: Tensor
    rows: Tensor | None = None

    def read(self) -> Tensor:
        return self.tensor if self.rows is None else self.tensor[self.rows]

    def write(self, values: Tensor) -> None:
        if self.rows is None:
            self.tensor.copy_(values)
        else:
            self.tensor.index_copy_(0, self.rows, values)


def _parts(model: nn.Module, which: Which) -> list[_Part]:
    """Find the memory that ``which`` means, each stretch of it once."""
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} has no values (it is on the meta device). Load the weights.")
        if not parameter.is_floating_point() and parameter.dim() >= 2:
            raise ModelError(
                f"{name} holds integers, as quantised weights do, and cannot be multiplied. Load "
                "the model without quantisation."
            )
        if parameter.is_floating_point() and parameter.numel():
            named[canonical_name(name)] = parameter.detach()
    places = parameter_places(named)
    whole = [
        parameter for name, parameter in named.items() if _is_meant(places[name], parameter, which)
    ]
    parts = [_Part(tensor) for tensor in _without_overlap(whole)]
    if which == "qk":
        config, split = config_of(model), superseded(named)
        for name, tensor in named.items():
            joint = None if name in split else joint_rows(places[name], tensor, config)
            if joint is not None:
                weight, qk_rows, _ = joint
                parts.append(_Part(weight, qk_rows))
    if not parts:
        raise ArgumentError(
            f"{type(model).__name__} has no parameters of the kind {which!r}: none of its names "
            "says so. Use which='all', or 'matrices'."
        )
    return parts


def _is_meant(place: ParameterPlace, parameter: Tensor, which: Which) -> bool:
    if which == "matrices":
        return parameter.dim() >= 2 and not place.bias and place.component != "layer norm"
    if which == "attention":
        return bool(place.attention)
    return which == "all" or place.component == "qk"


def _without_overlap(parameters: list[Tensor]) -> list[Tensor]:
    """Keep each stretch of memory once: a bridge splits joint projections into views of them."""
    kept: list[Tensor] = []
    taken: dict[int, list[tuple[int, int]]] = {}
    for parameter in sorted(parameters, key=lambda p: -p.numel()):
        known = taken.setdefault(parameter.untyped_storage().data_ptr(), [])
        start = int(parameter.storage_offset())
        sides = zip(parameter.shape, parameter.stride(), strict=True)
        end = start + sum((size - 1) * stride for size, stride in sides)
        if not any(low <= start and end <= high for low, high in known):
            known.append((start, int(end)))
            kept.append(parameter)
    return kept
