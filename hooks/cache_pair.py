"""Cache soft and saturated activations side by side, and compare them.

Run it:  python hooks/cache_pair.py [--model MODEL] [--heads L0H0 L1H2]
"""

import argparse

import sat_lens as sl

PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self."


def main() -> dict[str, float]:
    """Print where the saturated run departs from the soft one; return what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", nargs="*", help="labels such as L0H0; all heads by default")
    options = parser.parse_args()
    model = sl.load_model(options.model)

    # --- the part to paste -------------------------------------------------------------------
    pair = sl.run_with_saturation_cache(model, PROMPT, heads=options.heads)
    soft, saturated = pair.soft.cache, pair.saturated.cache

    # Both are ActivationCaches: index them as always. Here, how far each head's output moved.
    last = model.cfg.n_layers - 1
    moved = (soft["z", last] - saturated["z", last]).norm(dim=-1).mean(dim=(0, 1))
    # How much of the residual stream the saturated run keeps, beside a random-key control.
    similarity = pair.similarity("resid_post")
    # -----------------------------------------------------------------------------------------

    print(similarity.frame().round(3).to_string())
    print(f"\nlast layer, mean distance between soft and saturated z by head: {moved.tolist()}")
    return {
        "layers": len(similarity.s),
        "s_last": float(similarity.s[-1]),
        "largest_move": float(moved.max()),
        "hardest_row": float(saturated["pattern", last].amax(-1).min()),
    }


if __name__ == "__main__":
    main()
