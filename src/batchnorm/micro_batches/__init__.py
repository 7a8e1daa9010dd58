"""Micro-batches: the statistics of a training step whose batch is processed in parts, as gradient accumulation does.

``step`` stores the statistics of all parts once. ``step_backward`` also normalizes every part by them.
"""

from batchnorm.micro_batches.whole_batch import step_backward
from batchnorm.micro_batches.whole_step import step

__all__ = ["step", "step_backward"]
