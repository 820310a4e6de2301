"""Patch between soft and saturated runs with TransformerLens's own patching functions.

Run it:  python hooks/patch_with_transformer_lens.py [--model MODEL]
"""

import argparse

import torch
from transformer_lens import patching

import sat_lens as sl

PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self."


def main() -> dict[str, float]:
    """Patch in both directions, compare with ``sweep_heads``; return the largest differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    model = sl.load_model(parser.parse_args().model)
    tokens = model.to_tokens(PROMPT)
    torch.set_grad_enabled(False)
    metric = sl.metrics.logit_difference(*model(tokens)[0, -1].topk(2).indices.tolist())

    # --- the part to paste -------------------------------------------------------------------
    pair = sl.run_with_saturation_cache(model, tokens)
    patch_heads = patching.get_act_patch_attn_head_out_all_pos
    patch_stream = patching.get_act_patch_resid_pre

    # Noising: each head's saturated z goes into an otherwise soft run. [layer, head]
    noising = patch_heads(model, tokens, pair.saturated.cache, metric)

    # Denoising: inside the block, the run that is patched into is saturated.
    with sl.saturate(model):
        denoising = patch_heads(model, tokens, pair.soft.cache, metric)
        restored = patch_stream(model, tokens, pair.soft.cache, metric)  # [layer, position]

    # sweep_heads gives the same numbers in less time, with labels.
    options = {"source": "run", "progress": False}
    sweep = sl.sweep_heads(model, tokens, metric, **options)
    back = sl.sweep_heads(model, tokens, metric, direction="denoising", **options)
    # -----------------------------------------------------------------------------------------

    soft, saturated = float(sweep.soft), float(sweep.saturated)
    print(f"\nlogit difference: soft {soft:.2f}, saturated {saturated:.2f}")
    print(sweep.frame()[["value", "effect", "normalised"]].round(3).sort_values("effect").head())
    print(f"with the soft residual stream at one position: up to {float(restored.max()):.2f}")
    return {
        "noising_apart": float((noising - sweep.values).abs().max()),
        "denoising_apart": float((denoising - back.values).abs().max()),
        "largest_effect": float((noising - soft).abs().max()),
        "restored_before_any_layer": float((restored[0] - saturated).abs().max()),
        "gap": soft - saturated,
    }


if __name__ == "__main__":
    main()
