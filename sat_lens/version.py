"""The version, in a file that the build can read without importing the library.

Beside it, what to say where an older TransformerLens may be the reason of a failure.
"""

from importlib import metadata

__version__ = "0.1.0"

NEWEST_LENS = "4.3"


def newer_lens() -> str:
    """Return a sentence that names the newer TransformerLens; nothing if the installed one is new.

    Example:
        >>> newer_lens() == "" or "TransformerLens" in newer_lens()
        True
    """
    try:
        installed = metadata.version("transformer-lens")
    except metadata.PackageNotFoundError:
        return ""
    if int(installed.partition(".")[0]) >= int(NEWEST_LENS.partition(".")[0]):
        return ""
    return (
        f" TransformerLens {installed} is installed; version {NEWEST_LENS} runs more models, and "
        "this one may be among them."
    )
