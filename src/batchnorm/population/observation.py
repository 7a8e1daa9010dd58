"""Observation: what batch norm layers receive while a model runs over data, for everybody who needs to know.

It says which layers are seen, on which batches, and how the model is called. ``layer_by_layer`` has the exact
statistics, each layer behind finished ones; here is what one pass gives.
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
from batchnorm.population.hooks import seeing
from batchnorm.population.state_shield import preserve_random_state
from batchnorm.population.stored_statistics import buffers
from batchnorm.population.tensor_trees import examples_in

if TYPE_CHECKING:
    from batchnorm.population.batches import Forward
    from batchnorm.population.stored_statistics import Layers

# what is done with an input: the layer's path, the input, and how often this forward entered the layer before
Look = Callable[[str, Tensor, int], None]
_LEAST = 2  # values that have a variance


class EndForward(BaseException):
    """Ends a forward whose remaining layers are not needed; no Exception, so that models do not catch it."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class InputMoments:
    """Moments of a layer's inputs; a channel of an input with NaN or infinity is left out.

    Args:
        moments: Of the finite channels of each input; float64, the count one number where no channel was left out.
        inputs: Inputs with a finite channel.
        spoiled: Inputs with a channel that was left out.
        left_out: The channels that were left out of an input, (C,); False if none was.
        values: For each channel, those left out among them.
    """

    moments: Moments = field(default_factory=Moments.empty)
    inputs: int = 0
    spoiled: int = 0
    left_out: Tensor | bool = False
    values: int = 0

    @classmethod
    def of(cls, x: Tensor) -> InputMoments:
        """Those of one input, (N, C, ...)."""
        all_ = Moments.of(x)
        finite = torch.isfinite(all_.mean) & torch.isfinite(all_.m2)
        is_spoiled = bool(x.numel()) and not bool(finite.all())
        values = x.numel() // max(1, x.shape[1])
        if not is_spoiled:
            return cls(all_, int(x.numel() > 0), values=values)
        # a count of 0 makes `+` take nothing from a channel
        moments = Moments(torch.where(finite, all_.count, 0.0), all_.mean, all_.m2)
        return cls(moments, int(finite.any()), 1, ~finite, values)

    def __add__(self, new: InputMoments) -> InputMoments:
        """Those of both; the order matters to the last bit."""
        return InputMoments(
            self.moments + new.moments,
            self.inputs + new.inputs,
            self.spoiled + new.spoiled,
            self.left_out | new.left_out,
            self.values + new.values,
        )


@final
@dataclass(eq=False)
class Observation:
    """A model, whose layers are seen on which batches.

    Args:
        who: The function that asks, for its messages.
        model: Run as it is; who asks puts it into eval mode, and its state back.
        layers: By path.
        batches: Run over once for each pass, each time from the same random state.
        forward: Called with the model and a batch.
        examples: In the batches of the last whole pass.
    """

    who: str
    model: nn.Module
    layers: Layers
    batches: Batches
    forward: Forward = call
    examples: int = 0

    def run(self, look: Look, *, skip: int = 0) -> list[tuple[str, ...]]:
        """One pass over the data; the distinct sequences in which forwards entered the layers.

        Args:
            look: Gets each input before the layer uses it; it may raise ``EndForward``.
            skip: Leading batches that the model does not run on.
        """
        entered: Counter[str] = Counter()
        trace: list[str] = []
        traces: dict[tuple[str, ...], None] = {}
        self.examples = 0

        def see(path: str, _: nn.Module, x: Tensor) -> None:
            trace.append(path)
            entered[path] += 1
            look(path, x, entered[path] - 1)

        with seeing(self.layers, see), preserve_random_state(*self.batches.generators):
            for index, batch in enumerate(self.batches):
                self.examples += examples_in(batch) or 0
                if index < skip:
                    continue
                trace.clear()
                entered.clear()
                self.end_early(batch)
                traces[tuple(trace)] = None
        return list(traces)

    def end_early(self, batch: object) -> None:
        """Run the model on a batch, to its end or until somebody raises ``EndForward``."""
        # ``call`` names what is absent by itself
        with suppress(EndForward), nullcontext() if self.forward is call else named_absences(self.model):
            self.forward(self.model, batch)

    def in_one_pass(self, store: Callable[[str, InputMoments], None]) -> dict[str, InputMoments]:
        """The inputs of all layers in one pass; ``store`` gets each input's moments before the layer uses it."""
        found: dict[str, InputMoments] = {}

        def look(path: str, x: Tensor, _: int) -> None:
            new = InputMoments.of(x)
            found[path] = found.get(path, InputMoments()) + new
            store(path, new)

        return {path: found[path] for path in execution_order(self.run(look))}

    def require_variance(self, path: str, moments: Moments) -> None:
        """Refuse moments of fewer values than have a variance.

        Raises:
            ValueError: If a channel has fewer than 2.
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
            ValueError: If one of them is not finite in the buffer's dtype.
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
            found: What was measured.
            remedy: What to give in order to reach all layers.
            stacklevel: As ``warnings.warn`` counts it for the caller of this.
        """
        if missed := [path for path in self.layers if path not in found]:
            paths = ", ".join(map(repr, missed))
            message = f"no forward reached {paths}: they keep the statistics that they had. Give {remedy}."
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
        spoiled = [
            f"{path!r} (inputs: {each.spoiled}, channels: {int(each.left_out.sum())} of {each.left_out.numel()})"
            for path, each in found.items()
            if isinstance(each.left_out, Tensor)
        ]
        if spoiled:
            message = (
                f"NaN or infinity in the input of {', '.join(spoiled)}: these batches were left out for these "
                "channels. Look for the examples that cause it."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


def execution_order(traces: list[tuple[str, ...]]) -> list[str]:
    """The layers in an order that agrees with every forward; that of first calls where forwards contradict."""
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
