"""The names of batch norm's tensors and settings in each framework, as one table.

momentum of Keras and Flax is the weight of the old statistics: 1 minus torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

TENSORS = ("weight", "bias", "running_mean", "running_var")  # in the order of Keras' get_weights()
STATISTICS = ("running_mean", "running_var")


@final
@dataclass(frozen=True, slots=True)
class Framework:
    """One framework's names: of tensors by torch's names, and of the settings that switch gamma and beta on."""

    name: str
    tensors: Mapping[str, str]
    switches: Mapping[str, str]  # for "weight" and "bias"
    collections: Mapping[str, str]  # the first key of a tree around a tensor, if the framework has such keys

    @property
    def ours(self) -> dict[str, str]:
        """torch's names by the framework's."""
        return {theirs: ours for ours, theirs in self.tensors.items()}


KERAS = Framework(
    "keras",
    tensors=dict(zip(TENSORS, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True)),
    switches={"weight": "scale", "bias": "center"},
    collections={},
)
FLAX = Framework(
    "flax",
    tensors=dict(zip(TENSORS, ("scale", "bias", "mean", "var"), strict=True)),
    switches={"weight": "use_scale", "bias": "use_bias"},
    collections=dict(zip(TENSORS, ("params", "params", "batch_stats", "batch_stats"), strict=True)),
)
FRAMEWORKS = (KERAS, FLAX)
# names of classes in Keras' configurations
KERAS_CLASSES = frozenset(
    {"BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization"}
)
