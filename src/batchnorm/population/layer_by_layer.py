"""Exact statistics: measures each layer after all layers before it are finished, in execution order.

In ``lock_step`` the forward of every batch waits at each layer until that layer is finished, so one pass over the data
is enough, except for a few forwards that check the model and batches for which the memory is too small. Lock step
is used if it is certain that waiting does not change the result. Otherwise each layer costs a pass that ends at the
layer (a full pass if the model is sharded), after one pass that finds the order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from batchnorm.argument_types import require_whole_number
from batchnorm.moments import Moments
from batchnorm.population.free_memory import free_memory
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.lock_step import LockStep, why_not
from batchnorm.population.observation import Observation, execution_order
from batchnorm.population.pool import UnsuitedError
from batchnorm.population.stored_statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchnorm.population.lock_step import Finish

_SHARE = 0.5  # share of the free memory that waiting forwards may use


@final
class LayerMoments(dict[str, Moments]):
    """Moments of the inputs of each layer, by dotted path, in execution order.

    Attributes:
        restarted: The reason why each layer needed its own pass, as words that can follow "because"; "" if one pass was
            enough.
    """

    def __init__(self, found: Mapping[str, InputMoments] | None = None, restarted: str = "") -> None:
        super().__init__({path: _by_channel(each.moments) for path, each in (found or {}).items()})
        self.restarted = restarted


def _by_channel(moments: Moments) -> Moments:
    return Moments(moments.count.expand(moments.shape).clone(), moments.mean, moments.m2)


def require_memory(memory: int | None) -> None:
    """Refuse a value that is not a number of bytes.

    Raises:
        TypeError: If ``memory`` is neither None nor a whole number.
        ValueError: If ``memory`` is negative.
    """
    if memory is None:
        return
    require_whole_number(memory, "memory", "Give bytes, or None for half of what is free.")
    if memory < 0:
        raise ValueError(
            f"memory must be a number of bytes, 0 or more, got {memory}. Use None for half of what is free."
        )


def measured(observation: Observation, finish: Finish, memory: int | None) -> tuple[dict[str, InputMoments], str]:
    """Moments of each layer's inputs while the layers before it normalize by the statistics that ``finish`` stored.

    Args:
        observation: The model, its layers and its data.
        finish: Called with a layer's path and the moments of its inputs, in execution order.
        memory: Most bytes of memory for waiting forwards; None for half of the free memory on the model's device. The
            result is the same, bit for bit, with any ``memory``.

    Returns:
        The moments by path, and why forwards were restarted for each layer; "" if they were not restarted.

    Raises:
        ValueError: If a channel gets fewer than 2 finite values.
    """
    stored, pool, finished = Statistics.of(observation.layers), observation.pool, observation.finished
    why = "memory=0 lets no forward wait" if memory == 0 else why_not(observation.model)
    if not pool.reason(finished.restarted or why):
        limit = int(free_memory(observation.batches.device) * _SHARE) if memory is None else memory
        found, why = _in_lock_step(LockStep(observation, stored, limit), finish)
        if not pool.reason(why):
            return found, ""
        stored.put(observation.layers)
        finished.begin_again(pool.reason(""))
    finished.restarted = pool.reason("")
    return _with_restarts(observation, finish), finished.restarted


def _in_lock_step(forwards: LockStep, finish: Finish) -> tuple[dict[str, InputMoments], str]:
    """The moments, and "" if waiting has changed nothing; otherwise {} and the reason."""
    try:
        return forwards.measure(finish), ""
    except UnsuitedError as error:
        return {}, str(error)


def _with_restarts(observation: Observation, finish: Finish) -> dict[str, InputMoments]:
    """Moments of the inputs, from one pass that finds the order, and one pass for each layer, which ends at the layer.

    If any layer is called more than once in a forward, there are two passes for each layer. A sharded model's passes
    run to their end.
    """
    traces = observation.pool.orders(observation.run(lambda *_: None))
    order = execution_order(traces)
    most = {path: max(trace.count(path) for trace in traces) for path in order}
    moments: dict[str, InputMoments] = {}
    # If a layer is called several times, its later calls see results of earlier calls. So each layer first stores the
    # statistics of its first call, which do not depend on its old statistics; then all calls are measured.
    for first_only in [True, False] if max(most.values(), default=0) > 1 else [False]:
        for path in order:
            moments[path] = _of_layer(observation, path, finish, 1 if first_only else most[path], first_only=first_only)
    return moments


def _of_layer(observation: Observation, path: str, finish: Finish, calls: int, *, first_only: bool) -> InputMoments:
    """The moments of one layer's inputs, measured in a pass or kept from an earlier run."""
    kept = observation.kept(path, first_only=first_only)
    if kept is not None:
        finish(path, kept)
        return kept
    own = observation.with_inputs_of(path, InputMoments(), calls=calls)
    _, found = observation.pooled([path], own)
    observation.require_variance(path, found.moments)
    finish(path, found)
    observation.keep(path, found, first_only=first_only)
    return found
