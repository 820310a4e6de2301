"""The model and the text of a command that measures, loaded once all else has been checked."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sat_lens.cli.checks import read_text
from sat_lens.errors import ArgumentError

if TYPE_CHECKING:
    from torch import Tensor


def model_and_windows(options: argparse.Namespace) -> tuple[Any, Tensor, str]:
    """Load the model, cut the chosen text into windows, and say what the text is called."""
    from sat_lens.data import text_windows
    from sat_lens.demo.corpus import corpus_name, held_out_texts
    from sat_lens.models import load_model

    if options.sequences < 1 or options.context < 2:
        raise ArgumentError("--sequences must be at least 1 and --context at least 2.")
    texts: Iterable[str] = held_out_texts() if options.text is None else [read_text(options.text)]
    model = load_model(options.model)
    context = min(options.context, int(getattr(model.cfg, "n_ctx", 0) or options.context))
    windows = text_windows(model, texts, context, options.sequences)
    return model, windows, corpus_name() if options.text is None else options.text.name
