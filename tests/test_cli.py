"""The sat-lens command: what it writes and prints, and one line on every mistake."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from everyday import everyday

import sat_lens
from sat_lens import cli
from sat_lens.cli import EXAMPLES
from sat_lens.cli.shared import check_file, check_folder
from sat_lens.errors import ArgumentError
from sat_lens.roles import HeadRoles

SMALL = ["--sequences", "4", "--context", "32", "--quiet"]
TWO_BATCHES = [*SMALL, "--sequences", "16"]
ANSWERS = ["--answer", ")", "--wrong", "("]
COMMANDS = list(EXAMPLES)
LABELS = [f"L{layer}H{head}" for layer in range(4) for head in range(8)]


@pytest.fixture(autouse=True)
def one_model(demo, monkeypatch, tmp_path):
    """Load the demo once, and work in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    load = sat_lens.models.load_model
    monkeypatch.setattr(
        "sat_lens.models.load_model", lambda name, **_: demo if name == "demo" else load(name)
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("def area(width, height):\n    return width * height\n" * 60)
    return path


@pytest.fixture
def run(capfd):
    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        return status, *capfd.readouterr()

    return call


def one_line(error, *words):
    assert error.startswith("sat-lens: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert all(re.search(word, error) for word in words), error


def interrupt(monkeypatch, after):
    """Press Ctrl-C once some batches were read."""
    read = sat_lens.data.batches

    def batches(*arguments, **keywords):
        for i, batch in enumerate(read(*arguments, **keywords)):
            if i == after:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr("sat_lens.roles.measuring.batches", batches)


def python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_roles_prints_a_row_a_head_and_writes_files(run, tmp_path):
    status, out, error = run(
        "roles", *SMALL, "--csv", "t.csv", "--out", "r.safetensors", "--figure", "map.PNG"
    )
    assert (status, error) == (0, "")
    assert re.findall(r"^L\d+H\d+", out, re.MULTILINE) == LABELS
    with open("t.csv", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == LABELS
    roles = HeadRoles.load("r.safetensors")
    assert roles.n_sequences == 4
    assert "standard library of Python 3." in roles.provenance.data
    assert (tmp_path / "map.PNG").read_bytes()[1:4] == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.PNG", "r.safetensors", "t.csv"]


def test_the_text_can_be_ones_own(run, text):
    assert run("roles", *SMALL, "--text", text, "--out", "r.safetensors")[0] == 0
    assert HeadRoles.load("r.safetensors").provenance.data == "notes.txt"


def test_shards_merge_to_the_whole(run):
    for shard in ("1/2", "2/2"):
        name = f"{shard[0]}.safetensors"
        assert run("roles", *TWO_BATCHES, "--shard", shard, "--out", name)[0] == 0
        assert HeadRoles.load(name).n_sequences == 8
    status, out, error = run("merge", "1.safetensors", "2.safetensors", "--out", "all.safetensors")
    assert (status, error) == (0, "")
    assert "2 files merged, 16 sequences" in out
    run("roles", *TWO_BATCHES, "--out", "whole.safetensors")
    merged, whole = (HeadRoles.load(f"{name}.safetensors").frame() for name in ("all", "whole"))
    assert merged.index.tolist() == LABELS
    assert merged["tv_argmax"].tolist() == pytest.approx(whole["tv_argmax"].tolist(), abs=1e-5)


def test_merge_leaves_broken_files_out_and_says_so(run, tmp_path):
    run("roles", *SMALL, "--out", "good.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    status, out, error = run("merge", "good.safetensors", "bad.safetensors", "nowhere")
    assert status == 1
    assert "1 file merged, 4 sequences" in out
    assert re.findall("left out: (bad|There is no file nowhere)", error)[1].endswith("nowhere")
    status, out, error = run("merge", "bad.safetensors")
    assert (status, out) == (2, "")
    assert "at least one result to merge; none of these files" in error


def test_report_writes_one_page(run, text, tmp_path):
    status, out, _ = run("report", *SMALL, "--text", text, "--out", "page.html")
    assert status == 0
    assert f"The report is in {tmp_path / 'page.html'}" in out
    assert re.findall(r"^L\d+H\d+", out, re.MULTILINE) == LABELS
    page = (tmp_path / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "notes.txt" in page


@pytest.mark.slow
def test_report_shows_the_prompt(run, demo, tmp_path):
    status, *_ = run("report", "demo", *SMALL, "--prompt", "zebra = stripes")
    assert status == 0
    page = (tmp_path / "report.html").read_text()
    tokens = sat_lens.viz.token_strings(demo, demo.to_tokens("zebra = stripes"))
    assert all(json.dumps(token) in page for token in tokens[1:])


def test_check_says_where_every_layer_can_be_touched(run):
    status, out, error = run("check")
    assert (status, error) == (0, "")
    lines, legend = out.split("\n\n")
    assert len(lines.splitlines()) == 4
    for layer, line in enumerate(lines.splitlines()):
        assert f"blocks.{layer}.attn: self attention, 8 heads, level scores" in line
        assert "changes the output" in line
    # The legend explains the level that is there, and no other.
    assert re.search(r"^  scores +at .*hook_attn_scores", legend, re.MULTILINE)
    assert not re.search(r"^  softmax", legend, re.MULTILINE)
    assert "largest change of a logit" in legend


def test_check_tells_by_its_status_what_cannot_be_touched(run, monkeypatch):
    import tiny
    import transformers

    config = transformers.BertConfig(**tiny.SIZE)
    model = tiny.bridge("BertForMaskedLM", config, attn_implementation="sdpa")
    monkeypatch.setattr("sat_lens.models.load_model", lambda name, **_: model)
    status, out, _ = run("check", "fused")
    assert status == 1
    assert out.count("cannot be saturated") == 2


def test_check_tells_by_its_status_what_it_could_not_try(run, monkeypatch):
    import zoo

    monkeypatch.setattr(
        "sat_lens.models.load_model", lambda name, **_: zoo.case("mistral3").build()
    )
    status, out, _ = run("check", "mistral3")
    assert status == 1
    assert out.count("changes the output") == 2
    assert "vision_encoder: not tried" in out
    assert "verify_sites(model, *your_inputs)" in out


def test_check_of_a_model_without_attention(run, monkeypatch):
    import tiny
    import transformers

    config = transformers.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)
    model = tiny.bridge("MambaForCausalLM", config)
    monkeypatch.setattr("sat_lens.models.load_model", lambda name, **_: model)
    status, out, error = run("check", "mamba")
    assert (status, out) == (2, "")
    one_line(error, "softmax attention", "none ran", "Mamba")


@pytest.mark.parametrize("command", ["roles", "report", "check"])
def test_a_model_directory_that_is_not_there(run, command):
    status, out, error = run(command, "./nowhere")
    assert (status, out) == (2, "")
    one_line(error, "no model directory", "./nowhere")


@pytest.mark.parametrize("command", ["roles", "report", "check"])
def test_a_hub_name_without_a_network(run, command):
    status, out, error = run(command, "gpt2@main")
    assert (status, out) == (2, "")
    one_line(error, "gpt2@main", "network", "config.json")


@pytest.mark.slow
def test_a_hub_name_without_a_network_as_the_installed_command():
    command = [f"{sys.exec_prefix}/bin/sat-lens", "roles", "gpt2"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    one_line(found.stderr, "gpt2", "network")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["roles", "--text", "nowhere.txt"], ["text file nowhere.txt", "No such file"]),
        (["roles", "--text", "."], ["cannot be read", "directory"]),
        (["roles", "--csv", "nowhere/t.csv"], ["There is no folder", "nowhere", "t.csv"]),
        (["roles", "--out", "."], ["is a folder", "name the file"]),
        (["roles", "--figure", "nowhere/map.png"], ["There is no folder"]),
        (["roles", "--figure", "map.gif"], [r"\.png, \.svg, \.pdf", r"map\.gif"]),
        (["report", "--out", "nowhere/report.html"], ["There is no folder"]),
        (["merge", "a", "--out", "nowhere/all"], ["There is no folder"]),
        (["roles", "--shard", "2"], ["i/n", "'2'"]),
        (["roles", "--shard", "a/b"], ["i/n", "'a/b'"]),
        (["roles", "--shard", "³/4"], ["i/n", "'³/4'"]),
        (["roles", "--shard", "5/4"], ["i from 1 to n", "'5/4'"]),
        (["roles", "--shard", "0/4"], ["i from 1 to n", "'0/4'"]),
        (["roles", "--shard", "1/" + "9" * 5000], ["i/n"]),
        (["roles", "--sequences", "0"], ["--sequences must be at least 1"]),
        (["roles", "--context", "1"], ["--context at least 2"]),
        (["report", "--prompt", " "], ["--prompt holds no text"]),
        (["sweep", "--prompt", "", *ANSWERS], ["--prompt holds no text"]),
        (["sweep", "--prompt", "x", *ANSWERS, "--out", "/dev/zero"], ["/dev/zero is a file"]),
        (["sweep", "--prompt", "x", *ANSWERS, "--out", "/dev/zero/a"], ["/dev/zero is a file"]),
        (["sweep", "--prompt", "x", *ANSWERS, "--answer", "two of them"], ["one token"]),
        (["sweep", "--prompt", "x", *ANSWERS, "--answer", "("], ["same token"]),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, arguments, words
):
    def load(name, **_):
        pytest.fail("The model was loaded before the mistake was found.")

    monkeypatch.setattr("sat_lens.models.load_model", load)
    status, out, error = run(*arguments)
    assert (status, out) == (2, "")
    one_line(error, *words)
    assert list(tmp_path.iterdir()) == []


def test_a_window_without_rows_to_count(run, tmp_path):
    status, out, error = run("roles", *SMALL, "--context", "4")
    assert (status, out) == (2, "")
    one_line(error, "8 visible keys", "longer sequences")
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_window_is_measured_and_the_page_says_so(run, tmp_path):
    (tmp_path / "short.txt").write_text("def area(width, height):\n    return width * height\n")
    status, _, error = run("report", "--text", "short.txt", "--quiet", "--out", "short.html")
    assert (status, error) == (0, "")
    page = (tmp_path / "short.html").read_text()
    assert re.search(r"1 sequence of short\.txt \(the whole of it, \d+ tokens: less than", page)


def test_a_text_without_rows_to_count(run, tmp_path):
    (tmp_path / "short.txt").write_text("x = 1")
    status, _, error = run("roles", "--text", "short.txt", "--quiet")
    assert status == 2
    one_line(error, "8 visible keys", "longer sequences")


def test_a_file_that_cannot_be_written_after_all(run, monkeypatch, tmp_path):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    status, _, error = run("roles", *SMALL, "--out", "r.safetensors")
    assert status == 2
    one_line(error, "cannot be written", "No space left")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_what_was_measured(run, monkeypatch):
    interrupt(monkeypatch, after=1)
    status, out, error = run("roles", *TWO_BATCHES, "--out", "r.safetensors")
    assert status == 130
    assert "Interrupted" in error
    assert re.findall(r"^L\d+H\d+", out, re.MULTILINE) == LABELS
    found = HeadRoles.load("r.safetensors")
    assert (found.n_sequences, found.complete) == (8, False)


@pytest.mark.slow
def test_an_interrupted_report_is_written_and_says_so(run, monkeypatch, text, tmp_path):
    interrupt(monkeypatch, after=1)
    status, out, error = run("report", *TWO_BATCHES, "--text", text)
    assert status == 130
    assert "The report is in" in out
    assert "Interrupted" in error
    assert (tmp_path / "report.html").exists()


def test_an_interrupt_before_the_first_number(run, monkeypatch, tmp_path):
    interrupt(monkeypatch, after=0)
    assert run("roles", *SMALL, "--out", "r") == (130, "", "sat-lens: interrupted\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_has_examples(run, capfd, command):
    with pytest.raises(SystemExit) as caught:
        run(*([command] if command else []), "--help")
    assert caught.value.code == 0
    out = capfd.readouterr().out
    assert ("L5H1 is head 1 of layer 5" in out) == ("encoder.L0H1" in out) == (command != "check")
    assert "examples:" in out
    for name in COMMANDS:
        # A command's help has its own examples; that of sat-lens has all.
        assert (EXAMPLES[name] in out) == (command in (None, name))
        assert command or re.search(rf"^    {name}\b", out, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does_and_its_default(run, capfd, command):
    with pytest.raises(SystemExit):
        run(command, "--help")
    help_text = capfd.readouterr().out
    options = cli._parser()._subparsers._group_actions[0].choices[command]._actions
    for option in options:
        assert option.help, option.dest
        if option.default not in (None, False, "==SUPPRESS=="):
            assert re.search(rf"\(default:\s+{option.default}\)|\(default\)", help_text), option


def test_every_example_is_a_command_that_parses():
    examples = "".join(EXAMPLES.values())
    lines = re.findall(r"^  sat-lens (.*?)   ", examples, re.MULTILINE)
    lines += re.findall(r"^  sat-lens (.*?\S)  \S", examples, re.MULTILINE)
    assert len(set(lines)) >= len(COMMANDS)
    for line in lines:
        assert cli._parser().parse_args(shlex.split(line)).run


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["roles", "--nonsense"]])
def test_an_unknown_command(run, capfd, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: sat-lens" in capfd.readouterr().err


def test_the_version(run, capfd):
    with pytest.raises(SystemExit):
        run("--version")
    assert capfd.readouterr().out == f"sat-lens {sat_lens.__version__}\n"


@pytest.mark.parametrize(
    "code",
    [
        "import sat_lens",
        "import sat_lens.cli",
        "from sat_lens import SatLensError, __version__",
        "import sat_lens.cli as c\ntry: c.main(['roles', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_help_and_import_cost_next_to_nothing(code):
    heavy = "{'torch', 'transformer_lens', 'transformers', 'pandas', 'matplotlib'}"
    out = python(f"import sys\n{code}\nprint(sorted({heavy} & sys.modules.keys()))")
    assert out.splitlines()[-1] == "[]"


PRINTING = "import sys, sat_lens.cli as c, sat_lens.cli.check as k\nk.run = lambda _: {}\n"
LONG = PRINTING.format("print('x' * 10**6) or 0") + "sys.exit(c.main(['check']))"


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    command = [sys.executable, "-c", LONG]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(1) == "x"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.parametrize("length", everyday([5, 10**6], 5))
def test_a_full_device_behind_the_output_is_one_line(length):
    code = PRINTING.format(f"print('x' * {length}) or 0") + "sys.exit(c.main(['check']))"
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 2
    one_line(found.stderr, "the output", "No space left")


def test_progress_bars_know_their_end(run, text):
    loud = [word for word in SMALL if word != "--quiet"]
    _, _, error = run("report", *loud, "--text", text)
    assert re.search(r"head roles: 100%.* 4/4 ", error)
    assert re.search(r"scaling curve: 100%", error)
    _, _, error = run("roles", *loud, "--sequences", "16", "--shard", "2/2")
    assert re.search(r"head roles: 100%.* 8/8 ", error)


def test_a_pipe_is_written_to_and_stays_a_pipe(run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    try:
        assert run("roles", *SMALL, "--csv", pipe)[0] == 0
        assert pipe.is_fifo()
        table, _ = reading.communicate(timeout=60)
    finally:
        reading.kill()
    assert [row["label"] for row in csv.DictReader(table.splitlines())] == LABELS


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "abc", "RANK": "0"},
        {"WORLD_SIZE": "³", "RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "2"},
        {"WORLD_SIZE": "2", "RANK": "0"},
    ],
)
def test_processes_that_nobody_introduced(run, monkeypatch, tmp_path, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, out, error = run("roles", *SMALL, "--out", "r")
    assert (status, out) == (2, "")
    one_line(error, "torchrun")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_found_before_the_work(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    # Root may write anywhere, so that a mode alone would show nothing.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != closed)
    with pytest.raises(ArgumentError, match="no permission"):
        check_file(closed / "r.st")
    with pytest.raises(ArgumentError, match="no permission"):
        check_folder(closed / "a" / "b")
    check_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == [closed]
