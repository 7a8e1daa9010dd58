"""Instruments: measure what batch norm does in a user's own model, during the training or once.

``watch`` measures during a whole training and costs little time; ``probe`` measures once. Their measurements are cheap
and of two tiers: the free tier reads the running averages (``snapshots``, ``free_tier``, ``gamma_and_beta``), and the
probe tier runs the model on a fixed batch (``probe_tier``, ``signal_propagation``, ``layer_drift``). More expensive
measurements are separate calls: ``gradient_shift``, ``landscape``, ``Angles``, ``gradient_depth``, ``train_eval_gap``
and ``companion_flips``. No instrument changes the model.
"""

from batchnorm.instruments.angles import Angles
from batchnorm.instruments.companion_examples import companion_flips
from batchnorm.instruments.gradients import gradient_depth
from batchnorm.instruments.internal_covariate_shift import gradient_shift
from batchnorm.instruments.loss_landscape import landscape
from batchnorm.instruments.probe_tier import probe
from batchnorm.instruments.sinks import Sink
from batchnorm.instruments.train_eval_gaps import train_eval_gap
from batchnorm.instruments.watch_block import watch
from batchnorm.instruments.watched_training import Watch

__all__ = [
    "Angles",
    "Sink",
    "Watch",
    "companion_flips",
    "gradient_depth",
    "gradient_shift",
    "landscape",
    "probe",
    "train_eval_gap",
    "watch",
]
