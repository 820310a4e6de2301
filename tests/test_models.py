"""Loading a model by name: what works, and one clear line for what does not."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
import zoo
from safetensors.torch import load_file, save_file

import sat_lens as sl
from sat_lens.errors import ModelError, UnsupportedModelError
from sat_lens.models import DEMO_FOLDER, load_model, load_tokenizer, model_name

CODE = "import pathlib\npathlib.Path('was_run').touch()\nclass Config: ...\nclass Model: ...\n"


def refusal(*words, kind=ModelError):
    assert issubclass(kind, sl.SatLensError)
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the demo model, to be broken."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DEMO_FOLDER, "broken")
    return tmp_path / "broken"


def configure(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def reweigh(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_the_demo_is_ready_to_use(demo):
    assert model_name(demo) == "demo"
    assert not demo.training
    assert {parameter.dtype for parameter in demo.parameters()} == {torch.float32}
    assert demo("x = 1").shape[-1] == demo.cfg.d_vocab == 2048


@pytest.mark.parametrize("written", ["broken", "./broken", "broken/"])
def test_a_local_directory_is_the_same_model(demo, folder, written):
    model = load_model(written)
    assert model_name(model) == "broken"
    with torch.no_grad():
        assert torch.equal(model("import os"), demo("import os"))


def test_options_are_passed_on(folder):
    assert load_model(str(folder), dtype=torch.bfloat16)("x").dtype == torch.bfloat16


def test_loading_says_nothing_and_leaves_the_loggers_alone(folder, capfd):
    library = logging.getLogger("transformers")
    before = library.level, list(library.handlers), logging.getLogger().level
    load_model(str(folder))
    with refusal("neither the demo"):
        load_model("gpt2")
    assert (library.level, list(library.handlers), logging.getLogger().level) == before
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("name", ["gpt2", "gpt2@main", "nobody/nothing", "gpt2@"])
def test_a_hub_name_without_a_network(name):
    with refusal(name, "neither the demo nor a directory", "network", "config.json") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capfd):
    from huggingface_hub import constants

    asked = []

    class Session:
        def head(self, url, **_options):
            asked.append(url)
            raise OSError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for load in (load_model, load_tokenizer):
        with refusal("gpt2", "neither the demo nor a directory"):
            load("gpt2")
    assert asked == [constants.ENDPOINT] * 2
    assert constants.HF_HUB_OFFLINE is False
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_nothing_is_installed(tmp_path, monkeypatch):
    """TransformerLens would run pip for torchvision, which brings another PyTorch along."""
    model = zoo.case("mistral3").build().original_model
    transformers.AutoTokenizer.from_pretrained(str(DEMO_FOLDER)).save_pretrained(tmp_path)
    tiny.hf_model("Mistral3ForConditionalGeneration", model.config).save_pretrained(tmp_path)
    run = []
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **_: run.append(command))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.warns(UserWarning, match=r"pip install torchvision.*refused"):
        bridge = load_model(tmp_path)
    assert not run
    subprocess.check_call(["pip", "install"])
    assert run
    assert bridge(tiny.tokens()).shape == (2, 10, 96)


def test_a_local_directory_asks_no_hub(folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("the hub was asked"))
    assert len(load_tokenizer(str(folder))) == load_model(str(folder)).cfg.d_vocab


def test_a_tokenizer_alone_reads_as_the_model_does(demo):
    text = "def area(width, height):"
    expected = demo.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert load_tokenizer()(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.parametrize(
    ("name", "hub_name", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("gpt2@main", "gpt2", "main"),
        ("EleutherAI/pythia-70m@step3000", "EleutherAI/pythia-70m", "step3000"),
        ("a/b@refs/pr/1", "a/b", "refs/pr/1"),
        ("gpt2@", "gpt2", None),
    ],
)
def test_a_revision_follows_the_name(monkeypatch, name, hub_name, revision):
    from transformer_lens.model_bridge import TransformerBridge

    asked = {}

    def boot(path, **options):
        asked.update(options, path=path)
        raise OSError("stop here")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", boot)
    with refusal("stop here"):
        load_model(name)
    assert asked["path"] == hub_name
    assert asked.get("revision") == revision


@pytest.mark.parametrize("name", ["", "@main"])
def test_no_name(name):
    with refusal("names no model", '"gpt2@main"'):
        load_model(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../nowhere", "~/nowhere"])
def test_a_directory_that_is_not_there(name):
    with refusal("no model directory", name):
        load_model(name)


def test_a_file_is_no_directory(folder):
    with refusal("no model directory", "config.json"):
        load_model(str(folder / "config.json"))


def test_a_name_that_is_none():
    with refusal("not a name!", "could not be loaded"):
        load_model("not a name!")


def test_an_empty_directory(tmp_path):
    with refusal("holds no config.json", "model.safetensors", "tokenizer"):
        load_model(str(tmp_path))


def damage(folder, kind):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(content[: len(content) // 2])
    elif kind == "garbage weights":
        weights.write_bytes(b"garbage" * 999)
    elif kind == "broken config":
        (folder / "config.json").write_text("{nonsense")
    elif kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no weights", ["no file named model.safetensors"]),
        ("truncated weights", ["SafetensorError", "header"]),
        ("garbage weights", ["SafetensorError", "header"]),
        ("broken config", ["config", "not a valid JSON"]),
        ("no tokenizer", ["tokenizer"]),
        ("broken tokenizer", ["could not be loaded"]),
    ],
)
def test_a_broken_directory(folder, kind, words):
    damage(folder, kind)
    with refusal(str(folder), *words) as caught:
        load_model(str(folder))
    assert "neither the demo" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_without_weights_is_not_made_up(folder):
    reweigh(folder, lambda weights: weights.pop("model.layers.2.self_attn.q_proj.weight"))
    with refusal("lacks weights", "would be random", "layers.2.self_attn.q_proj"):
        load_model(str(folder))


def test_weights_of_another_architecture_are_not_made_up(folder):
    configure(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with refusal("lacks weights", "would be random", "layers.{0, 1, 2, 3}"):
        load_model(str(folder))


def test_weights_outside_of_the_layers_are_warned_of(folder):
    reweigh(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.warns(UserWarning, match=r"lacks weights.*random: model\.norm\.weight"):
        load_model(str(folder))


def test_weights_of_another_size(folder):
    reweigh(folder, lambda w: w.update({"model.norm.weight": torch.ones(5)}))
    with refusal("model.norm.weight", "MISMATCH", "\\[5\\]", "\\[128\\]"):
        load_model(str(folder))


def test_an_architecture_that_cannot_be_wrapped(folder):
    configure(folder, model_type="ctrl", architectures=["CTRLLMHeadModel"])
    with refusal("no adapter", "architecture", kind=UnsupportedModelError) as caught:
        load_model(str(folder))
    assert len(str(caught.value)) < 400


def test_an_unknown_architecture(folder):
    configure(folder, model_type="zorg", architectures=["ZorgForCausalLM"])
    with refusal("could not be loaded", "zorg"):
        load_model(str(folder))


def bring_code(folder):
    (folder / "code.py").write_text(CODE)
    return {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


def test_code_that_a_model_asks_for_is_refused(folder):
    configure(folder, model_type="zorg", auto_map=bring_code(folder))
    with refusal("Python code of its own", "not run", "trust_remote_code=True"):
        load_model(str(folder))
    assert not (folder.parent / "was_run").exists()


def test_code_that_a_model_does_not_need_is_not_run(demo, folder):
    configure(folder, auto_map=bring_code(folder))
    with torch.no_grad():
        assert torch.equal(load_model(str(folder))("x = 1"), demo("x = 1"))
    assert not (folder.parent / "was_run").exists()


def test_code_of_a_tokenizer_is_refused(folder):
    bring_code(folder)
    path = folder / "tokenizer_config.json"
    asked = {"auto_map": {"AutoTokenizer": ["code.Model", None]}, "tokenizer_class": "Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    with refusal("Python code of its own", "not run"):
        load_model(str(folder))
    assert not (folder.parent / "was_run").exists()


class Payload:
    def __reduce__(self):
        return eval, ("open('was_run', 'w').close()",)


def test_a_pickle_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload()}, folder / "pytorch_model.bin")
    with refusal("pickle", "not read", "safetensors") as caught:
        load_model(str(folder))
    assert "weights_only" not in str(caught.value)
    assert not (folder.parent / "was_run").exists()
