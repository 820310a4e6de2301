"""The other processes of a run that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from sat_lens.errors import ArgumentError


@contextlib.contextmanager
def processes() -> Iterator[bool]:
    """Join the other processes where there are several; each then reads its share of the data.

    Yields:
        Whether this is the process that prints and writes.

    Raises:
        ArgumentError: The environment does not say how many processes there are, or they cannot
            find each other.
    """
    rank, count = _rank_and_count()
    if count == 1:
        yield True
        return
    import torch
    import torch.distributed as dist

    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"The {count} processes cannot find each other ({error}). Start them with torchrun."
        ) from error
    try:
        yield rank == 0
    finally:
        dist.destroy_process_group()


def _rank_and_count() -> tuple[int, int]:
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 1
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
    if all(value.isascii() and value.isdigit() for value in found.values()):
        rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
        if rank < count:
            return rank, count
    raise ArgumentError(
        "Several processes need RANK and WORLD_SIZE as torchrun sets them, with RANK below "
        f"WORLD_SIZE; found {found}. Start with torchrun, or unset both."
    )
