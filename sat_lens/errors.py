"""The library's own errors: one family, and each message says what to do next.

Every error that sat_lens raises on purpose is a :class:`SatLensError`. Errors about an argument
are :class:`ArgumentError` or below, which are ``ValueError`` as well, so that code that knows
nothing of this library can still catch them.
"""

from __future__ import annotations


class SatLensError(Exception):
    """Root of all errors that sat_lens raises on purpose."""


class ArgumentError(SatLensError, ValueError):
    """An argument cannot be used: the message says what was needed and what was found."""


class HeadSelectionError(ArgumentError):
    """A head was named that the model does not have, or the selection is empty."""


class DataError(ArgumentError):
    """The data is empty, of the wrong shape, or cannot be read."""


class ModelError(SatLensError):
    """A model could not be found, read or loaded."""


class UnsupportedModelError(ArgumentError):
    """The model's attention cannot be touched in the way that was asked for."""


class NotReachedError(SatLensError):
    """A chosen head was not changed by a forward pass that ran through its layer."""


class FileFormatError(SatLensError):
    """A file is broken, foreign, or from a version that this one cannot read."""


class NonFiniteError(SatLensError):
    """A number that had to be finite is NaN or infinite."""
