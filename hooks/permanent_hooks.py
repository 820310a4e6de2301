"""Keep a model saturated with TransformerLens's permanent hooks, and remove them again.

A hook cannot check anything: not that it is still there, nor that it is there only once. Where a
block of code has a beginning and an end, ``sat_lens.saturate`` is the safer form.

Run it:  python hooks/permanent_hooks.py [--model MODEL] [--heads L0H0 L1H2]
"""

import argparse

import torch

import sat_lens as sl

PROMPT = "def area(width, height):\n    return width"


def main() -> dict[str, float]:
    """Add permanent hooks, try to lose them, take them off; return what changed when."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--heads", nargs="*", help="labels such as L0H0; all heads by default")
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(PROMPT)
    torch.set_grad_enabled(False)
    soft = model(tokens)

    # --- the part to paste -------------------------------------------------------------------
    for name, hook in sl.saturation_hooks(model, heads=options.heads):
        model.add_perma_hook(name, hook)  # the same as add_hook(name, hook, is_permanent=True)
    saturated = model(tokens)
    model.reset_hooks()  # leaves permanent hooks where they are
    still = model(tokens)
    # Takes off every permanent hook of the model, those of others as well; nothing complains.
    model.reset_hooks(including_permanent=True)
    free = model(tokens)

    # A cell that is run twice adds its hooks twice: a scale of 2 is then a scale of 4.
    for name, hook in 2 * sl.saturation_hooks(model, heads=options.heads, scale=2.0):
        model.add_perma_hook(name, hook)
    twice = model(tokens)
    model.reset_hooks(including_permanent=True)
    # -----------------------------------------------------------------------------------------

    with sl.saturate(model, heads=options.heads):
        expected = model(tokens)
    with sl.saturate(model, heads=options.heads, scale=4.0):
        squared = model(tokens)
    found = {"effect": soft - saturated, "apart_from_a_block": saturated - expected}
    found |= {"lost_by_reset": still - saturated, "left_behind": free - soft}
    found |= {"twice_apart_from_four": twice - squared}
    largest = {name: float(difference.abs().max()) for name, difference in found.items()}
    print("\n".join(f"{name:>21}: {value:.2g}" for name, value in largest.items()))
    return largest


if __name__ == "__main__":
    main()
