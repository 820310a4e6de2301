"""Follow norms and saturation while a model trains: in a loop of your own, and in the Trainer.

Run it:  python hooks/track_training.py [--model MODEL] [--steps 8]
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sat_lens as sl

TEXT = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):"


def main() -> dict[str, float]:
    """Train the model itself and a new one of its shape; return what the trackers saw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    model = sl.load_model(options.model)
    tokens = model.to_tokens(TEXT)
    new_model = AutoModelForCausalLM.from_config(model.original_model.config)

    with tempfile.TemporaryDirectory() as folder:
        # --- the part to paste ---------------------------------------------------------------
        # One call after each step. With budget=None, for toys, it measures whenever due.
        tracker = sl.SaturationTracker(f"{folder}/log.jsonl", data=tokens, budget=None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        tracker.step(model, 0)
        for step in range(1, options.steps + 1):
            optimizer.zero_grad()
            torch.autograd.backward(sl.metrics.next_token_loss(tokens)(model(tokens)))
            optimizer.step()
            tracker.step(model, step)
        tracker.close()
        log = sl.training.read_training_log(f"{folder}/log.jsonl")

        # The Hugging Face Trainer: the tracker is a callback.
        callback = sl.SaturationTracker(data=tokens, budget=None)
        settings = TrainingArguments(
            folder, max_steps=options.steps, report_to="none", disable_tqdm=True, use_cpu=True
        )
        rows = [{"input_ids": tokens[0], "labels": tokens[0]}] * 8
        Trainer(new_model, settings, train_dataset=rows, callbacks=[callback]).train()
        # -------------------------------------------------------------------------------------

    print(log[["norm", "loss", "loss_saturated", "S", "lean"]].round(3))
    return {
        "last_logged": int(log.index[-1]),
        "last_of_trainer": int(callback.frame().index[-1]),
        "loss_fell_by": float(log["loss"][0] - log["loss"][options.steps]),
        "lean_at_random": float(callback.frame()["lean"].iloc[0]),
    }


if __name__ == "__main__":
    main()
