"""Averages of models: one state dict from those of several, with the batch norm statistics of all their data.

``merge_statistics`` works on state dicts and models, ``merged_files`` on checkpoints. The variance of a union has a
term that a mean of variances loses: the variance between the means (``Moments``).
"""

from batchnorm.averaging.merged_states import merge_statistics, weights_agree

__all__ = ["merge_statistics", "weights_agree"]
