"""What measuring roles spares: logits that nobody reads, and memory."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch
import transformers
import zoo
from everyday import everyday
from torch.profiler import ProfilerActivity, profile

import sat_lens as sl

N_HEADS = 8
LONG = {"hidden_size": 64, "num_attention_heads": N_HEADS, "max_position_embeddings": 512}


def unembedded(model, module, run):
    """Say how many positions are unembedded by each forward pass."""
    counts = []
    handle = module.register_forward_hook(lambda _m, _a, out: counts.append(out.shape[1]))
    run()
    handle.remove()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    everyday(["gpt2", "llama", "native", "bert", "gpt_oss_sink", "t5", "bart"], "gpt2", "t5"),
)
def test_one_position_is_unembedded_for_all_models(name):
    case = zoo.case(name)
    model, ((tokens,), extra) = case.build(), case.inputs()
    sl.attention_sites(model)

    def run(**kwargs):
        sl.head_roles(model, [{"input": tokens, **extra}], min_keys=2, progress=False, **kwargs)

    assert unembedded(model, model.unembed, run) == [1]
    length = extra.get("decoder_input", tokens).shape[1]
    with_metric = unembedded(model, model.unembed, lambda: run(metric=lambda x: x[:, -1].sum()))
    assert with_metric == [length, 1]
    assert model(tokens, **extra).shape[1] == length


@pytest.mark.slow
def test_a_plain_model_unembeds_one_position_too():
    config = transformers.BartConfig(**tiny.BART)
    model = tiny.hf_model("BartForConditionalGeneration", config)
    batch = {"input_ids": tiny.tokens(), "decoder_input_ids": tiny.tokens(seed=1)}
    sl.attention_sites(model)
    counts = unembedded(
        model, model.lm_head, lambda: sl.head_roles(model, [batch], min_keys=2, progress=False)
    )
    assert counts == [1]


@pytest.mark.slow
def test_a_classifier_of_whole_images_is_left_alone():
    model = zoo.model_of("vit")
    with torch.no_grad():
        before = model(tiny.noise(2, 3, 16, 16))
    frame = sl.head_roles(model, tiny.noise(2, 3, 16, 16), min_keys=2, progress=False).frame()
    assert len(frame) == 2 * tiny.N_HEADS
    assert torch.equal(model(tiny.noise(2, 3, 16, 16)), before)


def peak_bytes(run):
    """Measure the most memory that tensors take at once while something runs."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()
    events = [e for e in measured.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config", "sizes"),
    [
        ("GPT2LMHeadModel", "GPT2Config", {**tiny.GPT, "n_head": N_HEADS, "n_positions": 512}),
        ("LlamaForCausalLM", "LlamaConfig", {**tiny.SIZE, **LONG}),
        ("BertForMaskedLM", "BertConfig", {**tiny.SIZE, **LONG}),
    ],
)
def test_the_peak_is_at_most_four_times_one_layers_scores(architecture, config, sizes):
    model = tiny.of_class(architecture, config, **sizes)()
    tokens = torch.randint(3, 90, (2, 512), generator=torch.Generator().manual_seed(0))
    sl.attention_sites(model)
    scores = 4 * 2 * N_HEADS * 512 * 512
    assert peak_bytes(lambda: sl.head_roles(model, tokens, progress=False)) < 4 * scores


def bytes_alive():
    gc.collect()
    # Not the stand-ins that compiling leaves behind, which have no memory.
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nothing_is_kept_that_grows_with_the_data(name):
    model, alive = zoo.model_of(name), []

    def stream():
        for seed in range(5):
            alive.append(bytes_alive())
            yield tiny.tokens(2, 32, seed=seed)

    sl.head_roles(model, stream(), progress=False)
    # The first two batches find sums, and one batch's own, in the making.
    assert alive[2] == alive[3] == alive[4]
