"""The log: readable after a kill, continued where it stopped, and plain JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import tiny
import torch
import transformers
from torch import nn

from sat_lens.errors import ArgumentError, FileFormatError
from sat_lens.training import SaturationTracker, read_training_log

KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from sat_lens.training import SaturationTracker
assert "transformers.trainer" not in sys.modules
tracker, model = SaturationTracker(sys.argv[2], every=1), torch.nn.Linear(2, 2)
step = 0
while True:
    tracker.step(model, step)
    step += 1
    time.sleep(.01)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_a_readable_log_that_can_be_continued(tmp_path):
    path = tmp_path / "log.jsonl"
    root = os.path.dirname(os.path.dirname(__file__))
    child = subprocess.Popen([sys.executable, "-c", KILLED, root, str(path)])
    deadline = time.time() + 120
    while time.time() < deadline and (not path.exists() or path.read_text().count("\n") < 4):
        time.sleep(0.05)
    child.kill()
    child.wait()
    frame = read_training_log(path)
    assert frame.index.tolist() == list(range(len(frame)))
    assert len(frame) >= 3
    # As a kill in the middle of a write leaves it.
    with path.open("a") as file:
        file.write('{"step": 99, "norm": 1.')
    assert read_training_log(path).index.tolist() == frame.index.tolist()
    tracker = SaturationTracker(path, every=1)
    tracker.step(nn.Linear(2, 2), 1)
    tracker.step(nn.Linear(2, 2), 1000)
    tracker.close()
    again = read_training_log(path)
    assert again.index.tolist() == [*frame.index, 1000]
    assert again.loc[1, "norm"] == tracker.rows[0]["norm"]


def test_a_foreign_or_broken_log_is_refused(tmp_path):
    foreign = tmp_path / "notes.txt"
    for content in ("hello\n", "hello", '{"a": 1}\n', "[1]\n"):
        foreign.write_text(content)
        with pytest.raises(FileFormatError):
            SaturationTracker(foreign).step(nn.Linear(2, 2), 0)
        with pytest.raises(FileFormatError):
            read_training_log(foreign)
        assert foreign.read_text() == content
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_training_log(tmp_path / "none.jsonl")
    broken = tmp_path / "log.jsonl"
    SaturationTracker(broken).step(nn.Linear(2, 2), 0)
    broken.write_text(broken.read_text() + "x\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(FileFormatError, match="Line 3"):
        read_training_log(broken)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1e3}',
        '{"step": 1' + "0" * 30 + "}",
        '{"step": 1, "norm": "x"}',
        '{"step": 1, "norm": [1]}',
        '{"step": 1, "norm": {"a": 1}}',
        '{"step": 1, "norm": true}',
        '{"step": 1, "problem": 3}',
        "[" * 100_000,
    ],
)
def test_a_line_with_something_else_is_refused(tmp_path, line):
    path = tmp_path / "log.jsonl"
    SaturationTracker(path).step(nn.Linear(2, 2), 0)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FileFormatError, match="Line 3"):
        read_training_log(path)


def test_what_is_no_path_or_no_version(tmp_path, types_unchecked):
    for wrong in (None, 3):
        with pytest.raises(ArgumentError, match="given by its path"):
            read_training_log(wrong)
    path = tmp_path / "log.jsonl"
    for version in ('"x"', "null", "99"):
        path.write_text(f'{{"kind": "sat_lens training log", "format": {version}}}\n')
        with pytest.raises(FileFormatError, match="newer"):
            read_training_log(path)


def test_a_diverged_model_is_logged_and_no_error(tmp_path):
    model = nn.Linear(2, 2)
    tracker = SaturationTracker(tmp_path / "log.jsonl", every=1)
    tracker.step(model, 0)
    with torch.no_grad():
        model.bias[0] = float("nan")
    tracker.step(model, 1)
    frame = read_training_log(tmp_path / "log.jsonl")
    assert "bias" in frame.loc[1, "problem"]
    assert frame.loc[1:, "norm"].isna().all()


def test_numbers_without_a_value_are_null(tmp_path):
    uniform = tiny.hf_model("LlamaForCausalLM", transformers.LlamaConfig(**tiny.SIZE))
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    tracker = SaturationTracker(tmp_path / "log.jsonl", tiny.tokens(length=12))
    tracker.step(uniform, 0)
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
