"""The recipe of the bundled demo model: ``python -m paper.demo_training``.

Trains a small Llama-shaped causal language model on the training part of
:mod:`sat_lens.demo.corpus`. The run is deterministic for a seed, a number of threads and a
machine; it keeps its state in ``--work`` and resumes from there when started again. Weights are
kept at log-spaced steps, step 0 included. When training is done, all of them are measured, and the
last is written to ``--out`` in float16 with the measurements beside it. Those of the bundled model
are in ``paper/demo_training_log.json``.

When not to use it: to load the demo model. The library ships it: ``sat_lens.load_model("demo")``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paper.network import log_spaced_steps
from sat_lens.data import text_windows
from sat_lens.demo.corpus import corpus_name, held_out_texts, training_texts
from sat_lens.intervention import saturate
from sat_lens.metrics import next_token_loss
from sat_lens.models import load_model
from sat_lens.results import library_versions, write_whole
from sat_lens.roles import head_roles

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
STEPS_BETWEEN_STATES = 250
LOG = Path(__file__).with_name("demo_training_log.json")
# Held-out windows that each checkpoint is measured on.
WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides what the trained model is, besides the corpus."""

    seed: int = 0
    steps: int = 6000
    batch: int = 16
    context: int = 256
    vocab: int = 2048
    layers: int = 4
    heads: int = 8
    d_model: int = 128
    d_head: int = 32
    d_mlp: int = 384
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    bfloat16_autocast: bool = True


def train_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Int[Tensor, " tokens"]:
    """Encode texts into one stream, each followed by the end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    end = [tokenizer.eos_token_id]
    return torch.cat([torch.tensor(text.ids + end, dtype=torch.int32) for text in encoded])


def new_model(recipe: Recipe, bos_id: int, eos_id: int, pad_id: int) -> LlamaForCausalLM:
    """Build the untrained model from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab,
            hidden_size=recipe.d_model,
            intermediate_size=recipe.d_mlp,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.d_head,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=bos_id,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
    )


def batch_at(
    stream: Int[Tensor, " tokens"], step: int, recipe: Recipe, bos_id: int
) -> Int[Tensor, "batch context"]:
    """Draw the batch of one step: windows of the stream, each opened by the BOS token.

    The draw depends on the seed and the step alone, so a resumed run sees the same batches.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    width = recipe.context - 1
    starts = torch.randint(len(stream) - width, (recipe.batch, 1), generator=generator)
    windows = stream[starts + torch.arange(width)].long()
    return torch.cat([torch.full((recipe.batch, 1), bos_id), windows], dim=1)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Build AdamW with weight decay on the matrices and none on the norms' gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def save_state(
    work: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, step: int
) -> None:
    """Write what is needed to resume; the file appears whole or not at all."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value
    partial = work / "state.partial"
    save_file(tensors, partial, metadata={"step": str(step)})
    os.replace(partial, work / "state.safetensors")


def load_state(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Restore a saved state and return its step."""
    path = work / "state.safetensors"
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            optimizer.state[p] = {
                key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def train(recipe: Recipe, work: Path) -> None:
    """Train to the recipe's last step, resuming from the state in ``work`` if there is one."""
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(work, recipe)
    stream = encode(tokenizer, training_texts())
    bos_id, eos_id, pad_id = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD])
    model = new_model(recipe, bos_id, eos_id, pad_id)
    optimizer = make_optimizer(model, recipe)
    resumed = (work / "state.safetensors").exists()
    start = load_state(work, model, optimizer) if resumed else 0
    kept = set(log_spaced_steps(recipe.steps, halves_from=16))
    progress = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, unit="step")
    for step in progress:
        if step in kept:
            model.save_pretrained(work / f"checkpoint-{step}")
        loss = _training_step(
            model, optimizer, batch_at(stream, step, recipe, bos_id), step, recipe
        )
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss:.3f}")
        if (step + 1) % STEPS_BETWEEN_STATES == 0:
            save_state(work, model, optimizer, step + 1)
    model.save_pretrained(work / f"checkpoint-{recipe.steps}")


def write_model(recipe: Recipe, work: Path, out: Path) -> None:
    """Write the trained model in float16, with its tokenizer, to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(work / f"checkpoint-{recipe.steps}")
    model.half().save_pretrained(out)
    _tokenizer(work, recipe).save_pretrained(out)


def _training_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    tokens: Int[Tensor, "batch context"],
    step: int,
    recipe: Recipe,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, recipe)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16_autocast):
        logits = model(tokens, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _tokenizer(work: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    folder = work / "tokenizer"
    if not folder.exists():
        train_tokenizer(recipe.vocab).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def measure_checkpoints(work: Path, out: Path, context: int, recipe: dict[str, Any]) -> None:
    """Measure ``work/checkpoint-*`` in the order of steps, and write the log to ``out``.

    For each step: losses soft and saturated on held-out text, the norm of all parameters, and the
    saturation of every head.
    """
    steps = sorted(int(path.name.split("-")[1]) for path in work.glob("checkpoint-*"))
    records = [_measure(work, step, context) for step in tqdm(steps, desc="measuring", unit="ckpt")]
    log = {
        "recipe": recipe,
        "corpus": corpus_name(),
        "held_out_windows": WINDOWS,
        "versions": library_versions(),
        "steps": records,
    }
    write_whole(out, (json.dumps(log, indent=1) + "\n").encode())


def _measure(work: Path, step: int, context: int) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = load_model(str(work / f"checkpoint-{step}"), tokenizer=tokenizer)
    windows = text_windows(model, held_out_texts(), context, WINDOWS)
    roles = head_roles(model, windows, progress=False).frame()
    parameters = [p.detach() for p in model.original_model.parameters()]
    with saturate(model):
        saturated = _loss(model, windows)
    return {
        "step": step,
        "loss": _loss(model, windows),
        "loss_saturated": saturated,
        "norm": float(torch.sqrt(sum((p.double() ** 2).sum() for p in parameters))),
        "heads": {
            label: {
                name: round(float(row[name]), 4)
                for name in ("tv_argmax", "tv_mean", "tv_nearest", "lean", "previous", "induction")
            }
            for label, row in roles.iterrows()
        },
    }


def _loss(model: Any, windows: Int[Tensor, "window context"]) -> float:
    with torch.no_grad():
        losses = [float(next_token_loss(part)(model(part))) for part in windows.split(16)]
    return round(sum(losses) / len(losses), 4)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m paper.demo_training", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="state folder")
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="where the model goes")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--restart", action="store_true", help="forget the state in --work")
    options = parser.parse_args(arguments)
    recipe = Recipe(seed=options.seed, steps=options.steps)
    if options.restart:
        shutil.rmtree(options.work, ignore_errors=True)
    train(recipe, options.work)
    write_model(recipe, options.work, options.out)
    log = options.out / "training_log.json"
    measure_checkpoints(options.work, log, recipe.context, dataclasses.asdict(recipe))


if __name__ == "__main__":
    main()
