"""The bundled demo model: what it learned, what its log says, and that its recipe is one."""

import hashlib
import json
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sat_lens as sl
from paper.demo_training import LOG, Recipe, batch_at, train, write_model
from paper.network import log_spaced_steps
from sat_lens.data import text_windows
from sat_lens.demo import corpus
from sat_lens.models import DEMO_FOLDER

TINY = Recipe(steps=5, batch=2, context=16, vocab=300, layers=1, heads=2, d_model=16, d_head=8,
              d_mlp=16, warmup=2, bfloat16_autocast=False)  # fmt: skip


@pytest.fixture(scope="module")
def log():
    return json.loads(LOG.read_text())


@pytest.fixture(scope="module")
def windows(demo):
    return text_windows(demo, corpus.held_out_texts(), 256, 16)


def test_the_model_is_small_and_safe_to_load():
    names = {path.name for path in DEMO_FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".py", ".pkl"))]
    assert 2e6 < (DEMO_FOLDER / "model.safetensors").stat().st_size < 4e6
    weights = load_file(DEMO_FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}


@pytest.mark.slow
def test_it_predicts_source_that_it_was_not_trained_on(demo, windows):
    metric = sl.metrics.next_token_loss(windows)
    with torch.no_grad():
        soft = float(metric(demo(windows)))
        with sl.saturate(demo):
            saturated = float(metric(demo(windows)))
    assert soft < 2.8
    assert soft + 0.2 < saturated < 4.5


@pytest.mark.slow
def test_it_has_learned_the_heads_that_such_a_model_learns(demo, windows):
    frame = sl.head_roles(demo, windows, progress=False).frame()
    assert tuple(frame.loc["L2H1", ["role", "target"]]) == ("argmax", "previous")
    assert set(frame.loc[["L0H6", "L0H7"], "target"]) == {"self"}
    assert frame.loc["L3H7", "induction"] > 0.25
    assert frame["role"].nunique() >= 4


def test_the_log_follows_norm_and_saturation_from_step_zero_on(log):
    steps = [record["step"] for record in log["steps"]]
    assert steps == log_spaced_steps(log["recipe"]["steps"], halves_from=16)
    first, last = log["steps"][0], log["steps"][-1]
    assert first["norm"] < last["norm"]
    assert first["loss"] > 7 > 3 > last["loss"]
    assert all(head["lean"] < 0.1 for head in first["heads"].values())
    assert max(head["previous"] for head in last["heads"].values()) > 0.8
    assert log["corpus"].startswith("standard library of Python 3.")


def test_the_log_is_that_of_the_shipped_weights(demo, log):
    norm = torch.sqrt(sum((p.double() ** 2).sum() for p in demo.original_model.parameters()))
    assert float(norm) == pytest.approx(log["steps"][-1]["norm"], rel=1e-3)


def test_corpus_is_split_by_path_and_leaves_tests_out():
    files = corpus.source_files()
    parts = [set(path.parts) for path in files]
    assert not any(part & corpus.EXCLUDED_FOLDERS for part in parts)
    held_out = [path for path in files if corpus.is_held_out(path.name)]
    assert 0 < len(held_out) < len(files) / 5
    digest = int.from_bytes(hashlib.sha256(b"bisect.py").digest()[:8], "big")
    assert corpus.is_held_out("bisect.py") == (digest < 0.05 * 2**64)
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in corpus.corpus_name()


def test_corpus_is_every_source_file_and_no_excluded_folder_is_entered(monkeypatch):
    root = Path(sysconfig.get_path("stdlib"))
    below = [(path, path.relative_to(root)) for path in root.rglob("*.py")]
    wanted = sorted(
        path
        for path, inside in below
        if not inside.name.startswith("_sysconfigdata")
        and not set(inside.parts) & corpus.EXCLUDED_FOLDERS
    )
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(path) or scandir(path))
    assert corpus.source_files() == wanted
    assert str(root) in map(str, entered)
    assert not any(Path(path).name in corpus.EXCLUDED_FOLDERS for path in entered)


def test_batches_depend_on_seed_and_step_alone_and_open_with_bos():
    stream = torch.arange(1000, dtype=torch.int32)
    first, again = (batch_at(stream, 3, TINY, bos_id=0) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, batch_at(stream, 4, TINY, bos_id=0))
    assert first[:, 0].tolist() == [0, 0]


@pytest.fixture
def short_corpus(monkeypatch):
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 20 for i in range(4)]
    monkeypatch.setattr("paper.demo_training.training_texts", lambda: iter(texts))


@pytest.mark.usefixtures("short_corpus")
def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("paper.demo_training.STEPS_BETWEEN_STATES", 2)
    train(TINY, tmp_path / "whole")

    calls = iter(range(100))

    def failing(*arguments):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return batch_at(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("paper.demo_training.batch_at", failing)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "cut")
    train(TINY, tmp_path / "cut")
    for run in ("whole", "cut"):
        write_model(TINY, tmp_path / run, tmp_path / f"{run}-out")
    whole, cut = (load_file(tmp_path / f"{r}-out" / "model.safetensors") for r in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    kept = {path.name for path in (tmp_path / "whole").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in (0, 1, 2, 4, 5)}
