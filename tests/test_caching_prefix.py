"""A paired run computes layers below the first chosen head once, and gives what two runs give."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter

import pytest
import tiny
import torch
import zoo
from everyday import everyday

import sat_lens as sl
from sat_lens.caching import pair as pairs

GPT2 = tiny.reader(
    "gpt2", "GPT2LMHeadModel", "GPT2Config", "scores", settings=tiny.GPT | {"n_layer": 4}
)
LLAMA = tiny.decoder("llama", "Llama", num_hidden_layers=4, num_key_value_heads=2)
ONCE = [
    *("gpt2", "llama", "bert", "gptj", "gpt_neox", "bamba", "qwen3_next", "falcon_h1", "jamba"),
    *("vit", "native"),
]
TWICE = ["hrm_text", "t5", "openai_gpt"]


@pytest.fixture(scope="module")
def deep():
    return GPT2.build()


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of each block of a model, seen from its class."""

    def count(model):
        found, names = Counter(), {id(block): i for i, block in enumerate(model.blocks)}
        kind = type(model.blocks[0])
        forward = kind.forward

        def counted(self, *args, **kwargs):
            found[names[id(self)]] += 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counted)
        return found

    return count


def by_hand(model, *inputs, heads, **kwargs):
    runs = []
    for context in (contextlib.nullcontext(), sl.saturate(model, heads)):
        with torch.no_grad(), context:
            runs.append(model.run_with_cache(*inputs, **kwargs))
    return runs


def together(model, *inputs, **kwargs):
    with torch.no_grad():
        return sl.run_with_saturation_cache(model, *inputs, **kwargs)


def assert_equal(pair, runs):
    for found, (logits, cache) in zip((pair.soft, pair.saturated), runs, strict=True):
        assert torch.equal(found.logits, logits)
        assert list(found.cache.keys()) == list(cache.keys())
        for name, value in cache.items():
            assert found.cache[name].dtype == value.dtype
            assert torch.equal(found.cache[name], value), name


def last_heads(model):
    return sl.attention_sites(model)[-1].labels[1:3]


@pytest.mark.parametrize("name", everyday(ONCE, "llama", "bert"))
def test_a_layer_below_runs_once_in_models_of_many_kinds(name, calls):
    model, (inputs, kwargs) = zoo.model_of(name), zoo.case(name).inputs()
    heads = last_heads(model)
    runs = by_hand(model, *inputs, heads=heads, **kwargs)
    found = calls(model)
    assert_equal(together(model, *inputs, heads=heads, **kwargs), runs)
    assert found == {0: 1, 1: 2}
    assert not torch.equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize("name", everyday(TWICE, TWICE[0]))
def test_where_more_than_a_stack_of_blocks_runs_both_runs_are_whole(name):
    model, (inputs, kwargs) = zoo.model_of(name), zoo.case(name).inputs()
    heads = last_heads(model)
    runs = by_hand(model, *inputs, heads=heads, **kwargs)
    assert_equal(together(model, *inputs, heads=heads, **kwargs), runs)


def test_layers_that_share_keys_get_their_own():
    model = tiny.reader(
        "gemma4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        "softmax",
        settings=tiny.SIZE
        | zoo.WINDOW
        | zoo.WIDE
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"global_head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
        | {"vocab_size_per_layer_input": tiny.VOCAB},
    ).build()
    x = tiny.tokens()
    assert_equal(together(model, x, heads="L3H0"), by_hand(model, x, heads="L3H0"))


@pytest.mark.parametrize("case", everyday([GPT2, LLAMA], GPT2), ids=lambda case: case.name)
@pytest.mark.parametrize("first", everyday(range(4), 0, 2))
def test_each_layer_below_the_first_chosen_head_runs_once(case, first, calls):
    model, x = case.build(), tiny.tokens()
    heads = [(layer, 1) for layer in range(first, 4)]
    runs = by_hand(model, x, heads=heads)
    found = calls(model)
    assert_equal(together(model, x, heads=heads), runs)
    assert found == {layer: 1 if layer < first else 2 for layer in range(4)}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stop_at_layer": 1},
        {"stop_at_layer": 3},
        {"stop_at_layer": -1},
        {"attention_mask": torch.tensor([[0] * 4 + [1] * 6, [1] * 10])},
        {"attention_mask": torch.tensor([[1] * 4 + [0] * 6, [1] * 10])},
        {"names_filter": lambda name: name.endswith("hook_z")},
        {"names_filter": ["blocks.1.hook_resid_post", "blocks.3.attn.hook_pattern"]},
        {"names_filter": "blocks.3.attn.hook_pattern"},
        {"pos_slice": (2, 5)},
        {"return_type": "loss"},
    ],
    ids=["stop1", "stop3", "stop-1", "left", "right", "filter", "names", "name", "slice", "loss"],
)
def test_arguments_of_the_run_count_for_both(deep, kwargs, calls):
    x = tiny.tokens()
    runs = by_hand(deep, x, heads="L2H1", **kwargs)
    found = calls(deep)
    assert_equal(together(deep, x, heads="L2H1", **kwargs), runs)
    assert found[0] == 1


def test_one_prompt_without_batch_axis_on_another_device(deep):
    x = tiny.tokens(batch=1)
    pair = together(deep, x, heads="L2H1", remove_batch_dim=True, device="meta")
    assert {value.device.type for value in pair.saturated.cache.values()} == {"meta"}
    runs = by_hand(deep, x, heads="L2H1", remove_batch_dim=True)
    assert_equal(together(deep, x, heads="L2H1", remove_batch_dim=True), runs)


@pytest.mark.parametrize("kwargs", [{"use_cache": True}, {"return_type": "logits_and_cache"}])
def test_what_leaves_a_state_behind_runs_twice(deep, kwargs, calls):
    found = calls(deep)
    together(deep, tiny.tokens(), heads="L3H1", **kwargs)
    assert set(found.values()) == {2}


def growing():
    """Make a hook that does more each time."""
    count = iter(range(1, 9))

    def hook(value, hook):
        return value * next(count)

    return hook


def drawing():
    torch.manual_seed(1)

    def hook(value, hook):
        return value + torch.randn_like(value)

    return hook


def in_place():
    def hook(value, hook):
        value[:, 0] += 1

    return hook


@pytest.mark.parametrize("make", everyday([growing, drawing, in_place], growing))
@pytest.mark.parametrize(
    "where",
    [
        "hook_embed",
        "blocks.0.hook_resid_pre",
        "blocks.1.attn.hook_z",
        "blocks.2.hook_resid_pre",
        "blocks.3.mlp.hook_out",
    ],
)
def test_hooks_of_others_do_what_they_do_in_two_runs(deep, make, where):
    x = tiny.tokens()
    with deep.hooks([(where, make())]):
        runs = by_hand(deep, x, heads="L2H1")
    with deep.hooks([(where, make())]):
        assert_equal(together(deep, x, heads="L2H1"), runs)


def test_a_hook_above_keeps_the_layers_below_from_running_twice(deep, calls):
    found = calls(deep)
    with deep.hooks([("blocks.3.hook_resid_pre", growing())]):
        together(deep, tiny.tokens(), heads="L2H1")
    assert found == {0: 1, 1: 1, 2: 2, 3: 2}


def test_a_pytorch_hook_below_sees_both_runs(deep):
    seen = []
    handle = deep.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    together(deep, tiny.tokens(), heads="L2H1")
    handle.remove()
    assert len(seen) == 2


@pytest.mark.parametrize("outer", ["L0H2", "L3H2"])
def test_inside_another_intervention(deep, outer):
    x = tiny.tokens()
    with sl.replace_attention(deep, sl.transforms.RandomKey(3), outer):
        runs = by_hand(deep, x, heads="L2H1")
    with sl.replace_attention(deep, sl.transforms.RandomKey(3), outer):
        assert_equal(together(deep, x, heads="L2H1"), runs)


def test_blocks_that_get_something_else_are_computed(deep, monkeypatch, calls):
    """An embedding that is not the same twice, and that no hook tells of."""
    x, kind = tiny.tokens(), type(deep.embed)
    forward = kind.forward

    def with_counter():
        count = iter(range(9))
        monkeypatch.setattr(kind, "forward", lambda *a, **k: forward(*a, **k) + next(count))

    sl.attention_sites(deep)
    with_counter()
    runs = by_hand(deep, x, heads="L3H1")
    with_counter()
    found = calls(deep)
    assert_equal(together(deep, x, heads="L3H1"), runs)
    assert set(found.values()) == {2}


def test_layers_above_find_the_keys_of_those_below(deep, monkeypatch, calls):
    x, kind = tiny.tokens(), type(deep.blocks[0])
    forward = kind.forward

    def reading(self, hidden, cache, *args, **kwargs):
        kept = cache.layers[0].keys
        shift = 0 if kept is None else kept.mean()
        return forward(self, hidden, cache, *args, **kwargs) + shift

    monkeypatch.setattr(kind, "forward", reading)
    runs = by_hand(deep, x, heads="L2H1")
    found = calls(deep)
    assert_equal(together(deep, x, heads="L2H1"), runs)
    assert found == {0: 1, 1: 1, 2: 2, 3: 2}


def test_blocks_that_draw_are_computed(deep, monkeypatch, calls):
    x, kind = tiny.tokens(), type(deep.blocks[0].mlp)
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda *a, **k: (y := forward(*a, **k)) + torch.rand_like(y)
    )
    sl.attention_sites(deep)
    torch.manual_seed(0)
    runs = by_hand(deep, x, heads="L3H1")
    torch.manual_seed(0)
    found = calls(deep)
    assert_equal(together(deep, x, heads="L3H1"), runs)
    assert set(found.values()) == {2}


def test_both_runs_have_gradients_of_their_own(deep):
    x = tiny.tokens()
    pair = sl.run_with_saturation_cache(deep, x, heads="L3H1")
    weight = next(deep.blocks[0].parameters())
    gradients = [
        torch.autograd.grad(run.logits.sum(), weight)[0] for run in (pair.soft, pair.saturated)
    ]
    with sl.saturate(deep, "L3H1"):
        wanted = torch.autograd.grad(deep(x).sum(), weight)[0]
    assert torch.equal(gradients[1], wanted)
    assert not torch.equal(*gradients)


def test_inference_mode_changes_nothing(deep):
    x = tiny.tokens()
    runs = by_hand(deep, x, heads="L3H1")
    with torch.inference_mode():
        assert_equal(sl.run_with_saturation_cache(deep, x, heads="L3H1"), runs)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at_run", [1, 2])
def test_nothing_is_left_on_the_blocks(deep, error, at_run):
    def state():
        return [
            (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in deep.modules()
        ]

    together(deep, tiny.tokens(), heads="L3H1")
    before, runs = state(), []

    def failing(value, hook):
        runs.append(1)
        if len(runs) == at_run:
            raise error

    with deep.hooks([("blocks.3.hook_resid_pre", failing)]), pytest.raises(error):
        together(deep, tiny.tokens(), heads="L3H1")
    assert len(runs) == at_run
    assert state() == before
    copy.deepcopy(deep.blocks[0])


def test_caches_that_do_not_fit_together_are_not_joined(deep, monkeypatch):
    x = tiny.tokens()
    runs = by_hand(deep, x, heads="L3H1")
    monkeypatch.setattr(pairs.Prefix, "completed", lambda *_: None)
    assert_equal(together(deep, x, heads="L3H1"), runs)
