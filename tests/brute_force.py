"""Sweeps by brute force: a forward pass a value, with hooks and blocks that a user could write.

Nothing of ``sat_lens.patching`` is used here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import sat_lens as sl

POINTS = {"z": "o.hook_in", "q": "q.hook_out", "k": "k.hook_out", "v": "v.hook_out"}
Group = list[tuple[str, int]]


def own(scores: Tensor) -> Tensor:
    """A transform of a user's own."""
    return torch.where(scores == -math.inf, scores, 1.7 * scores + scores.sin())


def bound(transform: Any, site: str, heads: tuple[int, ...]) -> Any:
    """Tell a transform that draws at random where it stands."""
    at = getattr(transform, "at", None)
    return at(site, heads) if at else transform


@dataclasses.dataclass(frozen=True)
class Rows:
    """A transform in one row, or in all rows but one."""

    transform: Any
    row: int
    inside: bool

    def at(self, site: str, heads: tuple[int, ...]) -> Rows:
        return dataclasses.replace(self, transform=bound(self.transform, site, heads))

    def __call__(self, scores: Tensor) -> Tensor:
        new = self.transform(scores)
        kept, changed = (scores, new) if self.inside else (new, scores)
        kept = kept.clone()
        kept[:, :, self.row] = changed[:, :, self.row]
        return kept


class Unbound:
    """A transform that has to be told where it stands before it is called."""

    def __call__(self, scores: Tensor) -> Tensor:
        raise AssertionError("nobody told this transform where it stands")


@dataclasses.dataclass(frozen=True)
class Recorder(Unbound):
    """A transform that changes nothing and keeps the scores of all heads, by site."""

    found: dict[str, Tensor]

    def at(self, site: str, _heads: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        def record(scores: Tensor) -> Tensor:
            self.found[site] = scores.clone()
            return scores

        return record


@dataclasses.dataclass(frozen=True)
class Recorded(Unbound):
    """A transform that puts recorded scores in the place of those that it gets."""

    given: Mapping[str, Tensor]
    row: int | None

    def at(self, site: str, heads: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
        def play(scores: Tensor) -> Tensor:
            rows = slice(None) if self.row is None else self.row
            new = scores.clone()
            new[:, :, rows] = self.given[site][:, list(heads)][:, :, rows]
            return new

        return play


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A model, a metric, and which transform stands for saturation."""

    model: Any
    metric: Callable[[Any], Tensor]
    transform: Any
    n_shared: int

    @property
    def sites(self) -> list[Any]:
        return sl.attention_sites(self.model)

    def label(self, path: str, head: int) -> str:
        return next(site for site in self.sites if site.path == path).label(head)

    def run(self, batch: Mapping[str, Any]) -> Any:
        arguments = dict(batch)
        return self.model(arguments.pop("input"), **arguments)

    def everywhere(self, transform: Any) -> contextlib.AbstractContextManager[Any]:
        if transform is None:
            return contextlib.nullcontext()
        return sl.replace_attention(self.model, transform)

    def local(self, batch: Any, group: Group, row: int | None, base: Any, new: Any) -> Tensor:
        """Change the group's patterns in the run; ``base`` is what all others go through."""
        labels = [self.label(*member) for member in group]
        others = [
            site.label(head)
            for site in self.sites
            for head in range(site.n_heads)
            if (site.path, head) not in group
        ]
        with torch.no_grad(), contextlib.ExitStack() as stack:
            if base is not None:
                stack.enter_context(sl.replace_attention(self.model, base, others))
            inside = new is not None
            transform = new if inside else base
            if row is not None:
                transform = Rows(transform, row, inside)
            elif not inside:
                return self.metric(self.run(batch))
            stack.enter_context(sl.replace_attention(self.model, transform, labels))
            return self.metric(self.run(batch))

    def from_run(
        self, batch: Any, group: Group, row: int | None, base: Any, component: str, given: Any
    ) -> Tensor:
        """Put a component of the group, recorded elsewhere, into a run."""
        with torch.no_grad(), self.everywhere(base), contextlib.ExitStack() as stack:
            if component == "pattern":
                labels = [self.label(*member) for member in group]
                played = Recorded(given, row)
                stack.enter_context(sl.replace_attention(self.model, played, labels))
            else:
                for path in {path for path, _ in group}:
                    heads = [head for other, head in group if other == path]
                    stack.enter_context(self._hooked(path, component, heads, row, given[path]))
            return self.metric(self.run(batch))

    def recorded(self, batch: Any, attention: Any, component: str) -> dict[str, Tensor]:
        """Record a component of all heads in a run whose heads all go through ``attention``."""
        found: dict[str, Tensor] = {}
        with torch.no_grad(), self.everywhere(attention), contextlib.ExitStack() as stack:
            if component == "pattern":
                stack.enter_context(sl.replace_attention(self.model, Recorder(found)))
            for site in [] if component == "pattern" else self.sites:
                handle = self._point(site.path, component).register_forward_hook(
                    lambda _m, _a, out, path=site.path: found.update({path: out.clone()})
                )
                stack.callback(handle.remove)
            self.run(batch)
        return found

    def _point(self, path: str, component: str) -> Any:
        return self.model.get_submodule(path).get_submodule(POINTS[component])

    @contextlib.contextmanager
    def _hooked(
        self, path: str, component: str, heads: list[int], row: int | None, given: Tensor
    ) -> Iterator[None]:
        n_heads = next(site for site in self.sites if site.path == path).n_heads
        n_parts = self.n_shared if component in "kv" else n_heads
        parts = sorted({head * n_parts // n_heads for head in heads})

        def put(_module: Any, _args: Any, out: Tensor) -> Tensor:
            new = out.clone()
            apart, source = (
                t if t.dim() == 4 else t.view(*t.shape[:2], n_parts, -1) for t in (new, given)
            )
            for part in parts:
                if row is None:
                    apart[:, :, part] = source[:, :, part]
                else:
                    apart[:, row, part] = source[:, row, part]
            return new

        handle = self._point(path, component).register_forward_hook(put)
        try:
            yield
        finally:
            handle.remove()
