"""Train a model while its attention is hard, with the straight-through gradient.

Run it:  python hooks/train_hard.py [--model MODEL] [--steps 12]
"""

import argparse
import math

import torch

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):"


def main() -> dict[str, float]:
    """Train hard from the first step, and for comparison without a gradient through patterns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    found = {}
    for gradient in (None, "straight-through"):
        model = sl.load_model(options.model)
        tokens = model.to_tokens(PROMPT)
        loss = sl.metrics.next_token_loss(tokens)
        # Queries and keys alone, so that the gradient has to go through the patterns.
        parts = [part for block in model.blocks for part in (block.attn.q, block.attn.k)]
        weights = [weight for part in parts for weight in part.parameters()]

        # --- the part to paste ---------------------------------------------------------------
        optimizer = torch.optim.AdamW(weights, lr=1e-3)
        for _ in range(options.steps):
            # The forward pass is that of saturate(model), number for number. Backward, each
            # pattern passes the gradient of softmax(surrogate_scale * scores).
            with sl.saturate(model, gradient=gradient, surrogate_scale=1.0):
                optimizer.zero_grad()
                torch.autograd.backward(loss(model(tokens)))
            optimizer.step()
        # -------------------------------------------------------------------------------------

        name = "straight_through" if gradient else "plain"
        with torch.no_grad(), sl.saturate(model, scale=math.inf):
            found[f"{name}_saturated"] = float(loss(model(tokens)))
        with torch.no_grad():
            found[f"{name}_soft"] = float(loss(model(tokens)))
    print(f"losses after training queries and keys under hard attention: {found}")
    return found


if __name__ == "__main__":
    main()
