"""Generate text with saturated attention: all of it, or from the first new token on.

Run it:  python hooks/generate_saturated.py [--model MODEL] [--heads L0H0 L1H2]
"""

import argparse

import torch
from torch import Tensor

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width"


def main() -> dict[str, str]:
    """Continue a prompt in several ways; return the continuations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", nargs="*", help="labels such as L0H0; all heads by default")
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(PROMPT)
    torch.set_grad_enabled(False)

    # --- the part to paste -------------------------------------------------------------------
    settings = {"max_new_tokens": 16, "do_sample": False, "verbose": False}
    new = {"soft": model.generate(tokens, **settings)}

    # The prompt is read inside the block too, so the KV cache holds what a saturated model keeps.
    with sl.saturate(model, options.heads):
        new["saturated"] = model.generate(tokens, **settings)
        new["without cache"] = model.generate(tokens, use_past_kv_cache=False, **settings)

    # With a KV cache the prompt is one pass of many rows, and each new token one of a single row.
    def new_rows_only(scores: Tensor) -> Tensor:
        return sl.transforms.Limit()(scores) if scores.shape[-2] == 1 else scores

    with sl.replace_attention(model, new_rows_only, options.heads):
        new["soft prompt"] = model.generate(tokens, **settings)
    # -----------------------------------------------------------------------------------------

    texts = {name: model.tokenizer.decode(ids[0, tokens.shape[1] :]) for name, ids in new.items()}
    print("\n".join(f"{name:>13}: {text!r}" for name, text in texts.items()))
    return texts


if __name__ == "__main__":
    main()
