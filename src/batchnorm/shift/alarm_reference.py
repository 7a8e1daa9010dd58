"""Reference: what clean data look like to the batch norm layers, from the checkpoint alone or calibrated.

*checkpoint only*: a trained model carries the mean and variance that it was trained with. With z a channel's mean in
one observation, in stored standard deviations, and Q a layer's energy, they promise of clean data

    |E[z | past]| <= delta,     Var(z | past) <= kappa,     E[Q | past] <= 1 + d.

The variance of an observation's mean cannot exceed that of its values (law of total variance), so kappa = 1 + d, where
d says how exact stored variances are; delta says so of stored means. Both are 0.1, or three standard errors of an
exponential average with momentum a over batches of B examples, which is worth n = B (2 - a) / a examples:

    delta = max(0.1, 3 / sqrt(n)),     d = max(0.1, 3 sqrt((k - 1) / n)),

with k = 3, the kurtosis of normal values, or the one that is declared. An average over few batches misses examples
that are rare and large: where there are such, recalibrate first, or declare their kurtosis. Nothing stored bounds from
below what rare examples add, so that less energy is evidence only where ``kurtosis`` is declared: then Var(Q) <= k -
(1 - d)^2.

*calibrated*, from 200 clean observations or more: nothing is assumed of their law. What is observed is compared with
them by rank (``conformal``, ``scores``); all that the promise needs is that clean observations to come are
exchangeable with them.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor, nn

from batchnorm.files import sidecar
from batchnorm.other_libraries import channels_of, eps_of
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.population.tensor_memory import digest_of, whole
from batchnorm.shift import by_layer, clean_observations
from batchnorm.shift.clean_observations import Clean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn.modules.batchnorm import _BatchNorm

VERSION = 3
SUFFIX = ".bncal.safetensors"
LEAST = 200  # observations to calibrate with
_BATCH = 64  # examples in a training batch, where nobody says
_USUAL_MOMENTUM = 0.1
_EXACT = 0.1  # what stored statistics may be off by, at least
NORMAL = 3.0  # kurtosis
_TOLERANCE = 0.02


@final
@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Bounds of the null for all layers, side by side, on the CPU in float64.

    Args:
        layers: Names.
        sizes: Channels of each layer.
        mean: Stored mean of each channel, (channels,).
        std: Stored standard deviation, sqrt(var + eps), (channels,).
        delta: Largest distance of E z from 0, (channels,); this and the next three are of no use where calibrated.
        kappa: Largest variance of z, (channels,).
        d: Largest excess of E Q over 1, (layers,).
        v: Largest variance of Q, (layers,); None without a declared kurtosis.
        clean: What calibration learned; None from a checkpoint alone.
        unit: What one observation was.
        observations: How many it was calibrated with.
        digest: Of the weights and statistics that it belongs to.
        examples: How many made one observation of unit "batch" where calibrated; 0 else.
    """

    layers: tuple[str, ...]
    sizes: tuple[int, ...]
    mean: Tensor
    std: Tensor
    delta: Tensor
    kappa: Tensor
    d: Tensor
    v: Tensor | None
    clean: Clean | None
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
        """About the distance of z from it, (channels,)."""
        return self.kappa.sqrt() if self.clean is None else self.clean.scores.spread

    @property
    def power(self) -> Tensor:
        """Expected energy of each channel, (channels,)."""
        return torch.ones_like(self.mean) if self.clean is None else self.clean.scores.power

    def of_layers(self, of_channels: Tensor) -> Tensor:
        """Mean over each layer's channels: (n, channels) -> (n, layers)."""
        return by_layer.mean(of_channels, self.sizes)

    def digest_of_bounds(self) -> str:
        """SHA-256 of all that was measured: another calibration of the same model has another one."""
        digest = hashlib.sha256()
        for tensor in self.tensors().values():
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
        if self.clean is None or self.unit != "example":
            return None
        of = self.clean.scores.components
        moved = (of.of(z[None], (q / self.power)[None])[0] - of.center).abs() - of.delta
        return float((moved / of.kappa.sqrt()).max())

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
        """What a model's stored statistics promise, without any data.

        Args:
            model: Whose weights the digest is of.
            layers: Layers that store statistics, by name, in forward order if it is known.
            unit: What one observation is.
            batch: Examples in a batch of the training, which the exactness of stored statistics depends on.
            kurtosis: The largest fourth moment of standardized inputs on clean data, 3 for normal ones; None declares
                none, and takes 3 for the exactness of stored variances.
        """
        mean, std = (torch.cat(parts) for parts in zip(*map(_stored, layers.values()), strict=True))
        sizes = torch.tensor([channels_of(layer) for layer in layers.values()])
        errors = torch.tensor([_error(layer, batch) for layer in layers.values()], dtype=torch.float64)
        d = (errors * ((kurtosis or NORMAL) - 1) ** 0.5).clamp_min(_EXACT)
        return cls(
            layers=tuple(layers), sizes=tuple(sizes.tolist()), mean=mean, std=std,
            delta=errors.clamp_min(_EXACT).repeat_interleave(sizes), kappa=(1 + d).repeat_interleave(sizes),
            d=d, v=None if kurtosis is None else kurtosis - (1 - d).clamp_min(0).square(),
            clean=None, unit=unit, observations=0, digest=digest_of(model.state_dict()),
        )  # fmt: skip

    def calibrated(self, z: Tensor, q: Tensor, *, tolerance: float = _TOLERANCE) -> Reference:
        """The same layers, with clean observations to compare with.

        Args:
            z: Channel means in stored standard deviations, (observations, channels).
            q: Energies of channels, (observations, channels).
            tolerance: What components may move, in sd, before a hint says that they did.

        Raises:
            ValueError: If there are fewer than 200 observations, or some of them are not finite.
        """
        if (m := len(z)) < LEAST:
            raise ValueError(
                f"calibrate needs {LEAST} clean observations or more, got {m}. Give more examples, or leave it out: "
                "the checkpoint alone is a reference."
            )
        if not bool(z.isfinite().all()) or not bool(q.isfinite().all()):
            raise ValueError(
                "calibrate needs finite activations, got NaN or infinity. Look for the examples that cause it."
            )
        return replace(self, clean=Clean.of(self.sizes, z, q, tolerance=tolerance), observations=m)

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
        tensors = {name: tensor.clone() for name, tensor in self.tensors().items()}
        names = ("layers", "sizes", "source", "unit", "observations", "digest", "examples")
        about = {name: getattr(self, name) for name in names}
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
            own = {name: tensors.get(name) for name in _TENSORS}
            made = Clean.of_tensors(sizes, tensors) if about.pop("source") == "calibrated" else None
            fields: dict[str, Any] = own | about | {"layers": tuple(about["layers"])}
            if (known := cls(sizes=sizes, clean=made, **fields))._is_whole():
                return known
        except (AttributeError, KeyError, TypeError, RuntimeError):
            pass
        raise ValueError(f"{path} is a damaged reference: parts are missing or out of range. Calibrate again.")

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by their names in a file."""
        own = {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}
        return own if self.clean is None else own | self.clean.tensors()

    def _is_whole(self) -> bool:
        """Whether every bound is there, for every channel and layer, and is one."""
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


_TENSORS = ("mean", "std", "delta", "kappa", "d", "v")


def _stored(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert has_stored_statistics(layer)  # noqa: S101 - the monitor takes no others
    mean, var = layer.running_mean, layer.running_var
    mean, var = (cast("Tensor", whole(x)).double().cpu() for x in (mean, var) if x is not None)  # of a DTensor too
    return mean, (var + eps_of(layer)).sqrt()


def _error(layer: _BatchNorm, batch: int) -> float:
    """Three standard errors of a stored mean, in sd of an example, as an exponential average has them."""
    momentum = getattr(layer, "momentum", _USUAL_MOMENTUM) or 0.0  # a frozen layer of another library does not say
    return 3 * (momentum / ((2 - momentum) * batch)) ** 0.5
