"""Whatever happens inside a block, the model comes out as it went in; and inside, all is right."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from everyday import everyday
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import sat_lens as sl
from sat_lens.attention import RandomKey

TOKENS = torch.tensor([[5, 9, 200, 31, 9, 200, 77, 5, 1023, 14], [8, 3, 3, 450, 61, 8, 3, 2, 0, 7]])


def fresh_native() -> Any:
    """A model that is touched at its softmax."""
    config = TransformerBridgeConfig(
        d_model=32,
        d_head=8,
        n_heads=4,
        n_layers=2,
        n_ctx=64,
        d_vocab=2048,
        d_mlp=64,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
    )
    model = TransformerBridge.boot_native(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


native = functools.cache(fresh_native)


@pytest.fixture(params=["scores", "softmax"])
def model(request: pytest.FixtureRequest, demo: Any) -> Any:
    """One model of each level."""
    found = demo if request.param == "scores" else native()
    assert {site.level for site in sl.attention_sites(found)} == {request.param}
    return found


# What a model is, apart from what it computes


def parts(model: Any) -> dict[int, nn.Module]:
    points = {id(point): point for point in model.hook_dict.values()}
    original = {id(module): module for module in model.original_model.modules()}
    return {**points, **original, **{id(module): module for module in model.modules()}}


def state(model: Any) -> dict[str, Any]:
    """Everything that an intervention could leave behind, by identity or by value."""
    hook_lists = [
        name
        for name in vars(nn.Module())
        if "hooks" in name and isinstance(vars(nn.Module())[name], dict)
    ]
    found: dict[str, Any] = {
        "hooks": {
            (key, name): [(k, id(hook)) for k, hook in getattr(part, name).items()]
            for key, part in parts(model).items()
            for name in hook_lists
        },
        "lens hooks": {
            (key, name): len(getattr(part, name, []))
            for key, part in parts(model).items()
            for name in ("fwd_hooks", "bwd_hooks")
        },
        "overrides": {
            key: {n: id(v) for n, v in vars(part).items() if callable(v)}
            for key, part in parts(model).items()
        },
        "training": {key: part.training for key, part in parts(model).items()},
        "random": torch.random.get_rng_state().tolist(),
        "modes": len(_get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
    }
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = (id(parameter), parameter.requires_grad, parameter.grad)
    return found


@contextlib.contextmanager
def leaves_no_trace(model: Any) -> Iterator[None]:
    sl.attention_sites(model)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        logits = model(TOKENS)
    before = state(model)
    yield
    after = state(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"
    assert all(torch.equal(was, now) for was, now in zip(weights, model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), logits)


class Boom(Exception):  # noqa: N818 - it stands for an error of anybody's
    pass


ERRORS = [Boom(), KeyboardInterrupt(), SystemExit(), GeneratorExit()]


def raising(error: BaseException) -> Callable[..., None]:
    def hook_fn(tensor: Tensor, hook: Any = None) -> None:
        raise error

    return hook_fn


def last_attention(model: Any) -> str:
    return sl.attention_sites(model)[-1].path


WAYS = {
    "limit": lambda model: sl.saturate(model),
    "one head": lambda model: sl.saturate(model, "L1H2"),
    "scales": lambda model: sl.saturate(model, scale=lambda layer, head: layer + head),
    "nearest": lambda model: sl.saturate(model, ties="nearest"),
    "random": lambda model: sl.replace_attention(model, RandomKey(1)),
    "own": lambda model: sl.replace_attention(model, lambda scores: -scores),
}
ways = pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))


@ways
def test_a_block_that_ends_leaves_no_trace(model: Any, way: Any) -> None:
    with leaves_no_trace(model), torch.no_grad():
        soft = model(TOKENS)
        with way(model) as same:
            assert same is model
            assert not torch.equal(model(TOKENS), soft)


@pytest.mark.parametrize("load", [sl.load_model, fresh_native])
def test_looking_at_a_model_for_the_first_time_leaves_no_trace(load: Any) -> None:
    fresh = load()
    fresh(TOKENS)  # TransformerLens lays hooks of its own in the first run
    before = state(fresh)
    sl.attention_sites(fresh)
    assert state(fresh) == before
    with sl.saturate(fresh):
        fresh(TOKENS)
    assert state(fresh) == before


@ways
def test_a_block_without_a_run_leaves_no_trace(model: Any, way: Any) -> None:
    with leaves_no_trace(model), way(model):
        pass


@ways
@pytest.mark.parametrize("error", everyday(ERRORS, ERRORS[1]))
@pytest.mark.parametrize(
    "point", everyday(["hook_pattern", "hook_attn_scores", "hook_in", "hook_out"], "hook_pattern")
)
def test_an_exception_in_the_middle_of_a_run_leaves_no_trace(
    model: Any, way: Any, error: BaseException, point: str
) -> None:
    name = f"{last_attention(model)}.{point}"
    with leaves_no_trace(model), pytest.raises(type(error)), way(model):
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, raising(error))])


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt()])
def test_an_exception_inside_the_transform_leaves_no_trace(
    model: Any, error: BaseException
) -> None:
    def transform(scores: Tensor) -> Tensor:
        raise error

    with leaves_no_trace(model), pytest.raises(type(error)):  # noqa: SIM117
        with sl.replace_attention(model, transform, "L1H0"):
            model(TOKENS)


@ways
@pytest.mark.parametrize("error", everyday(ERRORS[:2], ERRORS[0]))
def test_an_exception_between_runs_leaves_no_trace(
    model: Any, way: Any, error: BaseException
) -> None:
    def runs_and_raises() -> None:
        with way(model), torch.no_grad():
            model(TOKENS)
            raise error

    with leaves_no_trace(model), pytest.raises(type(error)):
        runs_and_raises()


def test_a_run_goes_on_after_an_interrupt_inside_the_block(model: Any) -> None:
    name = f"{last_attention(model)}.hook_pattern"
    with torch.no_grad(), leaves_no_trace(model):
        with sl.saturate(model):
            expected = model(TOKENS)
        with sl.saturate(model):
            with pytest.raises(KeyboardInterrupt):
                model.run_with_hooks(TOKENS, fwd_hooks=[(name, raising(KeyboardInterrupt()))])
            assert torch.equal(model(TOKENS), expected)


def test_an_error_before_the_block_leaves_no_trace(model: Any) -> None:
    with leaves_no_trace(model), pytest.raises(sl.SatLensError):  # noqa: SIM117
        with sl.saturate(model, ["L0H0", "L9H9"]):
            pytest.fail("the block was entered")


def test_gradients_inside_the_block_leave_no_trace(model: Any) -> None:
    with leaves_no_trace(model):
        with sl.saturate(model, scale=2.0):
            model(TOKENS)[:, -1].logsumexp(-1).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert any(gradient is not None and gradient.any() for gradient in gradients)
        model.zero_grad(set_to_none=True)


# Nesting


def test_nested_blocks_on_different_heads_add_up(model: Any) -> None:
    with torch.no_grad(), leaves_no_trace(model):
        with sl.saturate(model, ["L0H1", "L1H2"]):
            expected = model(TOKENS)
        with sl.saturate(model, "L0H1"):
            alone = model(TOKENS)
            with sl.saturate(model, "L1H2"):
                assert torch.equal(model(TOKENS), expected)
            assert torch.equal(model(TOKENS), alone)


def test_nested_blocks_on_the_same_heads_follow_one_another(model: Any) -> None:
    with torch.no_grad(), leaves_no_trace(model):
        with sl.saturate(model, scale=6.0):
            expected = model(TOKENS)
        with sl.saturate(model, scale=2.0), sl.saturate(model, scale=3.0):
            found = model(TOKENS)
        # The product of the scales, but for the rounding of two products instead of one.
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


# Inside the block


def cached(model: Any, **options: Any) -> tuple[Tensor, Any]:
    with torch.no_grad():
        return model.run_with_cache(TOKENS, **options)


def test_the_cache_holds_the_saturated_pattern(model: Any) -> None:
    _, soft = cached(model)
    with sl.saturate(model):
        logits, hard = cached(model)
    with torch.no_grad(), sl.saturate(model):
        assert torch.equal(model(TOKENS), logits)
    for site in sl.attention_sites(model):
        pattern = hard[f"{site.path}.hook_pattern"]
        winners = (pattern > 0).sum(-1, keepdim=True)
        assert torch.allclose(pattern, (pattern > 0) / winners, atol=1e-7)
        assert pattern.triu(1).count_nonzero() == 0
    # Before the first attention nothing has changed: its winners are those of the soft pattern.
    first = sl.attention_sites(model)[0].path + ".hook_pattern"
    assert torch.equal(hard[first].argmax(-1), soft[first].argmax(-1))


def test_heads_that_are_not_chosen_are_the_same_to_the_bit(model: Any) -> None:
    _, soft = cached(model)
    with sl.saturate(model, ["L0H1", "L0H2"]):
        _, hard = cached(model)
    name = sl.attention_sites(model)[0].path + ".hook_pattern"
    for head in range(soft[name].shape[1]):
        same = torch.equal(hard[name][:, head], soft[name][:, head])
        assert same == (head not in (1, 2))


def test_hooks_of_others_run_and_see_the_new_values(model: Any) -> None:
    path = sl.attention_sites(model)[0].path
    seen: dict[str, list[Tensor]] = {"before": [], "inside": []}

    def look(where: str) -> Callable[..., None]:
        def hook_fn(tensor: Tensor, hook: Any = None) -> None:
            seen[where].append(tensor.detach().clone())

        return hook_fn

    with sl.saturate(model):
        _, hard = cached(model)
    name = f"{path}.hook_pattern"
    with leaves_no_trace(model), torch.no_grad(), model.hooks(fwd_hooks=[(name, look("before"))]):
        with sl.saturate(model):
            with model.hooks(fwd_hooks=[(name, look("inside"))]):
                model(TOKENS)
            model(TOKENS)
        model(TOKENS)
    assert [len(values) for values in seen.values()] == [3, 1]
    pattern = hard[name]
    assert torch.equal(seen["inside"][0], pattern)
    assert torch.equal(seen["before"][0], pattern)
    assert torch.equal(seen["before"][1], pattern)
    assert not torch.equal(seen["before"][2], pattern)


def test_a_hook_added_later_acts_on_the_saturated_values(demo: Any) -> None:
    name = "blocks.0.attn.hook_attn_scores"

    def first_key_only(scores: Tensor, hook: Any = None) -> Tensor:
        return scores.index_fill(-1, torch.tensor([0]), 1e4)

    with leaves_no_trace(demo), sl.saturate(demo), demo.hooks(fwd_hooks=[(name, first_key_only)]):
        _, found = cached(demo)
    assert torch.equal(found["pattern", 0][..., 0], torch.ones(2, 8, 10))


def test_an_edit_added_before_is_what_gets_saturated(demo: Any) -> None:
    name = "blocks.0.attn.hook_attn_scores"

    def negated(scores: Tensor, hook: Any = None) -> Tensor:
        return torch.where(scores < -1e30, scores, -scores)

    with torch.no_grad(), leaves_no_trace(demo):
        scores = demo.run_with_cache(TOKENS)[1]["attn_scores", 0]
        with demo.hooks(fwd_hooks=[(name, negated)]), sl.saturate(demo):
            _, found = demo.run_with_cache(TOKENS)
    worst = torch.where(scores < -1e30, math.inf, scores).argmin(-1)
    assert torch.equal(found["pattern", 0].argmax(-1), worst)


def test_run_with_hooks_inside_the_block_keeps_it(model: Any) -> None:
    name = f"{last_attention(model)}.hook_out"
    with torch.no_grad(), sl.saturate(model):
        expected = model(TOKENS)
        found = model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda tensor, hook: None)])
        assert torch.equal(found, expected)
        assert torch.equal(model(TOKENS), expected)


def test_saturation_hooks_do_what_saturate_does(demo: Any) -> None:
    scale = {"L0H1": math.inf, "L2H7": 2.0, "L2H0": 0.0}
    with torch.no_grad(), leaves_no_trace(demo):
        with sl.saturate(demo, scale=scale):
            expected = demo(TOKENS)
        hooks = sl.saturation_hooks(demo, scale=scale)
        assert torch.equal(demo.run_with_hooks(TOKENS, fwd_hooks=hooks), expected)


# Shapes of inputs


@pytest.mark.parametrize("scale", [math.inf, 3.0, 0.0])
def test_a_batch_is_its_prompts_one_by_one(model: Any, scale: float) -> None:
    with torch.no_grad(), sl.saturate(model, scale=scale):
        together = model(TOKENS)
        for i in range(len(TOKENS)):
            alone = model(TOKENS[i : i + 1])[0]
            # Matrix products of another size round differently, in the sixth digit or so.
            assert torch.allclose(alone, together[i], atol=1e-5 * float(together.abs().max()))


@pytest.mark.parametrize("scale", [math.inf, 3.0, 0.0])
def test_a_single_token_attends_to_itself(model: Any, scale: float) -> None:
    one = TOKENS[:1, :1]
    with torch.no_grad():
        soft = model(one)
        with sl.saturate(model, scale=scale):
            assert torch.equal(model(one), soft)


def generated(model: Any, use_cache: bool) -> Tensor:
    return model.generate(
        TOKENS[:1, :6],
        max_new_tokens=12,
        do_sample=False,
        stop_at_eos=False,
        use_past_kv_cache=use_cache,
        verbose=False,
    )


@pytest.mark.parametrize("heads", everyday([None, "L1H3"], None))
@pytest.mark.parametrize(
    "options", everyday([{}, {"scale": 4.0}, {"scale": 0.0}, {"ties": "nearest"}], {})
)
def test_generation_does_not_depend_on_the_cache(demo: Any, heads: Any, options: Any) -> None:
    with leaves_no_trace(demo), torch.no_grad(), sl.saturate(demo, heads, **options):
        tokens = generated(demo, use_cache=True)
        assert tokens.shape == (1, 18)
        assert torch.equal(tokens, generated(demo, use_cache=False))


def test_random_keys_do_not_depend_on_the_cache(demo: Any) -> None:
    with torch.no_grad(), sl.replace_attention(demo, RandomKey(5)):
        assert torch.equal(generated(demo, use_cache=True), generated(demo, use_cache=False))


# The oracle: a Llama written out from its weights, in float64


class Oracle:
    """The demo's forward pass, with a softmax of its own for chosen heads."""

    def __init__(self, model: Any, heads: set[tuple[int, int]], c: float) -> None:
        self.config = model.original_model.config
        self.weights = {
            name.replace("._original_component", ""): value.detach().double()
            for name, value in model.original_model.state_dict().items()
        }
        self.heads = heads
        self.c = c
        # The smallest lead of a winner over the next key, in rows that take the limit.
        self.lead = math.inf

    def __call__(self, tokens: Tensor) -> Tensor:
        self.lead = math.inf
        resid = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            resid = resid + self.attention(layer, self.normed(resid, prefix + "input_layernorm"))
            middle = self.normed(resid, prefix + "post_attention_layernorm")
            gate = middle @ self.weights[prefix + "mlp.gate_proj.weight"].T
            up = middle @ self.weights[prefix + "mlp.up_proj.weight"].T
            resid = resid + (gate * gate.sigmoid() * up) @ (
                self.weights[prefix + "mlp.down_proj.weight"].T
            )
        return self.normed(resid, "model.norm") @ self.weights["model.embed_tokens.weight"].T

    def normed(self, resid: Tensor, name: str) -> Tensor:
        size = (resid.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt()
        return resid / size * self.weights[f"{name}.weight"]

    def attention(self, layer: int, resid: Tensor) -> Tensor:
        q, k, v = (
            (resid @ self.weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T)
            .unflatten(-1, (-1, self.config.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        scores = rotated(q) @ rotated(k).mT / math.sqrt(self.config.head_dim)
        pattern = torch.stack(
            [
                self.pattern(scores[:, head], self.c if (layer, head) in self.heads else 1.0)
                for head in range(self.config.num_attention_heads)
            ],
            dim=1,
        )
        z = (pattern @ v).transpose(1, 2).flatten(2)
        return z @ self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T

    def pattern(self, scores: Tensor, c: float) -> Tensor:
        rows = torch.zeros_like(scores)
        for query in range(scores.shape[-1]):
            visible = scores[:, query, : query + 1]
            gap = visible.amax(-1, keepdim=True) - visible
            weight = (gap == 0).double() if c == math.inf else torch.exp(-c * gap)
            rows[:, query, : query + 1] = weight / weight.sum(-1, keepdim=True)
            if c == math.inf and query > 0:
                self.lead = min(self.lead, float(gap.sort(-1).values[:, 1].min()))
        return rows


def rotated(x: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) by an angle that grows with the position."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half).double() / half)
    angle = torch.arange(x.shape[-2]).double()[:, None] * frequency
    one, other = x[..., :half], x[..., half:]
    return torch.cat(
        [one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], dim=-1
    )


ALL = {(layer, head) for layer in range(4) for head in range(8)}


def prompt_for(oracle: Oracle) -> Tensor:
    """The first of some prompts in which no winner's lead is within the rounding of float32."""
    for seed in range(200):
        tokens = torch.randint(3, 2048, (2, 12), generator=torch.Generator().manual_seed(seed))
        oracle(tokens)
        if oracle.lead > 1e-4:
            return tokens
    raise AssertionError("all prompts have near-ties")


@pytest.mark.parametrize(
    ("heads", "c"),
    [
        (ALL, math.inf),
        ({(1, 3)}, math.inf),
        ({(0, 0), (3, 7)}, math.inf),
        (ALL, 3.0),
        ({(2, 5)}, 3.0),
        (ALL, 0.0),
        (ALL, 0.3),
        (set(), 1.0),
    ],
)
def test_the_demo_agrees_with_a_llama_written_out_by_hand(
    demo: Any, heads: set[tuple[int, int]], c: float
) -> None:
    oracle = Oracle(demo, heads, c)
    tokens = prompt_for(oracle)
    expected = oracle(tokens)
    block = sl.saturate(demo, list(heads), scale=c) if heads else contextlib.nullcontext()
    with torch.no_grad(), block:
        found = demo(tokens).double()
    # float32 through four layers: relative to the largest logit, some hundred roundings.
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("c", [math.inf, 3.0, 0.0])
def test_padding_on_the_left_changes_nothing(demo: Any, c: float) -> None:
    """The first rows are fully masked here, and the mask is a finite number."""
    tokens = prompt_for(Oracle(demo, ALL, c))
    pads = torch.full((2, 5), 2)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(tokens)], dim=1)
    with torch.no_grad(), sl.saturate(demo, scale=c):
        alone = demo(tokens)
        padded, cache = demo.run_with_cache(torch.cat([pads, tokens], dim=1), attention_mask=mask)
    assert cache["pattern", 3][:, :, 5:, :5].count_nonzero() == 0
    assert padded.isfinite().all()
    # Rotary angles of shifted positions differ by rounding only.
    assert torch.allclose(padded[:, 5:], alone, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize(
    "dtype", everyday([torch.bfloat16, torch.float16, torch.float64], torch.bfloat16)
)
@pytest.mark.parametrize("scale", [math.inf, 3.0, 0.0])
def test_a_model_of_another_dtype(dtype: torch.dtype, scale: float) -> None:
    model = sl.load_model("demo", dtype=dtype)
    pads = torch.full((2, 3), 2)
    mask = torch.cat([torch.zeros_like(pads), torch.ones_like(TOKENS)], dim=1)
    with torch.no_grad(), sl.saturate(model, scale=scale):
        logits, cache = model.run_with_cache(torch.cat([pads, TOKENS], dim=1), attention_mask=mask)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    for layer in range(4):
        pattern = cache["pattern", layer][:, :, 3:]
        assert pattern[..., :3].count_nonzero() == 0
        assert pattern.triu(4).count_nonzero() == 0
        if scale != 3.0:
            winners = (pattern > 0).sum(-1, keepdim=True)
            shares = ((pattern > 0) / winners).to(dtype)
            assert torch.allclose(pattern, shares, rtol=2 * torch.finfo(dtype).eps, atol=0)
