"""Laws of the role statistics: merging, weights, files, interruption, refusals."""

import math

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sat_lens as sl
from sat_lens.attention import distances_to_saturated
from sat_lens.attention.critical import N_BINS, critical_bins, scale_of_bin
from sat_lens.errors import ArgumentError, DataError, FileFormatError
from sat_lens.roles import HeadRoles, merge
from sat_lens.roles.rule import Targets, Thresholds, lean, offset_name, role_of, targets_of
from sat_lens.vocabulary import ROLES

NUMBERS = ["tv_argmax", "tv_mean", "tv_nearest", "lean", "lean_se", "c_lo", "c_hi", "sink_mass"]


@pytest.fixture(scope="module")
def tokens(demo):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, demo.cfg.d_vocab, (6, 24), generator=generator)


@pytest.fixture(scope="module")
def roles(demo, tokens):
    return sl.head_roles(demo, tokens, rows="all", progress=False, data_name="noise")


def same(first, second, tolerance=1e-9):
    pd.testing.assert_frame_equal(first.frame(), second.frame(), rtol=tolerance, atol=tolerance)


def test_frame_agrees_with_a_cache_and_plain_arithmetic(demo, tokens, roles):
    with torch.no_grad():
        _, cache = demo.run_with_cache(tokens)
    scores = cache["attn_scores", 1].float()
    causal = torch.ones(24, 24).tril().bool()
    scores = scores.masked_fill(~causal, -math.inf)[:, :, 7:]
    wanted = distances_to_saturated(scores)
    frame = roles.frame()
    for head in range(8):
        row = frame.loc[f"L1H{head}"]
        assert row["tv_argmax"] == pytest.approx(wanted.tv_argmax[:, head].mean().item(), abs=1e-5)
        assert row["tv_mean"] == pytest.approx(wanted.tv_mean[:, head].mean().item(), abs=1e-5)
        assert row["tv_nearest"] == pytest.approx(
            wanted.tv_nearest[:, head].mean().item(), abs=1e-5
        )
        previous = cache["pattern", 1][:, head].diagonal(-1, -2, -1)[:, 6:].mean().item()
        assert row["previous"] == pytest.approx(previous, abs=1e-5)
        assert row["n_rows"] == 6 * 17


def test_rows_read_in_blocks_agree_with_plain_arithmetic():
    settings = tiny.GPT | {"n_positions": 256}
    model = tiny.of_class("GPT2LMHeadModel", "GPT2Config", **settings)()
    tokens = torch.randint(3, 40, (2, 150), generator=torch.Generator().manual_seed(3))
    frame = sl.head_roles(model, tokens, rows="all", progress=False).frame()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    query, key = torch.arange(150)[:, None], torch.arange(150)
    earlier = (tokens[:, :, None] == tokens[:, None]) & (key < query)
    after = torch.cat([torch.zeros(2, 150, 1).bool(), earlier[..., :-1]], -1)
    for head in range(4):
        p = cache["pattern", 1][:, head].double()
        uniform = (key <= query) / (query + 1)
        rows = {
            "tv_mean": (p - uniform).clamp(min=0).sum(-1),
            "n_eff_share": 1 / (p * p).sum(-1) / (key + 1),
            "previous": torch.cat([torch.zeros(2, 1), p.diagonal(-1, 1, 2)], -1),
            "self": p.diagonal(0, 1, 2),
            "first": p[..., 0],
        }
        wanted = {name: row[:, 7:].mean() for name, row in rows.items()}
        for name, target in {"duplicate": earlier, "induction": after}.items():
            has_one = target[:, 7:].any(-1)
            wanted[name] = (p * target).sum(-1)[:, 7:][has_one].mean()
        found = frame.loc[f"L1H{head}"]
        for name, value in wanted.items():
            assert found[name] == pytest.approx(float(value), abs=1e-6), name
        assert (found["next"], found["n_rows"]) == (0, 2 * 143)
        offsets = (p.argmax(-1) - key)[:, 7:].flatten()
        near = offsets[offsets >= -64]
        most = int(torch.unique(near, return_counts=True)[1].max())
        assert found["modal_share"] == pytest.approx(most / len(offsets), abs=1e-9)
        at = int(found["modal_offset"])
        assert int((near == at).sum()) == most
        mass = torch.cat([torch.zeros(2, -at), p.diagonal(at, 1, 2)], -1)[:, 7:].mean()
        assert found["modal_mass"] == pytest.approx(float(mass), abs=1e-6)


@given(cut=st.integers(1, 5))
@settings(max_examples=5)
def test_shards_merge_to_the_numbers_of_one_pass(demo, tokens, roles, cut):
    parts = [
        sl.head_roles(demo, part, rows="all", progress=False, data_name="noise")
        for part in (tokens[:cut], tokens[cut:])
    ]
    same(merge(parts), roles)
    assert merge(parts).n_sequences == 6


def test_shards_by_number_are_disjoint_and_complete(demo, tokens):
    whole = sl.head_roles(demo, tokens, batch_size=1, progress=False)
    parts = [
        sl.head_roles(demo, tokens, batch_size=1, shard=(i, 3), progress=False) for i in (1, 2, 3)
    ]
    assert [part.n_sequences for part in parts] == [2, 2, 2]
    same(merge(parts), whole)


def test_batch_size_does_not_matter(demo, tokens, roles):
    one = sl.head_roles(demo, tokens, rows="all", batch_size=1, progress=False, data_name="noise")
    same(one, roles, 1e-5)


def test_padding_does_not_count(demo, tokens, roles):
    padded = torch.cat([tokens, torch.full((6, 5), 2)], dim=1)
    mask = torch.ones_like(padded)
    mask[:, 24:] = 0
    batch = {"input": padded, "attention_mask": mask}
    frame = sl.head_roles(demo, [batch], rows="all", progress=False).frame()
    wanted = roles.frame()
    for name in ("tv_argmax", "tv_mean", "tv_nearest", "previous", "n_rows", "c_hi"):
        assert frame[name].tolist() == pytest.approx(wanted[name].tolist(), abs=1e-4)


def test_saved_and_loaded_is_the_same(roles, tmp_path):
    roles.save(tmp_path / "roles.st")
    loaded = HeadRoles.load(tmp_path / "roles.st")
    assert loaded.frame().equals(roles.frame())
    assert (loaded.provenance, loaded.thresholds) == (roles.provenance, roles.thresholds)


def test_a_file_without_an_entry_is_refused(roles, tmp_path, demo, tokens):
    curve = sl.scaling_curve(demo, tokens[:1], scales=[1.0], progress=False)
    curve.save(tmp_path / "curve.st")
    with pytest.raises(FileFormatError, match="holds 'scaling curve', and 'head roles'"):
        HeadRoles.load(tmp_path / "curve.st")


def test_results_of_different_settings_do_not_merge(demo, tokens, roles):
    other = sl.head_roles(demo, tokens, min_keys=4, progress=False)
    with pytest.raises(ArgumentError, match="min_keys differs"):
        merge([roles, other])
    with pytest.raises(ArgumentError, match="at least one result"):
        merge([])


def test_an_interrupt_keeps_what_was_read_and_says_so(demo, tokens):
    def interrupted():
        yield tokens[:4]
        raise KeyboardInterrupt

    part = sl.head_roles(demo, interrupted(), progress=False)
    assert not part.complete
    same(part, sl.head_roles(demo, tokens[:4], progress=False))
    assert not demo.blocks[0].attn.__dict__.get("forward")


def test_an_interrupt_before_anything_was_read_passes_on(demo):
    def at_once():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        sl.head_roles(demo, at_once(), progress=False)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"min_keys": 0}, ArgumentError, "at least 1"),
        ({"rows": 0}, ArgumentError, "at least 1"),
        ({"shard": (3, 2)}, ArgumentError, "from 1 to n"),
        ({"query_positions": [24]}, ArgumentError, r"sequence of 24; found \[24\]"),
        ({"query_positions": []}, ArgumentError, r"at least one position.* found \[\]"),
        ({"min_keys": 99}, DataError, "No query row has 99"),
        ({"metric": "accuracy"}, ArgumentError, '"loss" or a function'),
        ({"metric": lambda logits: logits[:, 3].sum()}, DataError, "depends on no query row"),
        ({"shard": (4, 5)}, DataError, r"Shard \(4, 5\) holds no batch"),
        ({"metric": lambda logits: logits}, ArgumentError, "scalar tensor"),
        ({"metric": lambda logits: torch.zeros(())}, ArgumentError, "depends on the logits"),
    ],
)
def test_refusals(demo, tokens, arguments, error, words):
    with pytest.raises(error, match=words):
        sl.head_roles(demo, tokens, progress=False, **arguments)


def test_measuring_leaves_gradients_and_the_output_alone(demo, tokens):
    before = demo(tokens)
    sl.head_roles(demo, tokens, metric="loss", progress=False)
    assert torch.equal(demo(tokens), before)
    assert all(p.grad is None for p in demo.parameters())


def test_importance_of_the_loss_is_the_derivative(demo, tokens):
    from sat_lens.caching.activations import hook_point, of_heads
    from sat_lens.data import Batch
    from sat_lens.roles.causal import row_importance
    from sat_lens.sites import attention_sites

    site = attention_sites(demo)[2]
    batch = Batch(tokens[:1], {}, tokens=tokens[:1])
    importance = row_importance(demo, batch, [site], "loss")[site.path]
    assert importance.shape == (1, 8, 24)
    # Finite difference: move one row of one head towards its mean.
    head, query, step = 3, 11, 1e-2

    def moved(amount):
        def hook(_module, _args, z):
            z = of_heads(z, 8).clone()
            z[:, query, head] += amount * (z[:, query, head] - z[:, :, head].mean(1))
            return z.reshape(1, 24, -1) if _args[0].dim() == 3 else z

        handle = hook_point(demo, site, "z").register_forward_hook(hook)
        with torch.no_grad():
            value = sl.metrics.next_token_loss(tokens[:1])(demo(tokens[:1]).double())
        handle.remove()
        return float(value)

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert float(importance[0, head, query]) == pytest.approx(abs(slope), rel=0.05, abs=2e-4)


@pytest.mark.slow
def test_damage_of_zero_is_that_of_a_zeroed_head(demo, tokens):
    frame = sl.head_roles(demo, tokens[:2], damage=True, progress=False).frame()
    metric = sl.metrics.next_token_loss(tokens[:2])
    with torch.no_grad():
        soft = float(metric(demo(tokens[:2])))

        def zero(z, hook):
            z[:, :, 5] = 0
            return z

        zeroed = demo.run_with_hooks(tokens[:2], fwd_hooks=[("blocks.1.attn.hook_z", zero)])
        with sl.saturate(demo, "L1H5"):
            hard = float(metric(demo(tokens[:2])))
    row = frame.loc["L1H5"]
    assert row["damage_zero"] == pytest.approx(float(metric(zeroed)) - soft, abs=1e-5)
    assert row["damage_argmax"] == pytest.approx(hard - soft, abs=1e-5)


def test_comparison_finds_changes_beyond_the_uncertainty(demo, tokens, roles):
    assert not roles.compare(roles)["changed"].any()
    with sl.saturate(demo, "L2H2"):
        hooked = sl.head_roles(demo, tokens, rows="all", progress=False)
    # The inner pass sees what the block around it made of L2H2, and of what lies behind it.
    table = roles.compare(hooked)
    assert bool(table.loc["L2H2", "changed"])
    assert table.loc["L2H2", "lean_other"] == pytest.approx(1.0, abs=1e-6)
    assert not table.loc[[f"L1H{h}" for h in range(8)], "changed"].any()
    assert table.loc["L0H0", "role"] == table.loc["L0H0", "role_other"]


def test_comparison_needs_the_same_heads(roles, tokens):
    from sat_lens.tasks import majority, train_on

    other = sl.head_roles(train_on(majority(4, 24), steps=1), tokens % 3, progress=False)
    with pytest.raises(ArgumentError, match=r"32 heads .* and 2"):
        roles.compare(other)


@pytest.mark.slow
def test_bootstrap_error_shrinks_with_more_sequences(demo):
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(3, demo.cfg.d_vocab, (48, 16), generator=generator)
    few, many = (sl.head_roles(demo, part, progress=False) for part in (data[:6], data))
    assert many.frame()["lean_se"].mean() < few.frame()["lean_se"].mean()


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12),
    st.floats(0.02, 0.4),
)
def test_critical_scales_are_where_the_distances_cross(scores, eps):
    row = torch.tensor(scores)
    lo, hi = critical_bins(row, eps)
    double = row.double()
    top = (double == double.max()).double()
    limit, uniform = top / top.sum(), torch.full_like(double, 1 / len(double))

    def distance(bin_index, to):
        gaps = (double - double.max()) * scale_of_bin(bin_index)
        return float((gaps.softmax(-1) - to).abs().sum() / 2)

    if 0 < int(hi) < N_BINS - 1:
        assert distance(hi, limit) <= eps + 1e-4
        assert distance(hi - 1, limit) > eps - 1e-4
    if 0 < int(lo) < N_BINS - 1:
        assert distance(lo, uniform) <= eps + 1e-4
        assert distance(lo + 1, uniform) > eps - 1e-4


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 50))
def test_every_head_has_one_role_and_lean_orders_it(tv_argmax, tv_mean, tv_nearest, m):
    role = role_of(tv_argmax, tv_mean, tv_nearest, m)
    assert role in ROLES
    if role == "argmax-lean":
        assert lean(tv_argmax, tv_mean) >= 0.6
    if role == "mean-lean":
        assert lean(tv_argmax, tv_mean) <= 0.45


def test_thresholds_are_arguments():
    assert role_of(0.3, 0.9, 0.3, 1) == "argmax-lean"
    assert role_of(0.3, 0.9, 0.3, 1, Thresholds(near=0.35)) == "argmax"


@pytest.mark.parametrize(
    ("leaning", "targets", "wanted"),
    [
        (0.9, Targets({"first": 0.6, "previous": 0.6}, -1, 0.9, 0.9), ("first", "previous")),
        (0.9, Targets({"first": 0.4, "previous": 0.1}, -1, 0.1, 0.6), ("first", "")),
        (0.9, Targets({"special": 0.6}, -1, 0.9, 0.0), ("special", "previous")),
        (0.9, Targets({"previous": 0.4}, -1, 0.6, 0.0), ("previous", "")),
        (0.5, Targets({"previous": 0.4}, -1, 0.6, 0.0), ("", "")),
        (0.9, Targets({"induction": 0.6}, -14, 0.9, 0.0), ("induction", "offset -14")),
        (0.9, Targets({"induction": 0.1}, -14, 0.9, 0.0), ("offset -14", "")),
        (
            0.9,
            Targets({"first": 0.7, "special": 0.7, "induction": 0.6}, -9, 0.1, 0.7),
            ("first", "induction"),
        ),
        # Half of the rows that have such a key, and of all rows half on the first token.
        (0.7, Targets({"induction": 0.8, "first": 0.6}, -9, 0.1, 0.6), ("induction", "first")),
        # A token and an earlier one of its kind; on such rows as well it has more.
        (
            0.9,
            Targets({"duplicate": 0.6, "previous": 0.9}, -1, 0.9, 0.0),
            ("previous", "duplicate"),
        ),
        (0.1, Targets({"duplicate": 0.9}, 0, 0.9, 0.0), ("", "")),
        (0.1, Targets({"first": 0.6, "duplicate": 0.9}, 0, 0.9, 0.0), ("first", "")),
    ],
)
def test_targets(leaning, targets, wanted):
    assert targets_of(leaning, targets) == wanted


def test_offsets_are_named_by_key_minus_query():
    assert [offset_name(k) for k in (-1, 0, 1, 3)] == ["previous", "self", "next", "offset +3"]


def test_one_sequence_gives_no_certainty(demo, tokens):
    assert sl.head_roles(demo, tokens[:1], progress=False).frame()["lean_se"].isna().all()
