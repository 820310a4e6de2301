"""The benchmark of the kernel for the limit, on inputs small enough for Triton's interpreter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from bench import gpu

SMALL = gpu.Setting(context=48, dtype=torch.float32, size=16, heads=4, groups=4)


@pytest.fixture(scope="module")
def rows(device):
    return {row.way: row for row in gpu.rows_of(SMALL, device, rounds=1)}


def test_every_way_is_measured_or_says_why_not(rows):
    assert set(rows) == set(gpu.ways())
    for row in rows.values():
        assert (row.seconds is None) == bool(row.why_not)
    assert rows["sdpa, math"].seconds > 0


def test_the_limit_is_exact_and_its_ties_are(rows):
    for way in (gpu.LIMIT, "limit, eager"):
        assert rows[way].error < 1e-6
        assert rows[way].error_at_ties < 1e-6


def test_a_wrong_limit_would_be_noticed(device):
    exact = gpu.inputs(SMALL, device, whole=True)
    keys = torch.arange(SMALL.context, device=device)
    one_winner = dataclasses.replace(
        exact, key=exact.key + keys[:, None] * 1e-3, query=exact.query + 5
    )
    _, at_ties = gpu._errors(gpu.eager(one_winner), exact)
    assert at_ties > 0.01
    blank, _ = gpu._errors(torch.full_like(exact.value, torch.nan), exact)
    assert blank == torch.inf


def test_keys_may_serve_several_heads(device):
    shared = dataclasses.replace(SMALL, groups=2)
    call = gpu.inputs(shared, device, whole=True)
    torch.testing.assert_close(gpu.limit(call), gpu.eager(call))


def test_a_table_names_the_device_and_every_way(device):
    first, table = gpu.tables([SMALL], device, rounds=1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    assert name in first
    assert all(f"| {way} |" in table for way in gpu.ways())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Needed a GPU" in done.stderr
    assert "Traceback" not in done.stderr
