"""Follow norms and saturation while a model trains.

It works as a callback of the Hugging Face Trainer, as an object whose ``step`` your own loop calls,
or around a loop without callbacks, such as TransformerLens's.

When not to use it: for a run that is over. :func:`sat_lens.norm_growth` reads its checkpoints, also
the ``model_N.pt`` that TransformerLens's training loop can write. There ``model_0.pt`` is the model
after the first step, and N starts anew in each epoch, so keep a copy of the initial model and name
the steps yourself: ``norm_growth({0: initial, 1: "model_0.pt", 101: "model_100.pt"})``.
"""

from sat_lens.training.log import read_training_log
from sat_lens.training.tracker import SaturationTracker

__all__ = ["SaturationTracker", "read_training_log"]
