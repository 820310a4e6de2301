"""Every value of a sweep, in all its combinations of arguments, against brute force.

Sources, components and directions are combined in full for every model; what else a sweep can be
asked for goes round beside them, each model one step further. One combination of each model runs
every day.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from brute_force import Group, Sweep, own
from tiny import tokens
from zoo import MAKES, case, model_of

import sat_lens as sl
from sat_lens.errors import ArgumentError, UnsupportedModelError
from sat_lens.patching import HeadSweep, sweep_heads

WAYS = [
    ("local", "z"),
    ("local", "pattern"),
    *(("run", c) for c in ("z", "pattern", "q", "k", "v")),
]
DIRECTIONS = ["noising", "denoising"]
TRANSFORMS = [
    None,
    sl.transforms.Uniform(),
    sl.transforms.Limit("nearest"),
    sl.transforms.Scale(3.0),
    own,
]
# positions, groups, a value per prompt, padding, the last position alone, other prompts, controls
REST = [
    (None, False, True, False, True, True, False),
    ([4, -1], False, False, True, True, False, False),
    (None, True, False, True, False, False, True),
    ([5, -1], True, True, False, True, True, False),
    (None, False, False, True, True, False, True),
    ([4, -1], False, True, True, False, True, False),
    (None, True, True, False, True, False, False),
]


def batch_of(name: str, padded: bool, seed: int) -> dict[str, Any]:
    batch: dict[str, Any] = {"input": tokens(seed=seed), **case(name).inputs()[1]}
    if "decoder_input" in batch:
        batch["decoder_input"] = tokens(length=7, seed=seed + 1)
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input"])
        batch["attention_mask"][0, :3] = 0
    return batch


class Everywhere:
    """A metric of all positions that are never padded, which keeps its prompts apart."""

    def per_prompt(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, 3:, 7] - logits[:, 3:, 0]).mean(1)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.per_prompt(logits).mean()


def combinations() -> list[Any]:
    found = []
    for m, name in enumerate(MAKES):
        for i, ((source, component), direction) in enumerate(itertools.product(WAYS, DIRECTIONS)):
            transform, rest = TRANSFORMS[(i + m) % 5], REST[(i + 3 * m) % 7]
            label = f"{name}-{source}-{component}-{direction}"
            marks = [pytest.mark.slow] if i != m else []
            found.append(
                pytest.param(
                    name, source, component, direction, transform, rest, id=label, marks=marks
                )
            )
    return found


def groups_of(model: Any, together: bool) -> list[Group]:
    """Single heads of every stack, or groups within one stack, some over several layers."""
    sites = sl.attention_sites(model)
    if not together:
        several = len(sites) > 2
        return [
            [(site.path, head)]
            for i, site in enumerate(sites)
            for head in ([i % 4] if several else [0, 1, 3])
        ]
    groups = []
    for stack in dict.fromkeys(site.stack for site in sites):
        paths = [site.path for site in sites if site.stack == stack]
        groups += [[(paths[0], 0), (paths[0], 3)], [(paths[0], 1), (paths[-1], 2)]]
    return groups


@pytest.mark.parametrize(
    ("name", "source", "component", "direction", "transform", "rest"), combinations()
)
def test_every_combination_is_what_brute_force_gives(
    name: str, source: Any, component: Any, direction: Any, transform: Any, rest: Any
) -> None:
    positions, together, apart, padded, last, pair, random = rest
    model, batch = model_of(name).eval(), batch_of(name, padded, 0)
    corrupted = batch_of(name, padded, 8) if pair else None
    metric = sl.metrics.logit_difference([7, 7], [9, 9]) if last else Everywhere()
    new = sl.transforms.Limit() if transform is None else transform
    read = metric.per_prompt if apart else metric
    brute = Sweep(model, read, new, getattr(model.cfg, "n_key_value_heads", None) or 4)
    groups = groups_of(model, together)
    labels = [[brute.label(*member) for member in group] for group in groups]

    sweep = sweep_heads(
        model,
        batch,
        metric,
        corrupted,
        heads=labels if together else [label for (label,) in labels],
        direction=direction,
        source=source,
        component=component,
        positions=positions,
        transform=transform,
        reduce=None if apart else "mean",
        baseline="random" if random else None,
        controls=2,
        progress=False,
    )

    noising = direction == "noising"
    base, other = (None, new) if noising else (new, None)
    expected = {"": _values(brute, batch, groups, sweep, base, other)}
    for seed in range(2 if random else 0):
        keys = sl.transforms.RandomKey(seed)
        expected[f"random {seed}"] = _values(brute, batch, groups, sweep, base, keys)
    found = {"": sweep.item_values}
    if random:
        found |= {f"random {seed}": sweep.random_values[seed] for seed in range(2)}
    if pair:
        into, of = (batch, corrupted) if noising else (corrupted, batch)
        given = brute.recorded(of, None, component)
        found["corruption"] = sweep.corruption_values
        expected["corruption"] = _table(
            lambda g, at: brute.from_run(into, g, at, None, component, given), groups, positions
        )
    assert found.keys() == expected.keys()
    for which, values in expected.items():
        torch.testing.assert_close(found[which], values, atol=1e-5, rtol=1e-5, msg=_about(which))
    # A saturated pattern may take no notice of other queries and keys.
    assert component in ("q", "k") or bool((sweep.item_effects.abs() > 1e-5).any())


def _values(
    brute: Sweep, batch: Any, groups: list[Group], sweep: HeadSweep, base: Any, new: Any
) -> torch.Tensor:
    positions, component = sweep.arguments["positions"], sweep.arguments["component"]
    if sweep.arguments["source"] == "local":
        return _table(lambda g, at: brute.local(batch, g, at, base, new), groups, positions)
    given = brute.recorded(batch, new, component)
    return _table(
        lambda g, at: brute.from_run(batch, g, at, base, component, given), groups, positions
    )


def _table(value: Any, groups: list[Group], positions: Any) -> torch.Tensor:
    if positions is None:
        return torch.stack([value(group, None) for group in groups])
    return torch.stack([torch.stack([value(g, at) for at in positions]) for g in groups])


def _about(which: str) -> Any:
    return lambda message: f"{which or 'values'}: {message}"


def test_keys_of_cross_attention_have_the_encoders_positions() -> None:
    """The encoder reads 10 tokens, the decoder 7: k and v have 10 positions, q and z have 7."""
    model, batch = model_of("t5").eval(), batch_of("t5", False, 0)
    arguments: dict[str, Any] = {"heads": "cross.L1H2", "source": "run", "progress": False}
    for component, length in (("k", 10), ("v", 10), ("q", 7), ("z", 7), ("pattern", 7)):
        sweep = sweep_heads(
            model, batch, Everywhere(), component=component, positions="each", **arguments
        )
        assert sweep.positions == tuple(range(length))
        assert sweep.item_values.isfinite().all()
    with pytest.raises(ArgumentError, match=r"sequence of 7.*\[8\]"):
        sweep_heads(model, batch, Everywhere(), positions=[8], **arguments)


def test_a_position_of_a_group_over_sequences_of_several_lengths_is_refused() -> None:
    model, batch = model_of("t5").eval(), batch_of("t5", False, 0)
    group: dict[str, Any] = {"heads": [["encoder.L0H1", "cross.L1H2"]], "progress": False}
    with pytest.raises(ArgumentError, match="7 to 10 positions"):
        sweep_heads(model, batch, Everywhere(), positions=[0], **group)
    assert sweep_heads(model, batch, Everywhere(), **group).complete


def test_positions_need_only_the_chosen_modules_to_have_them() -> None:
    """LongT5's encoder cuts its queries into blocks; its decoder does not."""
    model, batch = model_of("longt5_local").eval(), batch_of("longt5_local", False, 0)
    arguments: dict[str, Any] = {"positions": [0, -1], "progress": False}
    with pytest.raises(UnsupportedModelError, match="blocks"):
        sweep_heads(model, batch, Everywhere(), heads="encoder.L0H1", **arguments)
    assert sweep_heads(model, batch, Everywhere(), heads="cross.L0H1", **arguments).complete


def test_activations_with_positions_in_front_are_refused_by_position() -> None:
    """LED's encoder has the axes position, batch."""
    model, batch = model_of("led").eval(), batch_of("led", False, 0)
    arguments: dict[str, Any] = {"heads": "encoder.L1H2", "source": "run", "progress": False}
    whole = sweep_heads(model, batch, Everywhere(), component="v", **arguments)
    assert abs(whole.frame()["effect"]["encoder.L1H2"]) > 1e-5
    with pytest.raises(UnsupportedModelError, match=r"\[batch, position, \.\.\.\]"):
        sweep_heads(model, batch, Everywhere(), component="v", positions=[4], **arguments)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_prompts_of_another_shape_are_refused(name: str) -> None:
    model, batch = model_of(name).eval(), batch_of(name, False, 0)
    which = "decoder_input" if name == "t5" else "input"
    other = {**batch, which: batch[which][:, :-1]}
    with pytest.raises(ArgumentError, match=rf"same shape.*{which}"):
        sweep_heads(model, batch, Everywhere(), other, progress=False)
