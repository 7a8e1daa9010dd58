"""Surgery: functions that exchange the batch norm layers of a model and leave everything else about it unchanged.

``find`` lists the batch norm layers, and ``replace`` exchanges them for any modules. ``convert`` exchanges torch.nn's
layers for ours, which can also apply the activations that follow them; ``revert`` undoes it. ``fold`` moves the work
of batch norm into the weights of neighbouring layers, ``unfold`` undoes it, and ``foldable`` says which layers can be
folded, and why the others cannot. ``for_export`` returns a model of torch.nn's classes, for tools that look at classes.
``to_group_norm`` replaces batch norm by group normalization.
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
