"""Layers whose calls are normalized by the moments of a whole step, while the model runs on each micro-batch.

A site is one call of a layer in a forward. All forwards of a step have the same sites in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.call_types import Batch
from batchnorm.kernels import Group, Layer, Measured, Running, Sample
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.population.tensor_trees import copied, each_leaf

Options = dict[str, Any]


@final
@dataclass(eq=False)
class LayerCall:
    """One call of a layer in every forward of a step.

    Attributes:
        path: The layer's dotted path.
        values: Number of values of the input for the first micro-batch.
        total: The moments of the inputs of all micro-batches; None until they are measured.
        group: The group of processes that the layer belongs to, or None.
        moves: Whether the layer's stored statistics move.
    """

    path: str
    values: int
    total: Measured | None = None
    group: Group | None = None
    moves: bool = False

    @property
    def moments(self) -> Measured:
        """The moments of the inputs of all micro-batches, which must be known."""
        if self.total is None:
            raise RuntimeError(f"expected the moments of every site, got none of {self.path!r}. Report this error.")
        return self.total


class CallTraining(Protocol):
    """What happens at the sites of one forward."""

    def train(
        self, site: LayerCall, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Measured]:
        """As ``kernels.train_sample``."""
        ...


@final
class JoinedModel:
    """A model whose layers normalize by the moments of all micro-batches of a step.

    Args:
        model: The model.
        layers: Its layers in train mode, by path.
        micros: The micro-batches.
        forward: Calls the model with a micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        micros: Sequence[Batch],
        forward: Callable[[nn.Module, Batch], object],
    ) -> None:
        self.model, self.layers, self.micros, self._forward = model, layers, micros, forward
        self.sites: list[LayerCall] = []
        self.parts = {path: _Part(self, path) for path in layers}
        self._run: CallTraining | None = None
        self._micro = self._calls = 0
        self._is_found = False  # whether all sites are known

    def forward(self, micro: int, run: CallTraining) -> object:
        """The model's output for a micro-batch."""
        self.resume(micro, run, 0)
        output = self._forward(self.model, each_leaf(self.micros[micro], copied))
        if self._is_found and self._calls != len(self.sites):
            self._refuse(f"{self._calls} calls of batch norm layers")
        self._is_found = True
        return output

    def resume(self, micro: int, run: CallTraining, calls: int) -> None:
        """Let ``run`` decide about the next sites; the forward of this micro-batch has passed ``calls`` of them."""
        self._micro, self._run, self._calls = micro, run, calls

    def train(
        self, path: str, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Measured]:
        """The result of a layer in train mode."""
        if is_repeated() or self._run is None:
            raise RuntimeError(
                "step_backward runs a model that recomputes nothing itself, got a forward inside a backward pass. Call "
                "the model without activation checkpointing, and give segments=4 to save memory."
            )
        site = self._next(path, x)
        self._calls += 1
        site.group = options.get("group")
        return self._run.train(site, x, sample, layer, residual, options)

    def moved(self) -> None:
        """Note that the layer of the latest site moves its stored statistics."""
        self.sites[self._calls - 1].moves = True

    def _next(self, path: str, x: Tensor) -> LayerCall:
        if not self._is_found:
            self.sites.append(LayerCall(path, x.numel()))
        if self._calls >= len(self.sites) or self.sites[self._calls].path != path:
            self._refuse(f"call {self._calls} of layer {path!r}")
        return self.sites[self._calls]

    def _refuse(self, got: str) -> None:
        expected = ", ".join(site.path for site in self.sites)
        raise ValueError(
            "step_backward needs micro-batches that run through the same layers in the same order, expected "
            f"{expected}, got {got} for micro-batch {self._micro}. Use batchnorm.step, which needs no order."
        )


@final
class _Part:
    """What a layer asks in place of the kernels."""

    is_joined = True

    def __init__(self, joined: JoinedModel, path: str) -> None:
        self._joined, self._path = joined, path

    def train(
        self, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, **options: Any
    ) -> tuple[Tensor, Measured]:
        return self._joined.train(self._path, x, sample, layer, residual, options)

    def store(self, running: Running, measured: Measured) -> None:  # noqa: ARG002 - stored at the end of the step
        self._joined.moved()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """None: a copy of the layer is not inside the step."""
        return type(None), ()


@final
class OwnMoments:
    """A forward whose sites are normalized by the micro-batch alone: it finds the sites.

    Args:
        look: Called at each site.
    """

    def __init__(self, look: Callable[[], None] | None = None) -> None:
        self._look = look

    def train(
        self, site: LayerCall, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Measured]:
        """As ``kernels.train_sample``, without other processes."""
        site.moves = False
        if self._look is not None:
            self._look()
        return kernels.train_sample(x, sample, layer, residual, adjust=options.get("adjust"))


@final
class StepMoments:
    """A forward whose sites are normalized by the moments of the step, which are constants in the backward pass.

    Args:
        wait: Called with this object at a site whose total is not known; afterwards it is known.
    """

    def __init__(self, wait: Callable[[StepMoments], None] | None = None) -> None:
        self._wait, self._site = wait, LayerCall("", 0)
        self.own: Measured | None = None  # the moments of the micro-batch at the site where it waits

    def train(
        self, site: LayerCall, x: Tensor, sample: Sample, layer: Layer, residual: Tensor | None, options: Options
    ) -> tuple[Tensor, Measured]:
        """As ``kernels.train_sample``, by the moments of the step."""
        self._site = site
        return kernels.train_sample(x, sample, layer, residual, group=self, adjust=options.get("adjust"))

    def union(self, own: Measured) -> Measured:
        """The moments of the step."""
        if self._site.total is None and self._wait is not None:
            self.own = own.detached()
            self._wait(self)
        return self._site.moments

    def total(self, sums: Tensor) -> Tensor:
        """Zeros: the moments are constants."""
        return sums.new_zeros(sums.shape)
