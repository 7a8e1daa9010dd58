"""recalibrate: the exact mean and variance of what every batch norm layer receives, over a data set.

The running averages of training lag behind the weights, count small batches like large ones, and hold what the
last few batches happened to be. What a model should be tested with are the statistics of the whole data set
under its final weights (Ioffe and Szegedy 2015, algorithm 2, lines 7 to 12). Layers are measured in execution
order, each with all layers before it normalizing by what was measured of them: the same arithmetic as at test
time, so the answer depends neither on batch sizes nor on the order of the examples.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_callable, require_flag
from batchnorm.layers import batch_norms, input_of
from batchnorm.moments import Moments
from batchnorm.other_libraries import live_layers, out_of_reach, told, unreached
from batchnorm.population.absent_numbers import named_absences, require_real
from batchnorm.population.batch_rows import settle
from batchnorm.population.batches import Batches, call, device_of
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.freezing import Frozen, has_stored_statistics, statistics_of
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.tensor_memory import require, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from torch.nn.modules.batchnorm import _BatchNorm

    Forward = Callable[[nn.Module, Any], object]
    # what a layer received: the paths of the calls before it in this forward, its own path, its input
    See = Callable[[list[str], str, Tensor], None]


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    max_examples: int | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    exact: bool = True,
) -> dict[str, Moments]:
    """The moments that every batch norm layer receives over the data, by dotted path; they are stored in the layers.

    Each layer's statistics are the moments of its input over all examples while the layers before it normalize by
    their own new statistics and the model is in eval mode (dropout off). Every value counts once, so the result
    is that of one huge batch, whatever the batch sizes and their order, down to batches of one example.

    Changed in the model are ``running_mean``, ``running_var`` (unbiased, torch's convention) and
    ``num_batches_tracked`` (inputs measured) of the measured layers, in place and at the very end. Nothing else
    is: an exception or Ctrl-C on the way leaves the model bit-identical, and random states, training flags,
    momentum and dropout are as before. Left alone are layers without stored statistics, frozen layers, and layers
    in eval mode inside a model in train mode; these normalize as they would in eval mode.

    Costs one full pass over the data to find the execution order, and one for each layer that ends at that layer:
    for L layers about (L + 1) / 2 + 1 full passes of computing, and L + 1 of loading. Every pass starts from the
    same random state, so that a loader which shuffles or augments gives the same examples each time. A generator
    or another one-shot iterator is read into memory first. A layer that is called several times in one forward
    pools over its calls; for such a model the first calls of all layers are measured before, at twice the cost.

    With ``exact=False`` one pass is enough: each layer normalizes every batch by that batch's own statistics, as in
    train mode, and the moments are pooled by count (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section
    3, PreciseBN). The first layer gets the same as with ``exact=True``; later ones get inputs that carry the noise
    of batch statistics, so their result depends on the batch size and is biased for small batches.

    Args:
        model: Changed in place, its stored statistics only.
        loader: Batches. A tensor is given to the model; of a tuple or list the first element, or as many as
            ``model.forward`` cannot do without, or all of it where ``forward`` unpacks it or is annotated so. The parts
            of a mapping, named tuple or dataclass are given by name where ``forward`` needs some of these names or
            accepts all; whole where it asks its one argument for them, is annotated with the class, or knows none of
            them, but of a named tuple the first then; the other way if the model fails on the one. Anything else whole.
            Tensors are moved to the model's device, batch objects by their ``to``.
        max_examples: Stop after this many examples; the last batch is cut to fit, unless its rows are no examples:
            tensors differ in their first axis, or the model does not give the part what it gives it in the whole
            batch. Then it is used whole.
        forward: Called as ``forward(model, batch)`` in place of the rules above.
        device: Where batches are moved, if not to the device of the model's first parameter.
        exact: False for the one-pass estimate described above.

    Returns:
        Moments of each measured layer, float64, in execution order. A model without layers to measure gives {}.

    Raises:
        TypeError: If ``model`` is no ``nn.Module``, or ``loader`` not an iterable of batches.
        ValueError: If there is no batch, a channel gets fewer than 2 finite values, a statistic does not fit the
            buffer's dtype, ``max_examples`` is below 1 or cannot be counted, a second pass over ``loader`` gives
            another number of batches, or numbers cannot be read here (sharded, given back, fake, on the meta device):
            stored statistics, or what a pass needs besides.

    Warns:
        RuntimeWarning: By path, about layers that no forward reached (they keep their statistics), about batch norm
            that is no layer (scripted, exported, called as a function), and about batches with NaN or infinity (left
            out, as a whole, for the affected channels). Where there is no layer to measure, about that and why.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[7.0]])])
        {'0': Moments(count=[3], mean=[3], std=[2.94])}
        >>> model[0].running_var
        tensor([13.])
    """
    require_real(model, "recalibrate")
    require_flag(exact, "exact")
    if forward is not None:
        require_callable(forward, "recalibrate needs a function forward(model, batch)", "Or leave it out.")
    batches = Batches(loader, max_examples, device_of(model) if device is None else torch.device(device))
    layers = _open_layers(model)
    if not layers:
        _warn_of_nothing(model)
        return {}
    require(statistics_of(layers), "recalibrate")
    with preserve_state(model), torch.no_grad(), uncompiled():
        to_eval(model)
        settle(batches, model, forward)
        run = partial(_run, model, layers, batches, forward or call)
        gauges = _layer_by_layer(run, layers, may_end=not is_sharded(model)) if exact else _all_at_once(run, layers)
    _report(model, layers, gauges)
    _store_all({layers[path]: gauge for path, gauge in gauges.items()})
    return {path: gauge.moments for path, gauge in gauges.items()}


def uncompiled() -> AbstractContextManager:
    """A block that runs compiled models eagerly: their code was made without our hooks, and may stumble over them."""
    loaded = "torch._dynamo" in sys.modules  # loading the compiler takes seconds, and no compiled model is without it
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _open_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The layers to measure: with stored statistics, and neither frozen nor switched to eval in a training model."""
    return {
        path: layer
        for path, layer in {**batch_norms(model), **live_layers(model)}.items()
        if has_stored_statistics(layer) and not isinstance(layer, Frozen) and (layer.training or not model.training)
    }


@dataclass
class _Gauge:
    """What was measured of a layer's input."""

    moments: Moments = field(default_factory=Moments.empty)
    inputs: int = 0
    poisoned: int = 0  # inputs with a channel that was left out
    channels: Tensor | bool = False  # which channels were ever left out

    def add(self, x: Tensor) -> None:
        new = Moments.of(x)
        finite = torch.isfinite(new.mean) & torch.isfinite(new.m2)
        if x.numel() and not finite.all():
            self.poisoned += 1
            self.channels = self.channels | ~finite
        self.inputs += bool(finite.any())
        # a count of 0 makes `+` take nothing from a channel
        self.moments += Moments(torch.where(finite, new.count, 0.0), new.mean, new.m2)


class _EndForward(BaseException):
    """Ends a forward whose remaining layers are not needed; no Exception, so that models do not catch it."""


def _layer_by_layer(
    run: Callable[[See], list[tuple[str, ...]]], layers: dict[str, _BatchNorm], *, may_end: bool
) -> dict[str, _Gauge]:
    """Each layer measured behind finished ones, in execution order; ``may_end``: by passes that end at the layer."""
    traces = run(lambda before, path, _: before.append(path))
    order = execution_order(traces)
    most = {path: max(trace.count(path) for trace in traces) for path in order}
    gauges = {}
    # where layers are reused, first calls alone give statistics that do not depend on what was stored before
    for first_only in [True, False] if max(most.values(), default=0) > 1 else [False]:
        for path in order:
            gauges[path] = gauge = _Gauge()
            run(partial(_measure, gauge, path, 1 if first_only else most[path], may_end))
            _check(path, layers[path], gauge.moments)
            _store(layers[path], gauge)
    return gauges


def _measure(gauge: _Gauge, wanted: str, calls: int, may_end: bool, before: list[str], path: str, x: Tensor) -> None:
    if path != wanted or len(before) == calls:
        return
    gauge.add(x)
    before.append(path)
    if may_end and len(before) == calls:
        raise _EndForward


def _all_at_once(run: Callable[[See], list[tuple[str, ...]]], layers: dict[str, _BatchNorm]) -> dict[str, _Gauge]:
    """Every layer measured in one pass, each batch normalized by its own statistics."""
    gauges: dict[str, _Gauge] = {}

    def see(before: list[str], path: str, x: Tensor) -> None:
        before.append(path)
        gauges.setdefault(path, _Gauge()).add(x)
        batch = Moments.of(x)
        # eval mode on the batch's statistics: what train mode does, but for one value a channel too
        for buffer, value in zip(_stored(layers[path]), (batch.mean, batch.var), strict=True):
            write(buffer, value)

    gauges = {path: gauges[path] for path in execution_order(run(see))}
    for path, gauge in gauges.items():
        _check(path, layers[path], gauge.moments)
    return gauges


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


def _run(
    model: nn.Module, layers: dict[str, _BatchNorm], batches: Batches, forward: Forward, see: See
) -> list[tuple[str, ...]]:
    """The distinct traces that ``see`` left of the forwards, one pass over the data long."""
    before: list[str] = []
    traces: dict[tuple[str, ...], None] = {}

    def hook(path: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        see(before, path, input_of(args, kwargs))

    handles = [layer.register_forward_pre_hook(partial(hook, path), with_kwargs=True) for path, layer in layers.items()]
    try:
        with preserve_random_state(*batches.generators):
            for batch in batches:
                before.clear()
                with suppress(_EndForward), named_absences(model):
                    forward(model, batch)
                traces[tuple(before)] = None
    finally:
        for handle in handles:
            handle.remove()
    return list(traces)


def _check(path: str, layer: _BatchNorm, moments: Moments) -> None:
    counts = moments.count.expand(moments.shape)
    if (few := counts < 2).any():
        channel = int(few.nonzero()[0])
        raise ValueError(
            f"recalibrate needs at least 2 finite values per channel, got {int(counts[channel])} in channel {channel} "
            f"of layer {path!r} ({int(few.sum())} of {few.numel()} channels). Give more examples."
        )
    for buffer, value in zip(_stored(layer), (moments.mean, moments.unbiased_var), strict=True):
        if not torch.isfinite(value.to(buffer.dtype)).all():
            raise ValueError(
                f"recalibrate needs statistics that fit the layer's buffers, got {value.abs().max():.3g} for "
                f"{buffer.dtype} in layer {path!r}. Keep batch norm layers in float32: layer.float()."
            )


def _stored(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a layer that has them."""
    return cast("tuple[Tensor, Tensor]", (layer.running_mean, layer.running_var))


def _store(layer: _BatchNorm, gauge: _Gauge) -> None:
    for buffer, value in zip(_stored(layer), (gauge.moments.mean, gauge.moments.unbiased_var), strict=True):
        write(buffer, value)
    if (counter := getattr(layer, "num_batches_tracked", None)) is not None:
        write(counter, torch.tensor(gauge.inputs))


@torch.no_grad()
def _store_all(measured: dict[_BatchNorm, _Gauge]) -> None:
    """All layers or, if the user interrupts just now, none."""
    before = [(buffer, buffer.clone()) for layer in measured for buffer in layer.buffers(recurse=False)]
    try:
        for layer, gauge in measured.items():
            _store(layer, gauge)
    except BaseException:
        for buffer, value in before:
            write(buffer, value)
        raise


def _warn_of_nothing(model: nn.Module) -> None:
    warnings.warn(
        "recalibrate measured nothing: the model has no batch norm layer that stores statistics and is not frozen. "
        f"Unfreeze its layers, or leave the call out.{unreached(model)}",
        RuntimeWarning,
        stacklevel=3,
    )


def _report(model: nn.Module, layers: dict[str, _BatchNorm], gauges: dict[str, _Gauge]) -> None:
    missed = [path for path in layers if path not in gauges]
    if missed:
        warnings.warn(
            f"no forward reached {', '.join(map(repr, missed))}: they keep the statistics that they had. "
            "Give batches, or a forward=, that use them.",
            RuntimeWarning,
            stacklevel=3,
        )
    if apart := out_of_reach(model):
        warnings.warn(f"recalibrate did not reach all batch norm: {told(apart)}.", RuntimeWarning, stacklevel=3)
    poisoned = [
        f"{path!r} (inputs: {gauge.poisoned}, channels: {int(gauge.channels.sum())} of {gauge.channels.numel()})"
        for path, gauge in gauges.items()
        if isinstance(gauge.channels, Tensor)
    ]
    if poisoned:
        warnings.warn(
            f"NaN or infinity in the input of {', '.join(poisoned)}: these batches were left out for these channels. "
            "Look for the examples that cause it.",
            RuntimeWarning,
            stacklevel=3,
        )
