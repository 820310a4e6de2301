"""What counts as data: token tensors, texts, or batches of a model's own arguments.

Everything that runs a model over data reads it through :func:`batches`, so all of it takes the
same forms and refuses the same mistakes.
"""

from sat_lens.data.batch import Batch, predicts_next
from sat_lens.data.reading import INPUT_NAMES, Data, batch_sizes, batches, read_batch, repeatable
from sat_lens.data.texts import text_windows

__all__ = [
    "INPUT_NAMES",
    "Batch",
    "Data",
    "batch_sizes",
    "batches",
    "predicts_next",
    "read_batch",
    "repeatable",
    "text_windows",
]
