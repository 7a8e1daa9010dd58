"""Surgery: a model in, a model with other batch norm layers out, and nothing else about it changed.

``replace`` puts any module in a layer's place; ``convert`` puts ours in the place of torch.nn's and can let them
apply the activations behind them; ``revert`` is its way back; ``find`` says what there is.
"""

from batchnorm.surgery.conversion import convert, revert
from batchnorm.surgery.replacement import find, replace

__all__ = ["convert", "find", "replace", "revert"]
