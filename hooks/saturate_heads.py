"""Saturate heads inside a workflow that already uses ``run_with_hooks``.

Run it:  python hooks/saturate_heads.py [--model MODEL] [--heads L0H0 L1H2] [--scale inf]
"""

import argparse

import torch

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width"


def main() -> dict[str, float]:
    """Compare the next-token distribution soft and saturated; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", nargs="*", help="labels such as L0H0; all heads by default")
    parser.add_argument("--scale", type=float, default=float("inf"))
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(PROMPT)
    torch.set_grad_enabled(False)

    # --- the part to paste -------------------------------------------------------------------
    soft = model(tokens)
    hooks = sl.saturation_hooks(model, heads=options.heads, scale=options.scale)
    hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)

    # The same as a block: everything that runs inside it is saturated, and checked to be.
    with sl.saturate(model, heads=options.heads, scale=options.scale):
        saturated, cache = model.run_with_cache(tokens)
    # -----------------------------------------------------------------------------------------

    last = [logits[0, -1].log_softmax(-1) for logits in (soft, saturated)]
    for name, log_probs in zip(("soft", "saturated"), last, strict=True):
        best = log_probs.topk(3)
        shown = ", ".join(
            f"{model.tokenizer.decode([int(token)])!r} {float(value.exp()):.2f}"
            for value, token in zip(best.values, best.indices, strict=True)
        )
        print(f"{name:>10}: {shown}")
    return {
        "hooks_equal_block": float((hooked - saturated).abs().max()),
        "largest_change": float((soft - saturated).abs().max()),
        "winning_share": float(cache["pattern", 0].amax(-1).mean()),
        "kl": float(torch.nn.functional.kl_div(last[1], last[0], log_target=True, reduction="sum")),
    }


if __name__ == "__main__":
    main()
