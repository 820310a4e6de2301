"""Two processes measure their shares of the data and both hold the whole result."""

import dataclasses
import os
import socket
import subprocess
import sys

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sat_lens as sl
from sat_lens.cli import main
from sat_lens.roles import HeadRoles
from sat_lens.vocabulary import CAUTION


def tokens():
    return torch.randint(3, 2048, (6, 16), generator=torch.Generator().manual_seed(1))


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


OPTIONS = ["roles", "--sequences", "16", "--context", "24", "--quiet", "--out"]


def measure(rank, ports, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = sl.load_model()
    whole = sl.head_roles(model, tokens(), batch_size=2, progress=False)
    whole.save(f"{folder}/whole{rank}.st")
    shard = sl.head_roles(model, tokens(), batch_size=1, shard=(2, 3), progress=False)
    shard.save(f"{folder}/shard{rank}.st")
    stopped = sl.head_roles(model, stopped_in_second(rank), progress=False)
    stopped.save(f"{folder}/stopped{rank}.st")
    dist.destroy_process_group()
    # The command joins the processes itself, by what torchrun would have set.
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(ports[1]))
    assert main([*OPTIONS, f"{folder}/command{rank}.st"]) == 0


def stopped_in_second(rank):
    """Give both processes a batch to measure; the second is then interrupted."""
    yield from tokens()[:2].split(1)
    if rank == 1:
        raise KeyboardInterrupt
    yield from tokens()[2:3].split(1)


def same(found, wanted):
    pd.testing.assert_frame_equal(found.frame(), wanted.frame(), rtol=1e-9)


@pytest.mark.slow
def test_two_gloo_processes_both_return_the_result_of_one(demo, tmp_path):
    mp.spawn(measure, ((free_port(), free_port()), str(tmp_path)), nprocs=2)
    alone = {
        "whole": sl.head_roles(demo, tokens(), batch_size=2, progress=False),
        "shard": sl.head_roles(demo, tokens()[[1, 4]], batch_size=1, progress=False),
        "stopped": sl.head_roles(demo, tokens()[:3], batch_size=1, progress=False),
    }
    for name, wanted in alone.items():
        for rank in range(2):
            found = HeadRoles.load(tmp_path / f"{name}{rank}.st")
            assert found.n_sequences == wanted.n_sequences
            assert found.complete == (name != "stopped")
            same(found, wanted)
    assert not (tmp_path / "command1.st").exists()
    check_command(tmp_path / "command0.st", tmp_path)


@pytest.mark.slow
def test_torchrun_takes_the_shards_by_rank(tmp_path, capsys):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "sat_lens", *OPTIONS]
    subprocess.run([*command, str(tmp_path / "two.st")], check=True, capture_output=True)
    check_command(tmp_path / "two.st", tmp_path)


def check_command(path, folder):
    assert main([*OPTIONS, str(folder / "one.st")]) == 0
    two, one = HeadRoles.load(path), HeadRoles.load(folder / "one.st")
    assert two.n_sequences == 16
    same(two, one)


@pytest.mark.slow
def test_shards_of_the_command_line_merge_and_a_broken_one_is_left_out(tmp_path, capsys):
    options = ["--sequences", "24", "--context", "24", "--quiet"]
    for i in (1, 2):
        out = str(tmp_path / f"{i}.st")
        assert main(["roles", *options, "--shard", f"{i}/2", "--out", out]) == 0
    assert main(["roles", *options, "--out", str(tmp_path / "whole.st")]) == 0
    parts = [str(tmp_path / "1.st"), str(tmp_path / "2.st")]
    assert main(["merge", *parts, "--out", str(tmp_path / "merged.st")]) == 0
    merged, whole = (HeadRoles.load(tmp_path / f"{n}.st") for n in ("merged", "whole"))
    same(merged, whole)

    (tmp_path / "2.st").write_bytes(b"not a result")
    capsys.readouterr()
    assert main(["merge", *parts, "--out", str(tmp_path / "rest.st")]) == 1
    assert "left out" in capsys.readouterr().err
    assert HeadRoles.load(tmp_path / "rest.st").n_sequences == 16


@pytest.mark.parametrize("shard", ["2", "a/b", "3/2", "0/2"])
def test_a_shard_that_is_none_is_refused(shard, capsys):
    assert main(["roles", "--shard", shard, "--sequences", "1", "--quiet"]) == 2
    assert "hard" in capsys.readouterr().err


def test_merging_a_part_that_was_interrupted_says_so(demo, tmp_path, capsys):
    parts = [sl.head_roles(demo, part, progress=False) for part in tokens().split(3)]
    parts[1] = dataclasses.replace(parts[1], complete=False)
    names = [str(tmp_path / f"{i}.st") for i in (1, 2)]
    for part, name in zip(parts, names, strict=True):
        part.save(name)
    assert main(["merge", *names, "--out", str(tmp_path / "all.st")]) == 1
    shown = capsys.readouterr()
    assert f"{names[1]} is part of a shard" in shown.err
    assert names[0] not in shown.err
    assert CAUTION in shown.out
    merged = HeadRoles.load(tmp_path / "all.st")
    assert (merged.complete, merged.n_sequences) == (False, 6)


def test_a_shard_without_a_batch_is_refused(capsys):
    assert main(["roles", "--sequences", "4", "--context", "16", "--shard", "2/8", "--quiet"]) == 2
    assert "holds no batch" in capsys.readouterr().err
