"""Reference: what clean data look like to the batch norm layers, from the checkpoint alone or calibrated.

A trained model carries the mean and variance that it was trained with. They bound what one observation's mean z (in
stored standard deviations) and energy Q do on clean data, with tolerances for how exact stored statistics are:

*checkpoint only*: Var(z) <= 1 by the law of total variance, so kappa = 1.1; |E z| within the larger of 0.1 and
3 sqrt(a / ((2 - a) B)) for momentum a and training batches of B examples; E Q within 0.1 of 1, and a coefficient of
variation of Q of at most 1.

*calibrated*, from m >= 200 clean observations: center and variance of each channel's z and of each layer's Q, measured,
with the tolerance 0.02 and measurement errors added to the means, and to the variances their own. Errors are so many
standard errors that with 95 % no mean of all channels, layers and components is further off (Bonferroni, for normal
errors): 3.9 for 100 channels, 5 for 20,000.
Positions of an image are alike, but not all the same, so its mean varies far less than the pooled variance says. The
same is measured of components, in which neighbouring channels do not vary together (``components``).

Conditions, both ways: observations are what ``unit`` says, and none of them is predictable from the ones before beyond
these bounds. A checkpoint whose statistics are stale, or of batches under 32, breaks the first set: run the doctor.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from batchnorm import sidecar
from batchnorm.foreign import channels_of, eps_of
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensors import digest_of
from batchnorm.shift.components import Components, axes_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn.modules.batchnorm import _BatchNorm

VERSION = 2
SUFFIX = ".bncal.safetensors"
LEAST = 200  # observations to calibrate with
_BATCH = 64  # examples in a training batch, where nobody says
_KAPPA, _DELTA, _ENERGY, _ENERGY_VAR = 1.1, 0.1, 0.1, 1.0
_TOLERANCE = 0.02
_CONFIDENCE = 0.95  # that all measured means are within their errors
# relative standard error of a variance of m values of kurtosis 6.5, half as much again as of normal ones
_VARIANCE_ERROR = 1.5


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Bounds of the null for all layers, side by side, on the CPU in float64.

    Args:
        layers: Names.
        sizes: Channels of each layer.
        mean: Stored mean of each channel, (channels,).
        std: Stored standard deviation, sqrt(var + eps), (channels,).
        center: Expected z of each channel, (channels,).
        kappa: Largest variance of z, (channels,).
        delta: Largest distance of E z from its center, (channels,).
        energy: Expected energy of each layer, (layers,).
        d: Largest relative distance of E Q from it, (layers,).
        v: Largest variance of Q in units of it, (layers,).
        power: Expected energy of each channel, (channels,); this and the next two are of no use uncalibrated.
        power_d: Largest relative distance of it, (channels,).
        power_v: Largest variance of it in units of it, (channels,).
        components: Of neighbouring channels; None uncalibrated.
        source: "checkpoint" or "calibrated".
        unit: What one observation was.
        observations: How many it was calibrated with.
        digest: Of the weights and statistics that it belongs to.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    mean: Tensor
    std: Tensor
    center: Tensor
    kappa: Tensor
    delta: Tensor
    energy: Tensor
    d: Tensor
    v: Tensor
    power: Tensor
    power_d: Tensor
    power_v: Tensor
    components: Components | None
    source: str
    unit: str
    observations: int
    digest: str

    def of_layers(self, of_channels: Tensor) -> Tensor:
        """Mean over each layer's channels: (n, channels) -> (n, layers)."""
        return torch.stack([part.mean(1) for part in of_channels.split(list(self.sizes), 1)], 1)

    def digest_of_bounds(self) -> str:
        """SHA-256 of all that was measured: another calibration of the same model has another one."""
        digest = hashlib.sha256()
        for tensor in self._tensors().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def furthest(self, z: Tensor, q: Tensor) -> float | None:
        """How far the component that moved most did, in sd of an observation and beyond its tolerance.

        Args:
            z: Channel means, (channels,), averaged over observations.
            q: Energies of channels, likewise.

        Returns:
            None where no example's spread was measured: from a checkpoint alone, and with other units.
        """
        if (of := self.components) is None or self.unit != "example":
            return None
        moved = of.of(z[None], (q / self.power)[None])[0].abs() - of.delta
        return float((moved / of.kappa.sqrt()).max())

    @classmethod
    def from_checkpoint(
        cls, model: nn.Module, layers: dict[str, _BatchNorm], *, unit: str, batch: int = _BATCH
    ) -> Reference:
        """What a model's stored statistics promise, without any data.

        Args:
            model: Whose weights the digest is of.
            layers: Layers that store statistics, by name, in forward order if it is known.
            unit: What one observation is.
            batch: Examples in a batch of the training, which the exactness of stored means depends on.
        """
        mean, std = (torch.cat(parts) for parts in zip(*map(_stored, layers.values()), strict=True))
        sizes = tuple(channels_of(layer) for layer in layers.values())
        delta = torch.cat(
            [torch.full((n,), _exactness(layer, batch)) for n, layer in zip(sizes, layers.values(), strict=True)]
        )
        of_layer, of_channel = torch.ones(len(sizes), dtype=torch.float64), torch.ones_like(mean)
        return cls(
            layers=tuple(layers), sizes=sizes, mean=mean, std=std,
            center=torch.zeros_like(mean), kappa=_KAPPA * of_channel, delta=delta.double(),
            energy=of_layer, d=_ENERGY * of_layer, v=_ENERGY_VAR * of_layer,
            power=of_channel, power_d=of_channel, power_v=of_channel,
            components=None, source="checkpoint", unit=unit, observations=0, digest=digest_of(model.state_dict()),
        )  # fmt: skip

    def calibrated(self, z: Tensor, q: Tensor, *, tolerance: float = _TOLERANCE) -> Reference:
        """The same layers with bounds measured on clean observations.

        Args:
            z: Channel means in stored standard deviations, (observations, channels).
            q: Energies of channels, (observations, channels).
            tolerance: What means may move without an alarm, in sd and as a share of the energy.

        Raises:
            ValueError: If there are fewer than 200 observations, or some of them are not finite.
        """
        m = len(z)
        if m < LEAST:
            raise ValueError(
                f"calibrate needs {LEAST} clean observations or more, got {m}. Give more examples, or leave it out: "
                "the checkpoint alone is a reference."
            )
        if not bool(z.isfinite().all()) or not bool(q.isfinite().all()):
            raise ValueError(
                "calibrate needs finite activations, got NaN or infinity. Look for the examples that cause it."
            )
        bounds = _Bounds(tolerance, _errors(4 * z.shape[1] + len(self.sizes)))
        measured = {
            **dict(zip(("center", "delta", "kappa"), bounds.of(z), strict=True)),
            **dict(zip(("energy", "d", "v"), bounds.of_energy(self.of_layers(q)), strict=True)),
            **dict(zip(("power", "power_d", "power_v"), bounds.of_energy(q), strict=True)),
        }
        components = Components.measured(self.sizes, z, q / measured["power"], bounds.of)
        return replace(
            self,
            **measured,
            components=components,
            source="calibrated",
            observations=m,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all, as a safetensors file that ends in .bncal.safetensors.

        Raises:
            ValueError: If the name ends otherwise.
            OSError: If it cannot be written.
        """
        path = Path(path)
        if not path.name.endswith(SUFFIX):
            raise ValueError(
                f"a reference needs a file that ends in {SUFFIX}, got {path.name!r}. Name it model{SUFFIX}."
            )
        tensors = {name: tensor.clone() for name, tensor in self._tensors().items()}
        about = {name: getattr(self, name) for name in ("layers", "sizes", "source", "unit", "observations", "digest")}
        sidecar.write(path, "reference", {"version": VERSION, **about}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If the file is something else, or of a newer version.
            OSError: If it cannot be read.
        """
        try:
            about, tensors = sidecar.read(path, "reference")
        except ValueError as error:
            raise ValueError(f"{path} is no reference: {error}. Make one with monitor.calibrate(loader).") from error
        version = about.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path} is no reference of version {VERSION}, got {version}. Calibrate again.")
        try:
            sizes = tuple(about.pop("sizes"))
            of_components = {name: tensors.pop(f"components.{name}", None) for name in _OF_COMPONENTS}
            has_components = about["source"] == "calibrated"
            components = Components(sizes, **of_components) if has_components else None  # pyrefly: ignore
            fields: dict[str, Any] = tensors | about | {"layers": tuple(about["layers"])}
            if (known := cls(sizes=sizes, components=components, **fields))._is_whole():
                return known
        except (AttributeError, KeyError, TypeError, RuntimeError):
            pass
        raise ValueError(f"{path} is a damaged reference: parts are missing or out of range. Calibrate again.")

    def _tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a file."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        if self.components is not None:
            tensors |= {f"components.{name}": getattr(self.components, name) for name in _OF_COMPONENTS}
        return tensors

    def _is_whole(self) -> bool:
        """Whether every bound is there, for every channel and layer, and is one."""
        layers, channels = len(self.sizes), sum(self.sizes)
        tensors = self._tensors()
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, (channels,))
        shapes |= dict.fromkeys(("energy", "d", "v"), (layers,))
        if self.components is not None:
            shapes |= {f"components.{name}": (2 * channels,) for name in _OF_COMPONENTS}
            shapes["components.axes"] = axes_shape(self.sizes)
        sized = all(tensors[name].shape == shape for name, shape in shapes.items())
        finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
        either = ("mean", "center", "components.center", "components.axes")  # sign; all others are positive
        positive = all(bool((tensor > 0).all()) for name, tensor in tensors.items() if name not in either)
        return sized and finite and positive and layers == len(self.layers)

    def check(self, model: nn.Module, layers: Sequence[str]) -> None:
        """Refuse a model that it does not belong to.

        Raises:
            ValueError: If layers, weights or statistics differ from those that it was made with.
        """
        if tuple(layers) != self.layers:
            raise ValueError(
                f"the reference has {len(self.layers)} layers ({', '.join(self.layers[:3])}, ...), the model has "
                f"{len(layers)} others. Give the reference of this model."
            )
        if digest_of(model.state_dict()) != self.digest:
            raise ValueError(
                "the reference is stale: weights or statistics of the model changed since it was made. Calibrate again."
            )


@final
@dataclass(frozen=True, slots=True)
class _Bounds:
    """What clean observations say about their law.

    Args:
        tolerance: Added to the errors of means.
        errors: Standard errors that are allowed for.
    """

    tolerance: float
    errors: float

    def of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, its tolerance and the largest variance of observations, (n, k) -> (k,) each."""
        var, n = x.var(0), len(x)
        widened = var * (1 + self.errors * _VARIANCE_ERROR * (2 / n) ** 0.5)
        least = torch.finfo(torch.float32).eps
        return x.mean(0), self.tolerance + self.errors * (var / n).sqrt(), widened.clamp_min(least)

    def of_energy(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean of energies, its tolerance and the largest variance in units of it."""
        mean = q.mean(0).clamp_min(torch.finfo(torch.float32).tiny)
        _, d, v = self.of(q / mean)
        return mean, d, v


def _errors(bounds: int) -> float:
    """Standard errors within which so many means are at once."""
    return NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / (2 * bounds))


_TENSORS = ("mean", "std", "center", "kappa", "delta", "energy", "d", "v", "power", "power_d", "power_v")
_OF_COMPONENTS = ("axes", "center", "delta", "kappa")


def _stored(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert has_stored_statistics(layer)  # noqa: S101 - the monitor takes no others
    mean, var = layer.running_mean, layer.running_var
    return mean.detach().double().cpu(), (var.detach().double().cpu() + eps_of(layer)).sqrt()  # type: ignore[union-attr]


def _exactness(layer: _BatchNorm, batch: int) -> float:
    """Three standard deviations of a stored mean as an exponential average has them, at least 0.1."""
    momentum = getattr(layer, "momentum", None) or 0.0
    return max(_DELTA, 3 * (momentum / ((2 - momentum) * batch)) ** 0.5)
