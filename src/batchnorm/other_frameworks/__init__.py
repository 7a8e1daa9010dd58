"""Batch norm of Keras, TensorFlow and Flax, into layers of torch.nn or ours and back.

Their layers store the same four tensors under other names (``naming``), and momentum with the other meaning: the weight
of the old statistics. eps and the variance are copied unchanged, so eval outputs agree to rounding. ``read`` makes a
``LayerState`` of each layer of a file, a tree of arrays or a Keras model, and ``load`` puts these states into a model.
``states_of`` reads the states of a model, and a ``LayerState`` returns arrays and settings for Keras or Flax.
"""

from batchnorm.other_frameworks.layer_state import LayerState, flax_variables, states_of
from batchnorm.other_frameworks.loading import load
from batchnorm.other_frameworks.reading import read

__all__ = ["LayerState", "flax_variables", "load", "read", "states_of"]
