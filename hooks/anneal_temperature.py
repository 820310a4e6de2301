"""Let the inverse temperature grow: step by step while a model trains, or from layer to layer.

Run it:  python hooks/anneal_temperature.py [--model MODEL] [--steps 12]
"""

import argparse
import math

import torch

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):"


def main() -> dict[str, float]:
    """Train towards hard attention, then run a schedule through the layers; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(PROMPT)
    loss = sl.metrics.next_token_loss(tokens)

    def at(scale: float) -> float:
        with torch.no_grad(), sl.saturate(model, scale=scale):
            return float(loss(model(tokens)))

    before = {"soft": at(1.0), "saturated": at(math.inf)}

    # --- the part to paste -------------------------------------------------------------------
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(options.steps):
        # c doubles every other step. At any finite c gradients pass through the scores; at
        # infinity none would, so the limit itself is for the end.
        with sl.saturate(model, scale=2.0 ** (step / 2)):
            optimizer.zero_grad()
            torch.autograd.backward(loss(model(tokens)))
        optimizer.step()

    # A schedule through the forward pass: c = 1, 2, 4, ..., and the limit in the last layer.
    last = max(site.layer for site in sl.attention_sites(model))
    growing = {layer: math.inf if layer == last else 2.0**layer for layer in range(last + 1)}
    with torch.no_grad(), sl.saturate(model, scale=lambda layer, head: growing[layer]):
        _, cache = model.run_with_cache(tokens)
    # -----------------------------------------------------------------------------------------

    after = {"soft": at(1.0), "saturated": at(math.inf)}
    hardness = [float(cache["pattern", layer].amax(-1).mean()) for layer in range(last + 1)]
    print(f"loss before {before}, after {after}")
    print(f"mean weight of the winning key under the schedule, by layer: {hardness}")
    found = {f"{name}_before": value for name, value in before.items()}
    found |= {f"{name}_after": value for name, value in after.items()}
    return found | {"first_layer": hardness[0], "last_layer": hardness[-1]}


if __name__ == "__main__":
    main()
