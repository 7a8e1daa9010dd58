"""Replicas: a model's copies in several processes, compared layer by layer, and given the same statistics."""

from batchnorm.replicas.broadcast import broadcast_statistics
from batchnorm.replicas.differences import Difference, Replicas, check_replicas

__all__ = ["Difference", "Replicas", "broadcast_statistics", "check_replicas"]
