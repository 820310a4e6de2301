"""Programs of which every attended set is known: patterns, roles and outputs follow from it."""

from __future__ import annotations

import pytest
import torch

import sat_lens as sl
from sat_lens.attention import Limit
from tests.programs import N_CTX, N_TOKENS, PROGRAMS, compiled, interpret

MIN_KEYS = 8
# What each head of each program is.
WANTED = {
    "fraction so far": {"L0H0": ("mean", "")},
    "reverse": {"L0H0": ("argmax", ""), "L0H1": ("subset", "duplicate")},
    "induction": {
        "L0H0": ("argmax", "previous"),
        "L0H1": ("mean", ""),
        "L1H0": ("subset", "induction"),
        "L1H1": ("subset", "duplicate"),
    },
}


def sequences(name):
    """Give texts: random ones, or for induction a start and the same five tokens three times."""
    generator = torch.Generator().manual_seed(0)
    if name != "induction":
        return torch.randint(N_TOKENS, (6, N_CTX), generator=generator)
    fives = [torch.randperm(N_TOKENS - 1, generator=generator)[:5] + 1 for _ in range(6)]
    return torch.stack([torch.cat([torch.zeros(1).long(), *[five] * 3]) for five in fives])


def counted_queries(name):
    """Give the positions to count: all, or the third time of the five tokens."""
    return range(11, 16) if name == "induction" else range(N_CTX)


@pytest.fixture(scope="module", params=PROGRAMS)
def case(request):
    name = request.param
    program, tokens = PROGRAMS[name], sequences(name)
    return (
        name,
        program,
        compiled(program),
        tokens,
        [interpret(program, t) for t in tokens.tolist()],
    )


def pattern_of(keys, length=N_CTX):
    """Attend equally to the selected keys of each query."""
    rows = torch.zeros(length, length)
    for query, chosen in enumerate(keys):
        rows[query, chosen] = 1 / len(chosen)
    return rows


@pytest.mark.parametrize("saturated", [False, True])
def test_every_pattern_is_uniform_over_what_the_program_selects(case, saturated):
    _, program, model, tokens, runs = case
    with torch.no_grad():
        if saturated:
            with sl.saturate(model):
                _, cache = model.run_with_cache(tokens)
        else:
            _, cache = model.run_with_cache(tokens)
    for b, (selected, _) in enumerate(runs):
        for (layer, head), keys in selected.items():
            assert torch.equal(cache["pattern", layer][b, head], pattern_of(keys))
    assert len(runs[0][0]) == sum(map(len, program.layers))


@pytest.mark.parametrize("ties", ["exact", "nearest", 1.0])
def test_saturation_changes_nothing_and_the_output_is_that_of_the_program(case, ties):
    _, _, model, tokens, runs = case
    with torch.no_grad():
        soft = model(tokens)
        with sl.saturate(model, ties=ties):
            assert torch.equal(model(tokens), soft)
        with sl.replace_attention(model, Limit(), "L0H0"):
            assert torch.equal(model(tokens), soft)
    wanted = torch.tensor([[[float(x) for x in row] for row in out] for _, out in runs])
    torch.testing.assert_close(soft, wanted, rtol=0, atol=1e-6)


def masses(tokens, query, chosen):
    """Give the mass on each kind of key, or None where the query has no such key."""
    earlier = {k for k in range(query) if tokens[k] == tokens[query]}
    kinds = {
        "previous": {query - 1},
        "self": {query},
        "next": {query + 1},
        "first": {0},
        "duplicate": earlier,
        "induction": {k + 1 for k in earlier},
    }
    kinds = {name: keys for name, keys in kinds.items() if keys}
    return {name: len(keys & set(chosen)) / len(chosen) for name, keys in kinds.items()}


def test_roles_and_numbers_follow_from_the_selected_keys(case):
    name, program, model, tokens, runs = case
    queries = counted_queries(name)
    frame = sl.head_roles(
        model, tokens, rows="all", query_positions=queries, min_keys=MIN_KEYS, progress=False
    ).frame()
    assert set(frame.index) == set(WANTED[name])
    for label, row in frame.iterrows():
        assert (row["role"], row["target"]) == WANTED[name][label]
        wanted = {}
        for text, (selected, _) in zip(tokens.tolist(), runs, strict=True):
            for query in queries:
                n, chosen = query + 1 if program.causal else N_CTX, selected[head_of(label)][query]
                if n < MIN_KEYS:
                    continue
                m = len(chosen)
                numbers = {
                    "tv_argmax": 1 - 1 / m,
                    "tv_mean": 1 - m / n,
                    "tv_nearest": 0.0,
                    "m_share": m / n,
                    "n_eff_share": m / n,
                    **masses(text, query, chosen),
                }
                for column, value in numbers.items():
                    wanted.setdefault(column, []).append(value)
        assert row["n_rows"] == len(wanted["tv_mean"])
        assert row["saturable_nearest"]
        for column, values in wanted.items():
            assert row[column] == pytest.approx(sum(values) / len(values), abs=1e-6), column


def head_of(label):
    layer, _, head = label.removeprefix("L").partition("H")
    return int(layer), int(head)


def test_an_induction_head_with_one_key_to_look_at_is_argmax():
    tokens, model = sequences("induction"), compiled(PROGRAMS["induction"])
    second_time = range(7, 11)
    row = (
        sl.head_roles(model, tokens, query_positions=second_time, progress=False)
        .frame()
        .loc["L1H0"]
    )
    assert (row["role"], row["target"], row["median_m"]) == ("argmax", "induction", 1)
    assert row["modal_offset"] == -4
    assert row["induction"] == row["modal_mass"] == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        found = model(tokens)[:, 6:15].argmax(-1)
    assert torch.equal(found, tokens[:, 7:16])
