"""Every architecture of the zoo, against an oracle that replaces softmax itself."""

from __future__ import annotations

import functools
import math

import oracle
import pytest
import torch
import zoo
from everyday import everyday
from torch import Tensor

import sat_lens as sl

CASES = zoo.everyday_cases()
SCALES = [3.0, math.inf]


@functools.cache
def soft_logits(name: str) -> Tensor:
    return run(zoo.case(name))


def run(case: zoo.Case) -> Tensor:
    args, kwargs = case.inputs()
    with torch.no_grad():
        return zoo.model_of(case.name)(*args, **kwargs)


def paths_of(case: zoo.Case, labels: list[str]) -> dict[str, list[int]]:
    sites = sl.attention_sites(zoo.model_of(case.name))
    chosen = {
        site.path: [head for head in range(case.n_heads) if site.label(head) in labels]
        for site in sites
    }
    return {path: heads for path, heads in chosen.items() if heads}


def oracle_logits(case: zoo.Case, labels: list[str], c: float) -> Tensor:
    chosen = paths_of(case, labels)
    with oracle.rescaled_softmax(zoo.model_of(case.name), chosen, c, case.n_heads):
        return run(case)


def selections(case: zoo.Case) -> list[list[str]]:
    """All heads, all heads of each stack, and one head alone in each stack."""
    stacks = [case.heads(stack) for stack in case.stacks]
    alone = [[heads[-case.n_heads + 1]] for heads in stacks]
    everything = [head for heads in stacks for head in heads]
    return [everything, *(stacks if len(stacks) > 1 else []), *alone]


@pytest.mark.parametrize("case", CASES)
def test_attention_is_found_where_it_is(case):
    sites = sl.attention_sites(zoo.model_of(case.name))
    found = {(site.stack, site.layer): site.level for site in sites}
    expected = {
        (stack, layer): level for stack, level in case.levels.items() for layer in case.layers
    }
    assert found == expected
    assert [site.n_heads for site in sites] == [case.n_heads] * len(sites)
    assert {site.stack for site in sites if site.kind == "cross"} == {"cross"} & {*case.stacks}


@pytest.mark.parametrize("scale", everyday(SCALES, math.inf))
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_oracle(case, scale):
    soft = soft_logits(case.name)
    for labels in selections(case):
        expected = oracle_logits(case, labels, scale)
        with sl.saturate(zoo.model_of(case.name), labels, scale=scale):
            found = run(case)
        effect = (expected - soft).abs().max()
        error = (found - expected).abs().max()
        assert effect > 1e-3 * soft.abs().max(), f"no effect of {labels}"
        assert error <= 1e-4 * effect + 1e-5 * soft.abs().max(), f"wrong on {labels}"


@pytest.mark.parametrize("case", CASES)
def test_a_scale_of_one_changes_nothing_and_nothing_stays(case):
    soft = soft_logits(case.name)
    with sl.saturate(zoo.model_of(case.name), scale=1):
        same = run(case)
    torch.testing.assert_close(same, soft, rtol=0, atol=float(1e-5 * soft.abs().max()))
    with sl.saturate(zoo.model_of(case.name)):
        run(case)
    assert torch.equal(run(case), soft)


@pytest.mark.parametrize("case", [c for c in CASES if len(c.values[0].stacks) > 1])
def test_stacks_are_selectable_apart(case):
    outputs = []
    for stack in case.stacks:
        with sl.saturate(zoo.model_of(case.name), lambda stack, _layer, _head, s=stack: stack == s):
            outputs.append(run(case))
        with sl.saturate(zoo.model_of(case.name), case.heads(stack)):
            assert torch.equal(run(case), outputs[-1])
    assert not any(torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
