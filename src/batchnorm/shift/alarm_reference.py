"""Reference: the bounds of clean data at the batch norm layers, from the checkpoint alone or from calibration.

*From a checkpoint*: a trained model stores the mean and variance of its training data. An observation is one example,
or the mean of several examples (``observation_units``). Let z be a channel's mean in one observation, standardized by
the stored statistics, and Q a layer's energy: the mean square of its standardized inputs. On clean data

    |E[z | past]| <= delta,     Var(z | past) <= kappa,     E[Q | past] <= 1 + d.

The variance of an observation's mean cannot exceed that of its values (law of total variance), so kappa = 1 + d. d is
the precision of the stored variances, delta that of the stored means. Each is 0.1, or three standard errors if these
are larger. An exponential average with momentum a over batches of B examples counts as n = B (2 - a) / a examples:

    delta = max(0.1, 3 / sqrt(n)),     d = max(0.1, 3 sqrt((k - 1) / n)),

with k = 3, the kurtosis of normal values, or the declared kurtosis. An average over few batches misses rare, large
examples: if the data have such examples, recalibrate first, or declare the kurtosis. Observations without rare, large
examples have less energy, and stored statistics do not bound how much less. So less energy is evidence only if
``kurtosis`` is declared: then Var(Q) <= k - (1 - d)^2.

*Calibrated*, from at least 200 clean observations: nothing is assumed about their distribution. New observations are
compared with them by rank (``conformal``, ``scores``). The bound on false alarms only needs that later clean
observations are exchangeable with them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.argument_types import require_whole_number
from batchnorm.files.sidecar import Sidecar
from batchnorm.other_libraries import channels_of, eps_of
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_memory import digest_of, whole
from batchnorm.shift import by_layer, clean_observations
from batchnorm.shift.clean_observations import CleanObservations

FILE = Sidecar(
    "reference", ".bncal.safetensors", "a reference", version=3, remedy="Make one with monitor.calibrate(loader)."
)
LEAST = 200  # observations to calibrate with
_BATCH = 64  # examples in a training batch, by default
_USUAL_MOMENTUM = 0.1
_LEAST_ERROR = 0.1  # smallest assumed error of stored statistics
NORMAL = 3.0  # kurtosis of normal values
_TOLERANCE = 0.02  # movement of principal components, in sd, that an alarm's hint ignores


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Bounds of clean data for all layers; their channels are side by side, on the CPU in float64.

    Args:
        layers: Names of the layers.
        sizes: Number of channels of each layer.
        mean: Stored mean of each channel, (channels,).
        std: Stored standard deviation, sqrt(var + eps), (channels,).
        delta: Largest absolute value of E z, (channels,); delta, kappa, d and v are not used if calibrated.
        kappa: Largest variance of z, (channels,).
        d: Largest absolute value of E Q - 1, (layers,); only the bound E Q <= 1 + d is used if ``v`` is None.
        v: Largest variance of Q, (layers,); None if no kurtosis was declared.
        clean: Result of the calibration; None from a checkpoint alone.
        unit: What one observation is.
        observations: Number of observations in the calibration.
        digest: Digest of the model's weights and statistics.
        examples: Number of examples in one observation of unit "batch" if calibrated; else 0.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    mean: Tensor
    std: Tensor
    delta: Tensor
    kappa: Tensor
    d: Tensor
    v: Tensor | None
    clean: CleanObservations | None
    unit: str
    observations: int
    digest: str
    examples: int = 0

    @property
    def source(self) -> str:
        """ "checkpoint" or "calibrated"."""
        return "checkpoint" if self.clean is None else "calibrated"

    @property
    def center(self) -> Tensor:
        """Expected z of each channel, (channels,)."""
        return torch.zeros_like(self.mean) if self.clean is None else self.clean.scores.center

    @property
    def spread(self) -> Tensor:
        """Typical distance of z from ``center``, (channels,)."""
        return self.kappa.sqrt() if self.clean is None else self.clean.scores.spread

    @property
    def power(self) -> Tensor:
        """Expected energy of each channel, (channels,)."""
        return torch.ones_like(self.mean) if self.clean is None else self.clean.scores.power

    def of_layers(self, of_channels: Tensor) -> Tensor:
        """Mean over each layer's channels: (n, channels) -> (n, layers)."""
        return by_layer.mean(of_channels, self.sizes)

    def digest_of_bounds(self) -> str:
        """SHA-256 of all tensors of the reference; it differs between calibrations of a model on different data."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def furthest(self, z: Tensor, q: Tensor) -> float | None:
        """Largest distance of a principal component from its center beyond its tolerance, in sd of one observation.

        It is negative if no component is beyond its tolerance (see ``batchnorm.shift.principal_components``).

        Args:
            z: Channel means, (channels,), averaged over observations.
            q: Energies of channels, (channels,), averaged over observations.

        Returns:
            None if the spread of single examples is unknown: from a checkpoint alone, or if the unit is not "example".
        """
        if self.clean is None or self.unit != "example":
            return None
        components = self.clean.scores.components
        distances = (components.of(z[None], (q / self.power)[None])[0] - components.center).abs() - components.delta
        return float((distances / components.kappa.sqrt()).max())

    @classmethod
    def from_checkpoint(
        cls,
        model: nn.Module,
        layers: dict[str, _BatchNorm],
        *,
        unit: str,
        batch: int = _BATCH,
        kurtosis: float | None = None,
    ) -> Reference:
        """The bounds from a model's stored statistics, without any data.

        Args:
            model: The digest is computed from its state_dict.
            layers: Layers that store statistics, by name, in forward order if it is known.
            unit: What one observation is.
            batch: Examples in a training batch; the precision of stored statistics depends on it.
            kurtosis: Largest fourth moment of standardized inputs on clean data, 3 for normal inputs. None: not known;
                the precision of stored variances is computed with 3.

        Raises:
            TypeError: If ``batch`` is not a whole number.
            ValueError: If ``batch`` is below 1.
        """
        require_whole_number(batch, "batch", "Leave it out for the default.")
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, got {batch}. Give the number of examples in a training batch.")
        mean, std = (torch.cat(parts) for parts in zip(*map(_stored, layers.values()), strict=True))
        sizes = torch.tensor([channels_of(layer) for layer in layers.values()])
        errors = torch.tensor([_error(layer, batch) for layer in layers.values()], dtype=torch.float64)
        d = (errors * ((kurtosis or NORMAL) - 1) ** 0.5).clamp_min(_LEAST_ERROR)
        return cls(
            layers=tuple(layers), sizes=tuple(sizes.tolist()), mean=mean, std=std,
            delta=errors.clamp_min(_LEAST_ERROR).repeat_interleave(sizes), kappa=(1 + d).repeat_interleave(sizes),
            d=d, v=None if kurtosis is None else kurtosis - (1 - d).clamp_min(0).square(),
            clean=None, unit=unit, observations=0, digest=digest_of(model.state_dict()),
        )  # fmt: skip

    def calibrated(self, z: Tensor, q: Tensor, *, tolerance: float = _TOLERANCE) -> Reference:
        """The same layers, with clean observations for comparison.

        Args:
            z: Channel means in stored standard deviations, (observations, channels).
            q: Energies of channels, (observations, channels).
            tolerance: Movement of principal components, in sd, that an alarm's hint ignores.

        Raises:
            ValueError: If there are fewer than 200 observations, or some of them are not finite.
        """
        if (m := len(z)) < LEAST:
            raise ValueError(
                f"calibrate needs {LEAST} clean observations or more, got {m}. Give more examples, or do not "
                "calibrate: the checkpoint alone is a reference."
            )
        if not bool(z.isfinite().all()) or not bool(q.isfinite().all()):
            raise ValueError(
                "calibrate needs finite activations, got NaN or infinity. Look for the examples that cause it."
            )
        return replace(self, clean=CleanObservations.of(self.sizes, z, q, tolerance=tolerance), observations=m)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that ends in .bncal.safetensors; a failed write leaves no part of it.

        Raises:
            ValueError: If the name has another ending.
            OSError: If the file cannot be written.
        """
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        names = ("layers", "sizes", "source", "unit", "observations", "digest", "examples")
        about = {name: getattr(self, name) for name in names}
        FILE.write(path, about, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read a file that ``save`` wrote.

        Raises:
            ValueError: If the file is damaged, or of another kind or version.
            OSError: If the file cannot be read.
        """
        about, tensors = FILE.read(path)
        try:
            sizes = tuple(about.pop("sizes"))
            own = {name: tensors.get(name) for name in _TENSORS}
            clean = CleanObservations.of_tensors(sizes, tensors) if about.pop("source") == "calibrated" else None
            fields: dict[str, Any] = own | about | {"layers": tuple(about["layers"])}
            if (reference := cls(sizes=sizes, clean=clean, **fields))._is_whole():
                return reference
        except (AttributeError, KeyError, TypeError, RuntimeError):
            pass
        raise ValueError(f"{path} is a damaged reference: parts are missing or out of range. Calibrate again.")

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by their names in a file."""
        own = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        return own if self.clean is None else own | self.clean.tensors()

    def _is_whole(self) -> bool:
        """Whether every bound exists for every channel and layer, and is in range."""
        layers, channels = len(self.sizes), sum(self.sizes)
        tensors = self.tensors()
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("mean", "std", "delta", "kappa"), (channels,))
        shapes |= dict.fromkeys(("d",) if self.v is None else ("d", "v"), (layers,))
        if self.clean is not None:
            shapes |= clean_observations.shapes(self.sizes)
        sized = tensors.keys() == shapes.keys() and all(tensors[name].shape == shape for name, shape in shapes.items())
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        signed = {"mean", *clean_observations.SIGNED}
        positive = all(bool((tensor > 0).all()) for name, tensor in tensors.items() if name not in signed)
        counted = sized and (self.clean is None or self.clean.bag.is_whole)
        counted &= (self.examples > 0) == (self.clean is not None and self.unit == "batch")
        return counted and finite and positive and layers == len(self.layers)

    def check(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Refuse a model that the reference does not belong to.

        Raises:
            ValueError: If layers, weights or statistics differ from those that the reference was made with.
        """
        if tuple(layers) != self.layers:
            raise ValueError(
                f"the reference has {len(self.layers)} layers ({', '.join(self.layers[:3])}, ...), got a model with "
                f"{len(layers)} layers, whose names or order differ. Give the reference of this model."
            )
        if digest_of(model.state_dict()) != self.digest:
            raise ValueError(
                "the reference is stale: weights or statistics of the model changed since it was made. Calibrate again."
            )


_TENSORS = ("mean", "std", "delta", "kappa", "d", "v")


def _stored(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert has_stored_statistics(layer)  # noqa: S101 - the monitor selects such layers only
    mean, var = layer.running_mean, layer.running_var
    mean, var = (cast("Tensor", whole(x)).double().cpu() for x in (mean, var) if x is not None)  # also from a DTensor
    return mean, (var + eps_of(layer)).sqrt()


def _error(layer: _BatchNorm, batch: int) -> float:
    """Three standard errors of a stored mean, in sd of an example; 0 for momentum None, the mean over all batches."""
    momentum = getattr(layer, "momentum", _USUAL_MOMENTUM) or 0.0  # frozen layers of other libraries lack the attribute
    return 3 * (momentum / ((2 - momentum) * batch)) ** 0.5
