"""Saturate a model while a sparse autoencoder, or any other hook, works on its activations.

Run it:  python hooks/sae_lens_or_other_hooks.py [--model MODEL]
"""

import argparse

import torch
from torch import Tensor

import sat_lens as sl

PROMPT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self."
POINT = "blocks.1.hook_resid_post"
SCORES = "blocks.0.attn.hook_attn_scores"


class StandIn:
    """A substitute for an SAE: one feature per dimension and sign."""

    encode = staticmethod(lambda x: torch.cat([x, -x], -1).relu())
    decode = staticmethod(lambda features: features.chunk(2, -1)[0] - features.chunk(2, -1)[1])


def main() -> dict[str, float]:
    """Read features soft and saturated, and show which hook sees what; return the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    model = sl.load_model(parser.parse_args().model)
    tokens, seen = model.to_tokens(PROMPT), {}
    torch.set_grad_enabled(False)
    sae = StandIn()  # or SAE.from_pretrained(...) of sae_lens, and the hook name of its cfg

    # --- the part to paste -------------------------------------------------------------------
    def splice(x: Tensor, hook: object) -> Tensor:
        seen["features"] = sae.encode(x)
        return sae.decode(seen["features"])

    model.run_with_hooks(tokens, fwd_hooks=[(POINT, splice)])
    soft = seen["features"]
    with sl.saturate(model):
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(POINT, splice)])
        plain = model(tokens)

    # A hook from before the block sees the model's own scores, one from inside the new ones.
    model.add_hook(SCORES, lambda x, hook: seen.update(before=x.clone()))
    with sl.saturate(model):
        model.run_with_hooks(tokens, fwd_hooks=[(SCORES, lambda x, hook: seen.update(inside=x))])
    model.reset_hooks()  # takes off those of add_hook, here and everywhere
    # -----------------------------------------------------------------------------------------

    found = {name: float(seen[name].softmax(-1).amax(-1).mean()) for name in ("before", "inside")}
    found["features_kept"] = float(((soft > 0) == (seen["features"] > 0)).float().mean())
    found["splice_error"] = float((spliced - plain).abs().max())
    print("\n".join(f"{name:>15}: {value:.3f}" for name, value in found.items()))
    return found


if __name__ == "__main__":
    main()
