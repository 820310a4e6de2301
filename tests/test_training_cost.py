"""What the tracker costs at its default settings, on a training run and not on a toy's steps."""

from __future__ import annotations

import time

import pytest
import torch
import transformers

from sat_lens.training import SaturationTracker

# Four layers of eight heads on 2,048 tokens a step: the size of a small language model that one
# trains on a CPU. Steps of larger models are longer, and measures grow with them.
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
STEPS = 300


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("types_unchecked")
def test_it_takes_at_most_two_percent_of_the_cpu_time_of_a_run(tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = SaturationTracker(tmp_path / "log.jsonl", torch.randint(2048, (4, 128)))
    spent, begin = 0.0, time.process_time()
    for step in range(STEPS + 1):
        if step:
            tokens = torch.randint(2048, (16, 128))
            torch.autograd.backward(model(tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()
        before = time.process_time()
        tracker.step(model, step)
        spent += time.process_time() - before
    tracker.close()
    share = spent / (time.process_time() - begin)
    frame = tracker.frame()
    assert {0, 1, 2, 4, 8, 16, 32, 64, 128, 256} <= set(frame.index)
    # Saturation was measured at the start and again once the budget allowed for it.
    # (S itself is undefined where random keys change as little as saturation does.)
    assert frame["loss_saturated"].notna().sum() >= 2
    assert share <= 0.02, f"{100 * share:.2f}% of the CPU time"
    assert tracker.overhead <= 0.021
