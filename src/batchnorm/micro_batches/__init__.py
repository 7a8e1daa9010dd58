"""Micro-batches: the statistics of a training step whose batch is processed in parts, as gradient accumulation does."""

from batchnorm.micro_batches.whole_step import step

__all__ = ["step"]
