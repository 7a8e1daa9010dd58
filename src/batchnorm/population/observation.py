"""Observation: runs a model over data and passes on every input of its batch norm layers.

An ``Observation`` consists of the layers, the batches and the way to call the model. ``layer_by_layer`` computes exact
statistics, one layer after another; this file measures in one pass.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from batchnorm.moments import Moments
from batchnorm.population.absent_numbers import named_absences
from batchnorm.population.batches import Batches, call
from batchnorm.population.finished_layers import FinishedLayers, Step
from batchnorm.population.hooks import seeing
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.pool import Place, Pool
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.stored_statistics import buffers
from batchnorm.population.tensor_trees import examples_in

if TYPE_CHECKING:
    from batchnorm.population.batches import Forward
    from batchnorm.population.stored_statistics import Layers

# called for each input with the layer's path, the input, and how often this forward has entered the layer before
Look = Callable[[str, Tensor, int], None]
_LEAST = 2  # values needed for a variance


class EndForward(BaseException):
    """Ends a forward whose remaining layers are not needed; not an Exception, so that models do not catch it."""


@final
@dataclass(eq=False)
class Observation:
    """A model, its observed layers, and the batches that it runs on.

    Args:
        who: The caller's name in messages.
        model: The model, run as it is; the caller sets eval mode and restores the model's state.
        layers: The observed layers, by path.
        batches: The batches, repeated for each pass, each time from the same random state.
        forward: Called with the model and a batch.
        pool: The processes whose batches count together.
        finished: The layers that need not be measured again.
        examples: Number of examples in this process's batches of the last pass, skipped ones included.
    """

    who: str
    model: nn.Module
    layers: Layers
    batches: Batches
    forward: Forward = call
    pool: Pool = field(default_factory=Pool)
    finished: FinishedLayers = field(default_factory=FinishedLayers)
    examples: int = 0

    def run(self, look: Look, *, skip: int = 0) -> list[tuple[str, ...]]:
        """One pass over the data; returns the distinct sequences in which forwards entered the layers.

        Args:
            look: Called with each input before the layer uses it; it may raise ``EndForward``.
            skip: Number of leading batches that the model does not run on.
        """
        entered: Counter[str] = Counter()
        trace: list[str] = []
        traces: dict[tuple[str, ...], None] = {}
        self.examples = 0
        counts = True

        def see(path: str, _: nn.Module, x: Tensor) -> None:
            trace.append(path)
            entered[path] += 1
            if counts:
                look(path, x, entered[path] - 1)

        with seeing(self.layers, see, without_padding=True), preserve_random_state(*self.batches.generators):
            in_step = self.pool.in_step(self.batches, is_collective=is_sharded(self.model))
            for index, (batch, counts) in enumerate(in_step):
                self.examples += counts * (examples_in(batch) or 0)
                if index < skip:
                    continue
                trace.clear()
                entered.clear()
                self.end_early(batch)
                traces[tuple(trace)] = None
        return list(traces)

    def end_early(self, batch: object) -> None:
        """Run the model on a batch, to its end or until ``EndForward`` is raised."""
        # ``call`` names missing values itself
        with suppress(EndForward), nullcontext() if self.forward is call else named_absences(self.model):
            self.forward(self.model, batch)

    def with_inputs_of(self, wanted: str, found: InputMoments, *, calls: int = 1, skip: int = 0) -> InputMoments:
        """Moments ``found`` plus those of one layer's inputs, from a pass that ends there unless the model is sharded.

        Args:
            wanted: The layer's path.
            found: Moments of earlier batches.
            calls: Number of the layer's calls in each forward that count.
            skip: Number of leading batches that the model does not run on.
        """
        may_end = not is_sharded(self.model)

        def look(path: str, x: Tensor, before: int) -> None:
            nonlocal found
            if path != wanted or before >= calls:
                return
            found += InputMoments.of(x)
            if may_end and before + 1 == calls:
                raise EndForward

        self.run(look, skip=skip)
        return found

    def in_one_pass(self, store: Callable[[str, InputMoments], None]) -> dict[str, InputMoments]:
        """Moments of all layers' inputs in one pass; ``store`` gets those of an input before the layer uses it."""
        moments: dict[str, InputMoments] = {}

        def look(path: str, x: Tensor, _: int) -> None:
            new = InputMoments.of(x)
            moments[path] = moments.get(path, InputMoments()) + new
            store(path, new)

        order = self.order(self.run(look))
        return {path: self.pooled([path], moments.get(path, InputMoments()))[1] for path in order}

    def order(self, traces: list[tuple[str, ...]]) -> list[str]:
        """The execution order over the forwards of all processes; ``traces`` are those of this process."""
        return execution_order(self.pool.orders(traces))

    def pooled(self, places: list[Place], own: InputMoments) -> tuple[list[Place], InputMoments]:
        """As ``Pool.merged``, with the moments on the layer's device."""
        everywhere, moments = self.pool.merged(places, own)
        if len(everywhere) != 1 or (path := everywhere[0]) is None:
            return everywhere, moments
        return everywhere, moments.to(buffers(self.layers[path])[0].device) if self.pool.is_shared else moments

    def keep(self, path: str, found: InputMoments, *, first_only: bool = False) -> None:
        """Write a finished layer to the file of finished layers, if there is one."""
        step = Step(path, first_only, found.to("cpu"), self.pool.spoiled.get(path, []))
        self.finished.add(step, self.pool.counts)

    def kept(self, path: str, *, first_only: bool = False) -> InputMoments | None:
        """The moments of a layer from that file; None if it has not finished before."""
        if (step := self.finished.found(path, first_only=first_only)) is None:
            return None
        self.pool.spoiled[path] = step.spoiled_on
        return step.found.to(buffers(self.layers[path])[0].device)

    def require_variance(self, path: str, moments: Moments) -> None:
        """Refuse moments of too few values for a variance.

        Raises:
            ValueError: If a channel has fewer than 2 finite values.
        """
        counts = moments.count.expand(moments.shape)
        if (few := counts < _LEAST).any():
            channel = int(few.flatten().nonzero()[0])
            raise ValueError(
                f"{self.who} needs at least {_LEAST} finite values per channel, got {int(counts[channel])} in channel "
                f"{channel} of layer {path!r} ({int(few.sum())} of {few.numel()} channels). Give more examples."
            )

    def require_fit(self, path: str, mean: Tensor, var: Tensor) -> None:
        """Refuse statistics that the layer's buffers cannot hold.

        Raises:
            ValueError: If a statistic is not finite in the buffer's dtype.
        """
        for buffer, value in zip(buffers(self.layers[path]), (mean, var), strict=True):
            if not torch.isfinite(value.to(buffer.dtype)).all():
                raise ValueError(
                    f"{self.who} needs statistics that fit the layer's buffers, got {value.abs().max():.3g} for "
                    f"{buffer.dtype} in layer {path!r}. Keep batch norm layers in float32: layer.float()."
                )

    def warn(self, found: dict[str, InputMoments], remedy: str, *, stacklevel: int) -> None:
        """Warn about layers that no forward reached, and about inputs with NaN or infinity.

        Args:
            found: The measured moments.
            remedy: The objects to give in order to reach all layers, such as other batches.
            stacklevel: As in ``warnings.warn``, counted from the caller.
        """
        if missed := [path for path in self.layers if path not in found]:
            paths = ", ".join(map(repr, missed))
            message = f"no forward reached {paths}: they keep their statistics. Give {remedy}."
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
        spoiled = [
            f"{path!r}{self.pool.where_spoiled(path)} (inputs: {each.spoiled}, "
            f"channels: {int(each.left_out.sum())} of {each.left_out.numel()})"
            for path, each in found.items()
            if isinstance(each.left_out, Tensor)
        ]
        if spoiled:
            message = (
                f"NaN or infinity in the input of {', '.join(spoiled)}: these batches were excluded for these "
                "channels. Look for the examples that cause it."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


def execution_order(traces: list[tuple[str, ...]]) -> list[str]:
    """A layer order that agrees with every forward; the order of first calls if forwards contradict each other."""
    firsts = [list(dict.fromkeys(trace)) for trace in traces]
    order = list(dict.fromkeys(chain.from_iterable(firsts)))
    sorter = TopologicalSorter(dict.fromkeys(order, ()))
    for first in firsts:
        for before, after in pairwise(first):
            sorter.add(after, before)
    try:
        return list(sorter.static_order())
    except CycleError:
        return order
