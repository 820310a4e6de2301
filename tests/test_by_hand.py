"""What one did by hand is one line: the table for those who come from HookedTransformer."""

from __future__ import annotations

import pathlib
import re

import torch

import sat_lens as sl

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "from_hooked_transformer.md"


def each_score(change):
    """By hand: a hook that changes scores wherever they are, for the length of one run."""

    def run(model, tokens):
        where = [
            (name, lambda scores, hook: change(scores, hook))
            for name in model.hook_dict
            if name.endswith("hook_attn_scores")
        ]
        return model.run_with_hooks(tokens, fwd_hooks=where)

    return run


def hard(scores, hook=None):
    return torch.where(scores == scores.amax(-1, keepdim=True), 0.0, -torch.inf)


def hard_l1h3(scores, hook):
    changed = scores.clone()
    if hook.name.startswith("blocks.1."):
        changed[:, 3] = hard(scores[:, 3])
    return changed


def visible(scores):
    return torch.ones(scores.shape[-2:]).tril().bool()


def losses(model, tokens, metric):
    loss = sl.metrics.next_token_loss(tokens)
    sharper = each_score(lambda scores, hook: 4 * scores)(model, tokens)
    return torch.stack([loss(each_score(flat)(model, tokens)), loss(model(tokens)), loss(sharper)])


def one_by_one(model, tokens, metric):
    values = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):

            def change(scores, hook, head=head):
                return torch.cat(
                    [scores[:, :head], hard(scores[:, [head]]), scores[:, head + 1 :]], 1
                )

            where = [(f"blocks.{layer}.attn.hook_attn_scores", change)]
            values[layer, head] = metric(model.run_with_hooks(tokens, fwd_hooks=where))
    return values


def products(model, tokens, metric):
    weights = [(block.attn.W_Q, block.attn.W_K) for block in model.blocks]
    return torch.cat([(q @ k.mT).flatten(1).norm(dim=1) for q, k in weights])


def flat(scores, hook=None):
    return torch.where(visible(scores), 0.0, scores)


def rectified(scores, hook=None):
    return torch.where(visible(scores), scores.relu(), scores)


# The left column of the table as code, by a part of the right one.
BY_HAND = {
    "scale=3.0": lambda m, t, _: each_score(lambda scores, hook: 3 * scores)(m, t),
    "with sl.saturate(model): ": lambda m, t, _: each_score(hard)(m, t),
    '"L1H3"): model': lambda m, t, _: each_score(hard_l1h3)(m, t),
    "scale=0": lambda m, t, _: each_score(flat)(m, t),
    "torch.relu": lambda m, t, _: each_score(rectified)(m, t),
    "sl.scaling_curve(": losses,
    "sl.sweep_heads(model, tokens, metric)": one_by_one,
    "sl.parameter_norms(": products,
}
# What of a result is compared, where it is no tensor.
READ = {
    "sl.scaling_curve(": lambda curve: torch.tensor(curve.frame()["loss"].to_numpy()),
    "sl.sweep_heads(model, tokens, metric)": lambda sweep: sweep.values,
    "sl.parameter_norms(": lambda frame: torch.tensor(frame["qk_product"].to_numpy()),
}


def one_lines():
    table = PAGE.read_text().split("| one line here |")[1]
    return re.findall(r"\| `([^`]*)` \|$", table, re.MULTILINE)


def result_of(line, namespace):
    """Run a line of the table; give what it assigns or what its call returns."""
    name = line.partition(" = ")[0]
    if name.isidentifier():
        exec(line, namespace)
        return namespace[name]
    block, colon, call = line.rpartition(": ") if line.startswith("with ") else ("", "", line)
    exec(f"{block}{colon}found = {call}", namespace)
    return namespace.pop("found")


def test_what_was_done_by_hand_is_one_line_and_gives_the_same(demo):
    tokens = demo.to_tokens("class Point:\n    def __init__(self, x, y):\n        self.x = x\n")
    metric = sl.metrics.logit_difference(answer=90, wrong=91)
    namespace = {"sl": sl, "torch": torch, "model": demo, "tokens": tokens, "metric": metric}
    compared = set()
    for line in one_lines():
        found = result_of(line, namespace)
        assert found is not None
        for part, by_hand in BY_HAND.items():
            if part in line:
                with torch.no_grad():
                    expected = by_hand(demo, tokens, metric)
                found = READ[part](found) if part in READ else found
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
                compared.add(part)
    assert compared == set(BY_HAND)
    assert len(one_lines()) >= 14
