"""What cannot be an error and is hardly ever meant: one warning each, that says what to do."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch

import sat_lens as sl

TOKENS = torch.tensor([[5, 9, 200, 31, 9, 200, 77, 5]])
BLOCKS = {
    "saturate": lambda model: sl.saturate(model),
    "replace_attention": lambda model: sl.replace_attention(model, sl.transforms.Uniform()),
}
blocks = pytest.mark.parametrize(("name", "block"), BLOCKS.items(), ids=BLOCKS)


@pytest.fixture
def silent():
    """No warning of ours may come, also not when objects are dropped."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
        gc.collect()
    assert [str(one.message) for one in said if one.category is UserWarning] == []


@blocks
def test_a_block_that_was_never_entered(demo, name, block, pytestconfig):
    with pytest.warns(UserWarning, match=rf"{name}.*never entered.*with sat_lens") as said:
        block(demo)
    assert len(said) == 1
    # What enforces annotations puts frames of its own between.
    assert said[0].filename == __file__ or pytestconfig.getoption("--check-types")


@blocks
def test_a_block_without_a_forward_pass(demo, name, block, pytestconfig):
    with (
        pytest.warns(UserWarning, match=rf"inside the block of sat_lens\.{name}") as said,
        block(demo),
    ):
        pass
    assert len(said) == 1
    # What enforces annotations puts frames of its own between.
    assert said[0].filename == __file__ or pytestconfig.getoption("--check-types")


@blocks
@pytest.mark.usefixtures("silent")
def test_blocks_that_are_used_in_any_way(demo, name, block):
    with torch.no_grad():
        with block(demo) as model:
            inside = model(TOKENS)

        @block(demo)
        def decorated():
            return demo(TOKENS)

        assert torch.equal(decorated(), inside)
        assert torch.equal(decorated(), inside)
        again = block(demo)
        for _ in range(2):
            with again:
                assert torch.equal(demo(TOKENS), inside)
    del again, decorated


@pytest.mark.usefixtures("silent")
def test_an_error_is_not_followed_by_a_warning(demo):
    with pytest.raises(sl.SatLensError), sl.saturate(demo, "L9"):
        pass
    with pytest.raises(ZeroDivisionError), sl.saturate(demo):
        1 / 0  # noqa: B018
    with pytest.raises(TypeError):
        sl.saturate(demo, wrong=1)


def test_hooks_that_were_never_called(demo):
    with pytest.warns(UserWarning, match="made and never called.*run_with_hooks") as said:
        sl.saturation_hooks(demo)
    assert len(said) == 1


@pytest.mark.usefixtures("silent")
def test_hooks_of_which_one_was_called(demo):
    with pytest.raises(sl.SatLensError):
        sl.saturation_hooks(demo, "L9")
    hooks = sl.saturation_hooks(demo)
    with torch.no_grad():
        demo.run_with_hooks(TOKENS, fwd_hooks=hooks[:1])


def test_ties_that_rounding_may_have_made():
    text = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n"
    model = sl.load_model("demo", dtype=torch.bfloat16)
    words = r"torch\.bfloat16.*rounding.*Ties in half precision"

    @sl.saturate(model)
    def run_twice():
        return model(text), model(text)

    with torch.no_grad(), pytest.warns(UserWarning, match=words) as said:
        run_twice()
    assert len(said) == 1


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "block",
    [
        lambda model: sl.saturate(model, scale=2.0),
        lambda model: sl.saturate(model, ties="nearest"),
        lambda model: sl.replace_attention(model, sl.transforms.RandomKey()),
    ],
)
def test_ties_are_no_matter_elsewhere(block):
    model = sl.load_model("demo", dtype=torch.bfloat16)
    with torch.no_grad(), block(model):
        model(TOKENS)


@pytest.mark.usefixtures("silent")
def test_ties_in_float32_are_true(demo):
    with torch.no_grad(), sl.saturate(demo):
        demo(TOKENS.new_full((1, 8), 7))


@pytest.mark.parametrize(
    "transform",
    [
        lambda scores: scores.softmax(-1),
        lambda scores: (2 * scores).softmax(-1).half(),
        lambda scores: torch.where(
            scores == -torch.inf, 0.0, 1 / (scores > -torch.inf).sum(-1, True)
        ),
    ],
    ids=["softmax", "softmax in half precision", "uniform"],
)
def test_a_pattern_in_the_place_of_scores(demo, transform):
    words = "<lambda> returned rows that sum to 1"
    replaced = sl.replace_attention(demo, transform)
    with torch.no_grad(), pytest.warns(UserWarning, match=words), replaced:
        demo(TOKENS)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(
    "transform",
    [
        lambda scores: scores,
        lambda scores: scores.softmax(-1).log(),
        lambda scores: torch.zeros_like(scores),
        lambda scores: scores.softmax(-1) * 5,
    ],
)
def test_scores_are_no_pattern(demo, transform):
    with torch.no_grad(), sl.replace_attention(demo, transform):
        demo(TOKENS)
        demo(TOKENS[:, :1])
