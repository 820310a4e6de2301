"""What is counted before reading is what reading then gives."""

from __future__ import annotations

import pytest
import torch

from sat_lens.data import batch_sizes, batches

TOKENS = torch.arange(3, 24).reshape(7, 3)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8])
@pytest.mark.parametrize(
    "data", [TOKENS, TOKENS[0], "import os", ["import os", "x = 1", "y"], [TOKENS, TOKENS[0]]]
)
def test_counted_and_read_are_the_same(demo, data, batch_size):
    assert batch_sizes(data, batch_size) == [b.size for b in batches(demo, data, batch_size)]


def test_what_only_reading_would_tell():
    for data in (iter(["x"]), [{"text": "x"}], ["x", TOKENS], {"input": TOKENS}, 3):
        assert batch_sizes(data, 2) is None
