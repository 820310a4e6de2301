"""Load a model by name: the bundled demo, a local directory, or a hub name with a revision.

All three go through TransformerLens's ``TransformerBridge``, so what is said of one holds for the
others. Nothing that a model ships is run as code.

When not to use it: if you have a model already. Everything in this library takes it as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sat_lens.errors import ModelError

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "model"


def load_model(name: str = DEMO, *, device: str = "cpu", **options: Any) -> Any:
    """Load a model as a ``TransformerBridge``, in float32 and evaluation mode.

    Args:
        name: ``"demo"`` (the bundled model), a local directory in Hugging Face format, or a hub
            name such as ``"gpt2"``, optionally with a revision: ``"gpt2@main"``.
        device: Where the model goes.
        **options: Further arguments of ``TransformerBridge.boot_transformers``.

    Raises:
        ModelError: There is no such directory or hub model, the hub cannot be reached, or the
            files are broken.
        UnsupportedModelError: TransformerLens knows no adapter for the architecture.

    Example:
        >>> import sat_lens as sl
        >>> sl.load_model("demo").cfg.n_heads
        8
    """
    path, revision = _resolve(name)
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ModelError(
            "Loading a model by name needs TransformerLens 3.9 or newer (TransformerBridge), and "
            "an older one is installed. Load it with HookedTransformer.from_pretrained, and pass "
            "that model."
        ) from error
    if revision is not None:
        options["revision"] = revision
    import torch

    options.setdefault("dtype", torch.float32)
    try:
        with _quiet():
            model = TransformerBridge.boot_transformers(path, device=device, **options)
    except Exception as error:
        raise _load_error(name, error) from error
    model.eval()
    return model


def model_name(model: Any) -> str:
    """Name a model for tables and pages: the demo by that name, a directory by its last part.

    Example:
        >>> import sat_lens as sl
        >>> model_name(sl.load_model("demo"))
        'demo'
    """
    name = str(getattr(getattr(model, "cfg", None), "model_name", "") or type(model).__name__)
    if name == str(DEMO_FOLDER):
        return DEMO
    return Path(name).name if os.path.isdir(name) else name


def _resolve(name: str) -> tuple[str, str | None]:
    if name == DEMO:
        return str(DEMO_FOLDER), None
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ModelError(
                f"The directory {name} holds no config.json. A model directory has config.json, "
                "model.safetensors and a tokenizer, as save_pretrained writes them."
            )
        return str(Path(name).resolve()), None
    if name.startswith((".", "/", "~")) or Path(name).exists():
        raise ModelError(f"There is no model directory {name}.")
    hub_name, _, revision = name.partition("@")
    return hub_name, revision or None


def _load_error(name: str, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    lowered = text.lower()
    if any(sign in lowered for sign in _OFFLINE):
        return ModelError(
            f"{name!r} is neither the demo nor a directory, and the hub could not be reached or "
            "has no model of that name. Check the spelling and the network, or give a local "
            "directory with config.json, model.safetensors and a tokenizer."
        )
    return ModelError(f"{name!r} could not be loaded ({type(error).__name__}): {text[:400]}")


_OFFLINE = (
    "couldn't connect",
    "can't load",
    "offline",
    "connection",
    "is not a local folder",
    "is not a valid model identifier",
    "localentrynotfound",
    "name resolution",
    "max retries",
    "cannot find the requested files",
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the loading libraries out of the caller's output."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    root_level = logging.getLogger().level
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        logging.getLogger().setLevel(root_level)
        if bars:
            hf_logging.enable_progress_bar()
