"""Surgery: a model in, a model with other batch norm layers out, and nothing else about it changed.

``replace`` puts any module in a layer's place; ``convert`` puts ours in the place of torch.nn's and can let them
apply the activations behind them; ``revert`` is its way back; ``find`` says what there is. ``fold`` lets the layers
next to batch norm do its work, ``unfold`` is its way back, and ``foldable`` says where that is possible and why not
elsewhere. ``for_export`` makes what tools that go by class know, and ``to_group_norm`` puts group normalization in its
place.
"""

from batchnorm.surgery.conversion import convert, revert
from batchnorm.surgery.exporting import for_export
from batchnorm.surgery.folding.fold_and_unfold import Folding, fold, foldable, unfold
from batchnorm.surgery.folding.plan import Partner
from batchnorm.surgery.group_norm import to_group_norm
from batchnorm.surgery.replacement import find, replace

__all__ = [
    "Folding",
    "Partner",
    "convert",
    "find",
    "fold",
    "foldable",
    "for_export",
    "replace",
    "revert",
    "to_group_norm",
    "unfold",
]
