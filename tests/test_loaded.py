"""Models as people load them: offloaded, quantised, adapted, wrapped, compiled.

The oracle is the same model as it was before: whatever keeps or wraps the weights, saturation gives
the numbers that it gives on the plain model.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
import transformers
import zoo
from accelerate import cpu_offload, disk_offload, dispatch_model
from everyday import everyday
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers.utils import logging as hf_logging

import sat_lens as sl
from sat_lens import cli
from sat_lens.intervention import verify_bridge
from sat_lens.sites import discovery

TOKENS = tiny.tokens()
WHAT: dict[str, dict[str, Any]] = {
    "all": {},
    "one head": {"heads": "L1H2"},
    "c = 4": {"scale": 4.0},
    "ties": {"ties": 0.1},
}
# The demo model's parts; the rotary embedding has no weights and yet a device.
PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
LAYERS = [f"model.layers.{i}" for i in range(2)]


def llama(attention: str = "sdpa", **changed: Any) -> Any:
    config = transformers.LlamaConfig(**tiny.SIZE | changed)
    return tiny.hf_model("LlamaForCausalLM", config, attention)


def logits(model: Any, tokens: Tensor = TOKENS, **kwargs: Any) -> Tensor:
    output = model(tokens, **kwargs)
    return getattr(output, "logits", output).detach()


def saturated(model: Any, tokens: Tensor = TOKENS, **what: Any) -> Tensor:
    with torch.no_grad(), sl.saturate(model, **what):
        return logits(model, tokens)


def agree(model: Any, oracle: Any, **what: Any) -> None:
    """Saturation does the same to both, and it does something."""
    found, expected = saturated(model, **what), saturated(oracle, **what)
    assert torch.equal(logits(model), logits(oracle))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, logits(model), atol=1e-2)


# Weights elsewhere.


def offloaded_to_cpu(model: Any, _folder: Any) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_to_disk(model: Any, folder: Any) -> Any:
    return disk_offload(model, folder, execution_device=torch.device("cpu"))


def dispatched(model: Any, folder: Any) -> Any:
    places = dict.fromkeys([*PARTS, *LAYERS], "cpu") | {LAYERS[0]: "disk", "lm_head": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def mapped(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder / "model")
    places = dict.fromkeys([*PARTS, *LAYERS], "cpu") | {PARTS[0]: "disk", LAYERS[1]: "disk"}
    return type(model).from_pretrained(
        folder / "model",
        device_map=places,
        offload_folder=folder,
        attn_implementation=model.config._attn_implementation,
    )


OFFLOADED = [offloaded_to_cpu, offloaded_to_disk, dispatched, mapped]


@pytest.mark.parametrize("what", everyday(WHAT, "all"))
@pytest.mark.parametrize("attention", everyday(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize("offload", everyday(OFFLOADED, offloaded_to_disk))
def test_offloaded(offload, attention, what, tmp_path):
    oracle = llama(attention)
    agree(offload(llama(attention), tmp_path), oracle, **WHAT[what])


@pytest.mark.parametrize("offload", everyday(OFFLOADED, offloaded_to_cpu))
def test_roles_of_an_offloaded_model(offload, tmp_path):
    found, expected = (
        sl.head_roles(model, [TOKENS], progress=False).frame()
        for model in (offload(llama(), tmp_path), llama())
    )
    assert found.equals(expected)


@pytest.mark.parametrize(
    "place", everyday(["auto", {"": "cpu"}, torch.device("cpu"), {"": "disk"}], {"": "disk"})
)
def test_device_map(place, demo, tmp_path):
    model = sl.load_model("demo", device_map=place, offload_folder=str(tmp_path))
    text = "def f(x): return x + 1"
    expected, found = (sl.run_with_saturation_cache(of, text) for of in (demo, model))
    assert torch.equal(found.soft.logits, expected.soft.logits)
    assert torch.equal(found.saturated.logits, expected.saturated.logits)


def test_device_and_device_map_say_the_same_thing_twice():
    with pytest.raises(sl.SatLensError, match="mutually exclusive"):
        sl.load_model("demo", device="cpu", device_map="auto")


# Weights in few bits. The library that packs them makes the same products as this stand-in.


class Packed(nn.Module):
    """A linear map whose weight is kept in eight bits, or two of four bits in one byte."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__()
        most = 2 ** (bits - 1) - 1
        self.step = float(layer.weight.detach().abs().max()) / most
        whole = (layer.weight.detach() / self.step).round()
        packed = whole.to(torch.int8)
        if bits == 4:
            nibbles = (whole + 8).to(torch.uint8)
            packed = nibbles[:, ::2] * 16 + nibbles[:, 1::2]
        self.weight = nn.Parameter(packed, requires_grad=False)

    @property
    def unpacked(self) -> Tensor:
        whole = self.weight
        if whole.dtype == torch.uint8:
            whole = torch.stack([whole // 16, whole % 16], dim=-1).flatten(-2).int() - 8
        return whole.float() * self.step

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.unpacked.to(x).mT


def quantised(model: Any, bits: int) -> Any:
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name), bits))
    return model


def unpacked(model: Any) -> Any:
    """The oracle: the same weights, rounded, in float32."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        for name, packed in list(layer.self_attn.named_children()):
            if isinstance(packed, Packed):
                weight = packed.unpacked
                linear = nn.Linear(*weight.mT.shape, bias=False)
                linear.weight.data = weight
                setattr(layer.self_attn, name, linear)
    return model


@pytest.mark.parametrize("what", everyday(WHAT, "all"))
@pytest.mark.parametrize("attention", everyday(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize("bits", everyday([8, 4], 8))
def test_quantised(bits, attention, what):
    model = quantised(llama(attention), bits)
    agree(model, unpacked(model), **WHAT[what])


def test_quantised_weights_are_no_reason_against_the_fused_kernel(caplog, monkeypatch):
    monkeypatch.setattr(discovery, "_logged", set())
    with caplog.at_level(logging.WARNING):
        saturated(quantised(llama(), 8))
    assert not caplog.records


def test_quantised_weights_and_a_kernel_for_the_limit(monkeypatch):
    """As on a GPU, where the device of the weights says whether there is such a kernel."""
    asked = []

    def kernel(device: torch.device) -> Any:
        asked.append(device)
        return lambda call: call.run()

    monkeypatch.setattr("sat_lens.intervention.edits.limit_kernel", kernel)
    saturated(quantised(llama(), 8))
    assert set(asked) == {torch.device("cpu")}


def test_attention_that_is_moved_to_half_precision_after_it_was_looked_at():
    """The embedding tells nothing: only the attention has changed."""
    config = transformers.GPT2Config(**tiny.GPT)
    model = tiny.hf_model("GPT2LMHeadModel", config, "sdpa")
    saturated(model)
    for block in model.transformer.h:
        block.attn.forward = _in_half(block.attn.forward)
    with pytest.raises(sl.errors.NotReachedError, match=r"ran in torch\.bfloat16 .* look again"):
        saturated(model)
    sl.attention_sites(model, TOKENS)
    saturated(model)


def _in_half(forward: Any) -> Any:
    def halved(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output, *rest = forward(*args, **kwargs)
        return (output.float(), *rest)

    return halved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_moved_to_half_precision_is_looked_at_again(dtype):
    model = llama()
    saturated(model)
    agree(model.to(dtype), llama().to(dtype))


# Compiled models run uncompiled inside the block.


def compiled_function(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def compiled_module(model: Any, backend: str) -> Any:
    model.compile(backend=backend)
    return model


def compiled_layers(model: Any, backend: str) -> Any:
    for layer in model.model.layers:
        layer.compile(backend=backend)
    return model


def compiled_attention(model: Any, backend: str) -> Any:
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend=backend)
    return model


COMPILED = [compiled_function, compiled_module, compiled_layers, compiled_attention]


@pytest.fixture(autouse=True)
def _compiler_stays_as_it_was():
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    torch._dynamo.reset()


@pytest.mark.parametrize("what", everyday(WHAT, "all"))
@pytest.mark.parametrize("attention", everyday(["sdpa", "eager"], "eager"))
@pytest.mark.parametrize("way", everyday(COMPILED, compiled_function))
def test_compiled(way, attention, what):
    check_compiled(way, "eager", attention, what)


def check_compiled(way: Any, backend: str, attention: str, what: str) -> None:
    oracle = llama(attention)
    model = way(llama(attention), backend)
    with torch.no_grad():
        before = logits(model)
    assert torch.equal(saturated(model, **WHAT[what]), saturated(oracle, **WHAT[what]))
    with torch.no_grad():
        assert torch.equal(logits(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("way", [compiled_function, compiled_module])
def test_compiled_to_machine_code(way):
    try:
        torch.compile(lambda x: x.sin() + x, backend="inductor")(torch.ones(3))
    except Exception as error:  # noqa: BLE001 - it needs a C++ compiler and Python's headers
        pytest.skip(f"inductor does not work here: {type(error).__name__}")
    check_compiled(way, "inductor", "eager", "all")


def test_a_compiled_function_that_the_library_does_not_see():
    model = llama("eager")
    function = torch.compile(lambda tokens: logits(model, tokens), backend="eager")
    with torch.no_grad():
        function(TOKENS)
        with sl.saturate(model):
            found = function(TOKENS)
    assert torch.equal(found, saturated(llama("eager")))


def test_blocks_that_end_in_another_order_than_they_began():
    one, two = llama(), llama()
    first, second = sl.saturate(one), sl.saturate(two)
    model = torch.compile(one, backend="eager")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    with torch.no_grad():
        assert torch.allclose(logits(model), logits(two), atol=1e-5)


@pytest.mark.slow
def test_a_block_inside_of_a_compiled_function():
    model = llama()

    @torch.compile(backend="eager")
    def function(tokens: Tensor) -> Tensor:
        with sl.saturate(model):
            return logits(model, tokens)

    with pytest.raises(sl.SatLensError, match="inside a compiled function"):
        function(TOKENS)


@pytest.mark.slow
def test_a_compiled_bridge():
    config = transformers.LlamaConfig(**tiny.SIZE)
    model, oracle = (tiny.bridge("LlamaForCausalLM", config) for _ in range(2))
    model.compile(backend="eager")
    logits(model)
    agree(model, oracle)
    hooked = [
        of.run_with_hooks(TOKENS, fwd_hooks=sl.saturation_hooks(of, "L0H0"))
        for of in (model, oracle)
    ]
    assert torch.equal(*hooked)
    swept = [
        sl.sweep_heads(of, TOKENS, lambda logits: logits[:, -1, 5].mean(), progress=False).values
        for of in (model, oracle)
    ]
    assert torch.equal(*swept)


# Wrappers of training: what forwards attributes is taken as it is, and the others name the model.


@pytest.fixture(scope="module")
def process_group():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


class Holder(nn.Module):
    """As a Lightning module or Trainer's user holds a model, under any name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.net = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class Engine(Holder):
    """As deepspeed's engine, which looks up in its model what it lacks itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.net, name)


def replicated(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: Any) -> Any:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


def sharded_as_of_old(model: Any) -> Any:
    return torch.distributed.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("what", everyday(WHAT, "c = 4"))
@pytest.mark.parametrize("wrap", everyday([sharded, sharded_as_of_old, Engine], sharded))
def test_wrappers_that_forward_attributes(wrap, what):
    agree(wrap(llama()), llama(), **WHAT[what])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "name"), [(replicated, "module"), (nn.DataParallel, "module"), (Holder, "net")]
)
def test_wrappers_that_do_not(wrap, name):
    model = llama()
    wrapper = wrap(model)
    for refused in (sl.saturate(wrapper), sl.replace_attention(wrapper, lambda scores: scores)):
        with pytest.raises(sl.SatLensError, match=rf"holds the model as its \.{name}"), refused:
            pass
    with pytest.raises(sl.SatLensError, match=rf"holds the model as its \.{name}"):
        sl.run_with_saturation_cache(wrapper, TOKENS)
    with torch.no_grad(), sl.saturate(model):
        found = logits(wrapper)
    assert torch.equal(found, saturated(llama()))


# Generation: whatever keeps keys and values, each step sees what one long pass sees.


def greedy(model: Any, steps: int = 6) -> Tensor:
    """Generate without any cache, one forward pass for each token."""
    tokens = TOKENS[:1]
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(model, tokens, use_cache=False)[:, -1:].argmax(-1)], 1)
    return tokens


def generated(model: Any, steps: int = 6, **settings: Any) -> Tensor:
    settings = {"do_sample": False, "eos_token_id": None} | settings
    return model.generate(TOKENS[:1], max_new_tokens=steps, **settings)


def mistral(attention: str) -> Any:
    config = transformers.MistralConfig(**tiny.SIZE, num_key_value_heads=2, sliding_window=6)
    return tiny.hf_model("MistralForCausalLM", config, attention)


class Rounded(transformers.DynamicCache):
    """Keys and values in eight bits, as quantised caches keep them."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        step = 16 / 127
        rounded = ((x / step).round().clamp(-128, 127).to(torch.int8) for x in (keys, values))
        return super().update(*(x.to(keys) * step for x in rounded), *args, **kwargs)


GENERATING: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("attention", everyday(["sdpa", "eager"], "sdpa"))
@pytest.mark.parametrize("build", everyday([llama, mistral], mistral))
@pytest.mark.parametrize("how", everyday(GENERATING, "static cache"))
def test_generation_with_any_cache(how, build, attention):
    model = build(attention)
    with torch.no_grad(), sl.saturate(model):
        expected = greedy(model)
        assert torch.equal(generated(model, **GENERATING[how]), expected)
    with torch.no_grad():
        assert not torch.equal(greedy(model), expected)


@pytest.mark.parametrize("what", everyday(WHAT, "all"))
def test_generation_with_a_quantised_cache(what):
    found = []
    for attention in ("sdpa", "eager"):
        model = llama(attention)
        with torch.no_grad(), sl.saturate(model, **WHAT[what]):
            cache = Rounded(config=model.config)
            found.append(generated(model, past_key_values=cache))
    assert torch.equal(*found)


@pytest.mark.parametrize("attention", everyday(["sdpa", "eager"], "sdpa"))
def test_assisted_generation_changes_no_token(attention):
    """The assistant, which is not saturated, proposes; the saturated model decides."""
    model = llama(attention)
    with torch.no_grad(), sl.saturate(model):
        found = generated(model, assistant_model=llama("sdpa"))
        assert torch.equal(found, greedy(model))


def test_beams():
    found = []
    for attention in ("sdpa", "eager"):
        model = llama(attention)
        with torch.no_grad(), sl.saturate(model):
            found.append(generated(model, num_beams=3))
    with torch.no_grad():
        soft = generated(llama(), num_beams=3)
    assert torch.equal(*found)
    assert not torch.equal(found[0], soft)


def test_a_pipeline():
    folder = str(sl.models.DEMO_FOLDER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)

    def text() -> str:
        settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
        return pipeline("def area(width, height):", **settings)[0]["generated_text"]

    soft = text()
    with sl.saturate(model):
        hard = text()
        tokens = tokenizer("def area(width, height):", return_tensors="pt")
        new = model.generate(**tokens, max_new_tokens=8, do_sample=False)[0]
    assert hard != soft
    assert hard == tokenizer.decode(new[tokens.input_ids.shape[1] :], skip_special_tokens=True)
    assert text() == soft


def test_tied_weights():
    tied = llama(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    agree(tied, untied)


# Inputs under the model's own names.


def whisper() -> Any:
    size = {name: value for name, value in tiny.BART.items() if "position" not in name}
    config = transformers.WhisperConfig(**size, num_mel_bins=8, max_source_positions=50)
    return tiny.hf_model("WhisperForConditionalGeneration", config, "eager")


def test_inputs_under_the_names_of_the_model():
    model = whisper()
    sounds, decoded = torch.randn(1, 8, 100), TOKENS[:1]
    named = {"input_features": sounds, "decoder_input_ids": decoded}
    sl.attention_sites(model, **named)
    tables = [
        sl.head_roles(model, [batch], min_keys=2, progress=False).frame()
        for batch in (named, {"input_values": sounds, "decoder_input_ids": decoded})
    ]
    assert tables[0].equals(tables[1])
    with torch.no_grad(), sl.saturate(model):
        found = model(**named).logits
    with torch.no_grad():
        assert not torch.allclose(found, model(**named).logits, atol=1e-2)


# Adapters. PEFT's layers stand inside of the attention modules, and its wrapper forwards.


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft: Any, model: Any) -> Any:
    torch.manual_seed(0)
    first, second = (
        peft.LoraConfig(target_modules=modules, init_lora_weights=False, lora_alpha=32)
        for modules in (["q_proj", "v_proj"], ["k_proj"])
    )
    model = peft.get_peft_model(model, first)
    model.add_adapter("second", second)
    return model.eval()


@pytest.mark.parametrize("what", everyday(WHAT, "all"))
@pytest.mark.parametrize("active", everyday(["default", "second", "both", "none"], "both"))
def test_adapters(peft, active, what):
    model = adapted(peft, llama())
    names = {"both": ["default", "second"], "none": ["default"]}.get(active, [active])
    model.base_model.set_adapter(names)
    if active == "none":
        with model.disable_adapter():
            agree(model, llama(), **WHAT[what])
        return
    merged = copy.deepcopy(model).merge_and_unload()
    expected = saturated(merged, **WHAT[what])
    torch.testing.assert_close(saturated(model, **WHAT[what]), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, saturated(llama(), **WHAT[what]), atol=1e-2)
    assert [site.labels for site in sl.attention_sites(model)] == [
        site.labels for site in sl.attention_sites(merged)
    ]


@pytest.mark.parametrize("kind", everyday(["prompt", "prefix", "ia3"], "prefix"))
def test_other_kinds_of_adapters(peft, kind):
    """The fused and the eager attention of the same model are each other's oracle."""
    found = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = {
            "prompt": lambda: peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3),
            "prefix": lambda: peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=3),
            "ia3": lambda: peft.IA3Config(
                target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False
            ),
        }[kind]()
        found.append(saturated(peft.get_peft_model(llama(attention), config).eval()))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


# A bridge that leaves an adapter out: its hooks are right, and its model is wrong.


class Adapted(nn.Module):
    """A projection with a low-rank update beside it, as PEFT's layers keep it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias
        self.nx, self.nf = getattr(base, "nx", None), getattr(base, "nf", None)
        self.a = nn.Parameter(torch.randn(self.weight.shape[0], 2))
        self.b = nn.Parameter(torch.randn(2, self.weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def gpt2() -> Any:
    return tiny.hf_model("GPT2LMHeadModel", transformers.GPT2Config(**tiny.GPT), "eager")


def bridged(model: Any) -> Any:
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return bridge.eval()


def with_a_dropped_adapter() -> Any:
    model = gpt2()
    attention = model.transformer.h[1].attn
    attention.c_attn = Adapted(attention.c_attn)
    return bridged(model)


def test_a_bridge_that_drops_an_adapter():
    bridge = with_a_dropped_adapter()
    before = logits(bridge)
    trial = verify_bridge(bridge)
    assert not trial.ok
    assert "not those of the wrapped model" in str(trial)
    assert "merge_and_unload" in str(trial)
    assert torch.equal(logits(bridge), before)
    own = gpt2()
    kept = bridge.original_model.transformer.h[1].attn._original_component.c_attn
    own.transformer.h[1].attn.c_attn = kept
    assert verify_bridge(bridge, TOKENS).apart == pytest.approx(
        float((logits(own) - before).abs().max()), rel=1e-4
    )


def test_a_dropped_adapter_of_peft(peft):
    settings = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, lora_alpha=64)
    adapted = peft.get_peft_model(gpt2(), settings).eval()
    own = logits(adapted)
    bridge = bridged(adapted.get_base_model())
    trial = verify_bridge(bridge, TOKENS)
    assert trial.apart == pytest.approx(float((logits(bridge) - own).abs().max()), rel=1e-4)
    assert not trial.ok
    merged = peft.get_peft_model(gpt2(), settings).eval().merge_and_unload()
    assert verify_bridge(bridged(merged)).ok


def test_check_says_so(run_check):
    status, out = run_check(with_a_dropped_adapter())
    assert status == 1
    assert "not those of the wrapped model" in out
    assert out.count("changes the output") == 2
    status, out = run_check(bridged(gpt2()))
    assert status == 0
    assert "The logits are those of the wrapped model" in out


@pytest.fixture
def run_check(monkeypatch, capsys):
    def run(model: Any) -> tuple[int, str]:
        monkeypatch.setattr("sat_lens.models.load_model", lambda name, **_: model)
        status = cli.main(["check", "any"])
        return status, capsys.readouterr().out

    return run


def test_what_wraps_no_model_is_not_compared():
    folded = bridged(gpt2())
    folded.enable_compatibility_mode()
    for model in (folded, gpt2()):
        trial = verify_bridge(model)
        assert trial.ok
        assert "not compared" in str(trial)


@pytest.mark.slow
@pytest.mark.parametrize("name", [case.name for case in zoo.CASES if case.name != "native"])
def test_bridges_without_adapters_agree_with_their_models(name):
    case = zoo.case(name)
    args, kwargs = case.inputs()
    model = case.build()
    trial = verify_bridge(model, *args, **kwargs)
    assert trial.ok
    assert trial.apart <= 1e-4 * trial.largest or not hasattr(model, "original_model")


# Loading shows how far it is.


@pytest.mark.parametrize("progress", [True, False])
def test_a_hub_model_shows_its_bars_and_then_nothing(progress, monkeypatch, capsys):
    boot = TransformerBridge.boot_transformers
    monkeypatch.setattr(
        TransformerBridge,
        "boot_transformers",
        staticmethod(lambda path, **options: _booted(boot, **options)),
    )
    monkeypatch.setattr(sl.models, "_hub_answers", lambda: True)
    hf_logging.enable_progress_bar()
    sl.load_model("someone/model", progress=progress)
    error = capsys.readouterr().err
    assert ("model.safetensors" in error) == progress
    assert ("Loading checkpoint shards" in error) == progress
    assert hf_logging.is_progress_bar_enabled()
    sl.load_model("demo")
    assert capsys.readouterr().err == ""


def _booted(boot: Any, **options: Any) -> Any:
    """What the hub's client and transformers show while a model comes."""
    with huggingface_hub.utils.tqdm(total=8, desc="model.safetensors") as bar:
        bar.update(8)
    for _ in hf_logging.tqdm(range(2), desc="Loading checkpoint shards"):
        pass
    return boot(str(sl.models.DEMO_FOLDER), **options)


def test_large_files_show_their_bars(monkeypatch, capsys):
    monkeypatch.setattr(sl.models, "MANY_BYTES", 1)
    sl.load_model("demo")
    assert "Loading weights" in capsys.readouterr().err


def test_a_user_who_switched_bars_off_sees_none(monkeypatch, capsys):
    monkeypatch.setattr(sl.models, "MANY_BYTES", 1)
    hf_logging.disable_progress_bar()
    try:
        sl.load_model("demo")
        assert not hf_logging.is_progress_bar_enabled()
    finally:
        hf_logging.enable_progress_bar()
    assert capsys.readouterr().err == ""


# What is cut off is said.


def test_a_text_beyond_the_context_is_said_to_be_cut(demo, caplog):
    text = "x = 1 + 2\n" * 200
    beyond = demo.to_tokens(text, truncate=False).shape[1] - demo.cfg.n_ctx
    with caplog.at_level(logging.WARNING):
        sl.run_with_saturation_cache(demo, text, names_filter="blocks.0.hook_resid_post")
    (record,) = caplog.records
    assert "1 of the texts were longer than the model's context" in record.message
    assert f"({beyond} tokens in all)" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sl.run_with_saturation_cache(demo, "x = 1", names_filter="blocks.0.hook_resid_post")
    assert not caplog.records
