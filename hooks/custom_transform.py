"""Put attention scores through functions of your own: the best k keys, and sparsemax.

Run it:  python hooks/custom_transform.py [--model MODEL] [--heads L0H0 L1H2]
"""

import argparse

import torch
from torch import Tensor

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):"


# --- the part to paste -----------------------------------------------------------------------
# A transform takes scores [batch, head, query, key] in float32, with -inf at masked keys, and
# returns scores. The softmax of these is the new pattern, so to dictate a pattern return its log.
def top_three(scores: Tensor) -> Tensor:
    """Drop all keys but the best three of each row; the rest keep their proportions."""
    third = scores.topk(min(3, scores.shape[-1]), dim=-1).values[..., -1:]
    return scores.masked_fill(scores < third, -torch.inf)


def sparsemax(scores: Tensor) -> Tensor:
    """Project each row onto the probability simplex (Martins and Astudillo 2016, Algorithm 1)."""
    ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    excess = ordered.cumsum(-1) - 1
    kept = (rank * ordered > excess).sum(-1, keepdim=True)
    return (scores - excess.gather(-1, kept - 1) / kept).clamp(min=0).log()


# ---------------------------------------------------------------------------------------------
def main() -> dict[str, float]:
    """Compare both with soft attention and the limit; return losses and keys in use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", nargs="*", help="labels such as L0H0; all heads by default")
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(PROMPT)
    loss = sl.metrics.next_token_loss(tokens)
    torch.set_grad_enabled(False)
    found = {"soft_loss": float(loss(model(tokens)))}
    for name, transform in [("top_three", top_three), ("sparsemax", sparsemax)]:
        with sl.replace_attention(model, transform, options.heads):
            logits, cache = model.run_with_cache(tokens)
        found[f"{name}_loss"] = float(loss(logits))
        found[f"{name}_keys"] = int((cache["pattern", 0] > 0).sum(-1).max())
    with sl.saturate(model, options.heads):
        found["saturated_loss"] = float(loss(model(tokens)))
    print("\n".join(f"{name:>15}: {value:.2f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
