"""Load a model by name, and what the other rooms ask about a model.

A name is that of the bundled demo, a local directory, a GGUF file, or a hub name with a revision.
All go through TransformerLens's ``TransformerBridge``, so what is said of one holds for the others.
A GGUF file, as llama.cpp uses, holds quantised weights. They are dequantised to float32 once and
kept in the user's cache folder; numbers measured on them are not those of the original weights.
Nothing that a model ships is run as code, unless ``trust_remote_code=True`` is passed on. A model
that you have already need not be loaded here: everything in this library takes it as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from sat_lens._checks import is_integer, is_lens_model
from sat_lens.errors import ArgumentError, ModelError, SatLensError, UnsupportedModelError
from sat_lens.version import newer_lens

DEMO = "demo"
DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
HUB_TIMEOUT = 5.0
# Files of this size are read in seconds.
MANY_BYTES = 2**28
GGUF = ".gguf"


def load_model(
    name: str | Path = DEMO, *, device: str | None = None, progress: bool = True, **options: Any
) -> Any:
    """Load a model as a ``TransformerBridge``, in float32 and evaluation mode.

    Args:
        name: ``"demo"`` (the bundled model), a local directory in Hugging Face format, a GGUF file
            or a directory that holds one, or a hub name such as ``"gpt2"``, optionally with a
            revision: ``"gpt2@main"``.
        device: Where the model goes: to the CPU, if ``device_map`` does not say where either.
        progress: Whether to show bars of what is downloaded, and of what is read from a hub model
            or from large files.
        **options: Further arguments of ``TransformerBridge.boot_transformers``, such as
            ``device_map`` for a model that is spread over devices or offloaded to the disk.

    Raises:
        ModelError: There is no such directory or hub model, the hub cannot be reached, the files
            are broken, lack weights of a layer, or bring code that would have to be run; or the
            package that reads GGUF files is not installed.
        UnsupportedModelError: TransformerLens knows no adapter for the architecture.

    Warns:
        UserWarning: The files lack weights outside of the layers, and these are random; or a
            processor for images is left out, because torchvision is not installed.

    Example:
        >>> import sat_lens as sl
        >>> sl.load_model("demo").cfg.n_heads
        8
    """
    if not isinstance(name, (str, Path)):
        raise ArgumentError(
            f"Needed the name of a model; found {type(name).__name__}. A Hugging Face "
            "model becomes a bridge with TransformerBridge.boot_transformers(name, hf_model=model, "
            "tokenizer=tokenizer)."
        )
    name = str(name)
    path, revision = _resolve(name)
    try:
        # Importing it takes three seconds, which models that are here already need not wait for.
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ModelError(
            "Loading a model by name needs TransformerLens 3.9 or newer (TransformerBridge), and "
            "an older one is installed. Load it with HookedTransformer.from_pretrained, and pass "
            "that model."
        ) from error
    if revision is not None:
        options["revision"] = revision
    options.setdefault("dtype", torch.float32)
    placed = options.get("device_map")
    if device is None and placed is None:
        device = "cpu"
    if isinstance(placed, (torch.device, int)):
        options["device_map"] = {"": placed}
    bars = progress and _takes_long(path)
    with hub_or_cache(path), installing_nothing(), quiet_loading(bars) as said:
        try:
            model = TransformerBridge.boot_transformers(path, device=device, **options)
        except Exception as error:
            raise load_error(name, error, said) from error
    check_complete(name, said)
    if str(model.cfg.device) == "meta":
        # Inputs go where accelerate brings the offloaded weights.
        model.cfg.device = str(device_of(model))
    model.eval()
    return model


def load_tokenizer(name: str | Path = DEMO) -> Any:
    """Load the tokenizer of a model alone, to check texts before the model is loaded."""
    path, revision = _resolve(str(name))
    with hub_or_cache(path), quiet_loading() as said:
        try:
            return transformers.AutoTokenizer.from_pretrained(path, revision=revision or "main")
        except Exception as error:
            raise load_error(str(name), error, said) from error


def model_name(model: Any) -> str:
    """Name a model for tables and pages: the demo by that name, a directory by its last part."""
    name = str(getattr(getattr(model, "cfg", None), "model_name", "") or type(model).__name__)
    if name == str(DEMO_FOLDER):
        return DEMO
    return Path(name).name if os.path.isdir(name) else name


def device_of(model: Any) -> torch.device:
    """Return the device on which the model takes its inputs.

    It is that of the first parameter. Where accelerate keeps parameters elsewhere, its hooks know
    the device to which each is brought when it is needed.
    """
    first = next((p.device for p in model.parameters()), torch.device("cpu"))
    if first.type != "meta":
        return first
    hooks = (getattr(module, "_hf_hook", None) for module in wrapped_model(model).modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in found if device is not None), first))


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a forward pass gave: a tensor, a tuple or a Hugging Face output."""
    found = getattr(output, "logits", output)
    return found if isinstance(found, Tensor) else found[0]


def wrapped_model(model: Any) -> Any:
    """Return the Hugging Face model inside of a bridge, and any other model itself."""
    return getattr(model, "original_model", model)


def main_input_name(model: Any) -> str:
    """Return the name of the model's main input, such as ``input_ids`` or ``input_features``.

    It is empty for what is neither of TransformerLens nor of Hugging Face, which may read anything.
    """
    usual = "input_ids" if is_lens_model(model) else ""
    return str(getattr(wrapped_model(model), "main_input_name", usual))


def vocabulary_size(model: Any) -> int:
    """Return the number of tokens that the model knows; 0 where nothing says it."""
    own = getattr(getattr(model, "cfg", None), "d_vocab", 0)
    config = getattr(wrapped_model(model), "config", None)
    return int(own or getattr(config, "vocab_size", 0) or 0)


def context_length(model: Any) -> int:
    """Return the largest number of positions that the model takes; 0 where nothing says it."""
    return int(getattr(getattr(model, "cfg", None), "n_ctx", 0) or 0)


def placeholder_tokens(model: Any) -> list[int]:
    """Return the tokens in whose place a model puts images or sounds, as its configuration says."""
    config = getattr(wrapped_model(model), "config", None)
    named = vars(config) if config is not None else {}
    return [v for name, v in named.items() if _PLACEHOLDER.search(name) and is_integer(v)]


def unembedding(model: Any) -> nn.Module | None:
    """Return the module that makes logits of the residual stream, if the model has one."""
    of_lens = getattr(model, "unembed", None)
    if isinstance(of_lens, nn.Module):
        return of_lens
    of_transformers = getattr(model, "get_output_embeddings", lambda: None)()
    return of_transformers if isinstance(of_transformers, nn.Module) else None


def residual_stream(model: Any) -> list[str]:
    """Return the names of the hook points of the residual stream after each block, in order.

    Not all of them need to fire: a block that returns a list, say, passes its hook point by.
    """
    return residual_names(getattr(model, "hook_dict", ()))


def residual_names(names: Iterable[str]) -> list[str]:
    """Return those of the names of activations that are the residual stream after a block."""
    named = list(names)
    after_blocks = [name for name in named if name.endswith(".hook_resid_post")]
    return after_blocks or [name for name in named if _BLOCK_OUTPUT.search(name)]


def last_residual(model: Any) -> str:
    """Return the name of the hook point of the residual stream after the last block.

    Raises:
        UnsupportedModelError: The model has none.
    """
    names = residual_stream(model)
    if not names:
        raise UnsupportedModelError(
            "The model has no hook for the residual stream after a block (hook_resid_post or "
            "hook_out). Load it as a TransformerLens model."
        )
    return names[-1]


def _resolve(name: str) -> tuple[str, str | None]:
    if name == DEMO:
        return str(DEMO_FOLDER), None
    hub_name, _, revision = name.partition("@")
    if not hub_name:
        raise ModelError(
            f'{name!r} names no model. Give "demo", a local directory, or a hub name such as '
            '"gpt2" or "gpt2@main".'
        )
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            return str(dequantised(_only_gguf(path))), None
        return str(path.resolve()), None
    if path.suffix == GGUF and path.is_file():
        return str(dequantised(path)), None
    if path.exists():
        raise ModelError(
            f"{name} is no model directory and no GGUF file. Give the directory that holds "
            "config.json, model.safetensors and a tokenizer."
        )
    if name.startswith((".", "/", "~")) or path.suffix == GGUF:
        raise ModelError(f"There is no model directory or file {name}.")
    return hub_name, revision or None


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob(f"*{GGUF}"))
    if len(files) == 1:
        return files[0]
    if files:
        raise ModelError(
            f"The directory {folder} holds {len(files)} GGUF files; name one of them: "
            + ", ".join(file.name for file in files)
        )
    raise ModelError(
        f"The directory {folder} holds no config.json. A model directory has config.json, "
        "model.safetensors and a tokenizer, as save_pretrained writes them, or one GGUF file."
    )


def dequantised(path: Path) -> Path:
    """Return the directory that holds a GGUF file's weights in float32, made at the first call.

    It lies in the user's cache folder, under a name that changes with the file.

    Raises:
        ModelError: As for :func:`convert_gguf`.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sat_lens" / "gguf"
    folder = cache / _fingerprint(path) / path.stem
    if not folder.exists():
        convert_gguf(path, folder)
    return folder


def _fingerprint(path: Path) -> str:
    """Tell files apart by size, date, first and last megabyte; large ones take long to read."""
    status = path.stat()
    digest = hashlib.sha256(f"{transformers.__version__} {status.st_size}".encode())
    digest.update(str(status.st_mtime_ns).encode())
    with path.open("rb") as file:
        digest.update(file.read(_MEGABYTE))
        file.seek(max(status.st_size - _MEGABYTE, 0))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as a Hugging Face directory, with its weights in float32.

    The directory appears when it is complete, and not at all if something goes wrong.

    Raises:
        ModelError: The package gguf is missing, the file is broken or of an architecture that
            transformers cannot read, or there is too little room.
    """
    # The reader comes with an extra.
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            f"Reading {path.name} needs the package gguf, which is not installed: "
            'pip install "sat-lens[gguf]" (or pip install gguf).'
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        with quiet_loading() as said:
            try:
                needed = 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
                _check_room(path, folder.parent, needed)
                source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
                tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
                auto = transformers.AutoModelForCausalLM
                model = auto.from_pretrained(**source, dtype=torch.float32)
                # What came from GGUF calls itself quantised, and would be saved as such.
                config = type(model.config).from_dict(model.config.to_dict())
                config.__dict__.pop("quantization_config", None)
                plain = type(model)(config)
                plain.load_state_dict(model.state_dict())
                plain.save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)
            except SatLensError:
                raise
            except Exception as error:
                raise load_error(str(path), error, said) from error
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_room(path: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"The weights of {path.name} take {needed / 1e9:.1f} GB in float32, and {folder} has "
            f"{free / 1e9:.1f} GB left. Make room, or name another cache folder in XDG_CACHE_HOME."
        )


def load_error(name: str, error: Exception, said: list[str]) -> SatLensError:
    """Return the library's own error for one that loading raised."""
    text = _ANSI.sub("", " ".join(str(error).split()))
    lowered = text.lower()
    if "trust_remote_code" in lowered:
        return ModelError(
            f"{name!r} brings Python code of its own, which is not run. If you have read it and "
            f"trust it: sat_lens.load_model({name!r}, trust_remote_code=True)."
        )
    if "supported architecture" in lowered:
        return UnsupportedModelError(
            f"TransformerLens has no adapter for the architecture of {name!r}, so its attention "
            f"cannot be reached ({text.partition('Available')[0].strip()})." + newer_lens()
        )
    if isinstance(error, pickle.UnpicklingError):
        return ModelError(
            f"The weights of {name!r} are a pickle that would run code or is broken, so they were "
            "not read. Save them anew as safetensors, from a source that you trust."
        )
    if not Path(name).is_dir() and any(sign in lowered for sign in _OFFLINE):
        return ModelError(
            f"{name!r} is neither the demo nor a directory, and the hub could not be reached or "
            "has no model of that name. Check the spelling and the network, or give a local "
            "directory with config.json, model.safetensors and a tokenizer."
        )
    report = _ROW.findall("\n".join(said))
    rows = [" ".join(row) for row in report if row[1] != "MISSING"]
    found = "; ".join(rows) or text
    return ModelError(f"{name!r} could not be loaded ({type(error).__name__}): {found[:_LONGEST]}")


def check_complete(name: str, said: list[str]) -> None:
    """Refuse a model of which some layer's weights were drawn at random for want of others."""
    text = "\n".join(said)
    missing = [key for key, status, _ in _ROW.findall(text) if status == "MISSING"]
    for listed in _OLDER.findall(text):
        missing += [key.strip(" '\"") for key in listed.split(",")]
    if not missing:
        return
    shown = ", ".join(sorted(missing))[:_LONGEST]
    if any(_OF_A_LAYER.search(key) for key in missing):
        raise ModelError(
            f"{name!r} lacks weights that its config.json asks for, which would be random: {shown}."
        )
    warnings.warn(f"{name!r} lacks weights, which are now random: {shown}", stacklevel=3)


_LONGEST = 400
_MEGABYTE = 2**20
_BLOCK_OUTPUT = re.compile(r"blocks\.\d+\.hook_out$")
_PLACEHOLDER = re.compile(r"(image|video|audio)_token_(id|index)$")
_ANSI = re.compile(r"\x1b?\[[0-9;]*m")
# A row of the report that transformers 5 gives, and the sentence that 4 does.
_ROW = re.compile(r"^(\S.*?) *\| *(MISSING|MISMATCH|CONVERSION) *\|? *(.*?) *$", re.MULTILINE)
_OLDER = re.compile(r"newly initialized[^\[]*\[([^\]]*)\]")
_OF_A_LAYER = re.compile(r"\.[{\d]")
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


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(_ANSI.sub("", record.getMessage()))


def _takes_long(path: str) -> bool:
    """Whether loading can take so long that somebody wants to see how far it is."""
    folder = Path(path)
    return not folder.is_dir() or sum(f.stat().st_size for f in folder.iterdir()) >= MANY_BYTES


@contextlib.contextmanager
def hub_or_cache(path: str) -> Iterator[None]:
    """Read what is not a directory from the hub, or from the local cache where no hub answers.

    The hub's own client tries each file for half a minute, and says so at every attempt.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or (not os.path.isdir(path) and not _hub_answers())
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers() -> bool:
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # noqa: BLE001 - its client's errors differ by version, and all mean no
        return False
    return True


@contextlib.contextmanager
def installing_nothing() -> Iterator[None]:
    """Refuse to run pip.

    TransformerLens runs it for models that read images, to get torchvision, and torchvision brings
    another PyTorch along.
    """
    check_call = subprocess.check_call

    def refusing(command: Any, *args: Any, **kwargs: Any) -> int:
        if {"pip", "install"} <= set(command):
            warnings.warn(
                f"TransformerLens wanted to run {' '.join(map(str, command))}, which was refused. "
                "Without it the model has no processor for images; text is not affected.",
                stacklevel=2,
            )
            raise PermissionError("pip is not run while a model is loaded")
        return check_call(command, *args, **kwargs)

    subprocess.check_call = refusing  # type: ignore[assignment]
    try:
        yield
    finally:
        subprocess.check_call = check_call


@contextlib.contextmanager
def quiet_loading(bars: bool = False) -> Iterator[list[str]]:
    """Keep advice of the loading libraries to ourselves, and their bars; give what was said."""
    level, hide = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled() and not bars
    root_level = logging.getLogger().level
    library = logging.getLogger("transformers")
    handlers, listener = list(library.handlers), _Listener()
    hf_logging.set_verbosity_warning()
    if hide:
        hf_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.ERROR)
    library.handlers = [listener]
    try:
        yield listener.said
    finally:
        library.handlers = handlers
        hf_logging.set_verbosity(level)
        logging.getLogger().setLevel(root_level)
        if hide:
            hf_logging.enable_progress_bar()
