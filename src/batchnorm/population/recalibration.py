"""recalibrate: the exact mean and variance of every batch norm layer's input over a data set.

Running averages of training lag behind the weights, give small batches the weight of large ones, and depend on the last
few batches. A model should be tested with the statistics of the whole data set under its final weights (Ioffe and
Szegedy 2015, algorithm 2, lines 7 to 12). Layers are measured in execution order, while the layers before them
normalize by the statistics measured for them. This is the arithmetic of test time, so the result depends neither on
batch sizes nor on the order of the examples.
"""

from __future__ import annotations

import warnings
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, distributed, nn

from batchnorm.argument_types import require_callable, require_flag
from batchnorm.layers import batch_norms
from batchnorm.other_libraries import as_sentence, live_layers, out_of_reach, unreached
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batch_rows import settle
from batchnorm.population.batches import Batches, call, device_of
from batchnorm.population.eager import uncompiled
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.fingerprint import fingerprint
from batchnorm.population.freezing import statistics_of
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.layer_by_layer import LayerMoments, measured, require_memory
from batchnorm.population.observation import Observation
from batchnorm.population.pool import Pool
from batchnorm.population.resumption import finished_before
from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.state_shield import preserve_state
from batchnorm.population.stored_statistics import buffers, open_layers, put, store
from batchnorm.population.tensor_memory import require
from batchnorm.processes import group_named, is_alone

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup
    from torch.nn.modules.batchnorm import _BatchNorm

    from batchnorm.call_types import Batch
    from batchnorm.population.batches import Forward


def recalibrate(
    model: nn.Module,
    loader: Iterable[Batch],
    max_examples: int | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    exact: bool = True,
    memory: int | None = None,
    group: ProcessGroup | Literal["all"] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> LayerMoments:
    """Replace stored statistics by those of the given data; return the moments of each layer's input, by dotted path.

    Each layer's statistics are the moments of its input over all examples while the layers before it normalize by
    their own new statistics and the model is in eval mode (dropout off). Every value counts once, so the result
    is that of one huge batch: it does not depend on the order or sizes of batches, even if each has one example.

    Only ``running_mean``, ``running_var`` (unbiased, torch's convention) and ``num_batches_tracked`` (set to the number
    of inputs measured) of the measured layers change, in place and at the very end. An exception or Ctrl-C leaves the
    model bit-identical, and random states, training flags, momentum and dropout are as before. Layers without stored
    statistics, frozen layers, and layers in eval mode inside a model in train mode are not measured; they normalize as
    in eval mode.

    If forwards can be paused, the cost is about one pass over the data plus three forwards: each forward pauses at the
    next layer that is not measured until the forwards of all batches have reached it. The first batch shows whether the
    model allows this; at the end the first two batches show whether pausing changed any layer's input. If the model
    does not allow it, ``restarted`` of the result says why; for example, a forward calls a layer several times, draws
    random numbers or changes attributes of the model, weights are sharded or offloaded, or greenlet is not installed.
    The cost is then one full pass to find the execution order, and for each layer one pass that ends at it: for L
    layers about (L + 1) / 2 + 1 full passes of computing, and L + 1 passes of loading. For a sharded model every pass
    is a full pass. The result is the same, bit for bit.

    Every pass starts from the same random state, so a loader that shuffles or augments returns the same examples each
    time. A generator or another one-shot iterator is read into memory first. If a layer is called several times in one
    forward, the inputs of all its calls are pooled; for such a model the first calls of all layers are measured first,
    at twice the cost.

    With ``exact=False`` one pass is enough: each layer normalizes every batch by that batch's own statistics, as in
    train mode, and the moments are pooled by count (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section
    3, PreciseBN). The first layer gets the same result as with ``exact=True``. Inputs of later layers have the noise of
    batch statistics, so the results of these layers depend on the batch size and are biased for small batches.

    With ``group`` the data are those of all its ranks. Every rank must call this, with its own loader, and the result
    is that of one process with all batches, to rounding: for each layer the moments of all ranks are merged in float64
    in rank order, so all ranks store the same bits. Loaders may differ in length and batch size, and may be empty if
    another one is not. Examples that DistributedSampler or accelerate repeats, so that all ranks have equally many, do
    not count if torch's or transformers' functions make the batches.

    The ranks compare settings, layers, parameters and buffers before they read the data. An error or Ctrl-C on one rank
    raises an error on all, and every model stays bit-identical. If a rank ends or hangs, the others raise an error, on
    gloo within the group's timeout. ``memory`` is per rank; if one rank cannot pause its forwards, all restart theirs.
    Without ``group`` a process waits for no other.

    A forward of a sharded model (FSDP) takes all ranks, so ranks with fewer batches repeat their first batch, which
    does not count. Each rank needs a batch, the group must be that of the shards, and ``max_examples`` cuts no batch.

    Args:
        model: The model; only its stored statistics are changed, in place.
        loader: Batches. A tensor is passed to the model. From a tuple or list the model gets the first element, or as
            many as ``model.forward`` requires, or the whole tuple as one argument if ``forward`` unpacks this argument
            or annotates it as a tuple or list. A mapping, named tuple or dataclass is passed whole if ``forward`` has
            one required argument and indexes it by these names or annotates it with the batch's class. Otherwise it is
            passed by name if it has all names that ``forward`` requires, or, for a mapping, if ``forward`` accepts all
            its names. Otherwise a named tuple is treated as a tuple, and other batches are passed whole. If ``forward``
            allows two of these ways, the second is tried when the first raises an AttributeError, TypeError, ValueError
            or LookupError. Anything else is passed whole. Tensors are moved to the model's device, batch objects by
            their ``to``.
        max_examples: Stop after this many examples. With a ``group`` this is the number of all ranks: each uses an
            equal share, and other ranks do not replace what one lacks. The last batch is cut to its first rows. It is
            used whole if its tensors have different first axes, or if the model's outputs for the first rows alone are
            not those that these rows get within the whole batch.
        forward: Called as ``forward(model, batch)`` instead of the rules above.
        device: Device to which batches are moved; by default that of the model's first parameter or buffer that is not
            on the meta device.
        exact: False for the one-pass estimate described above.
        memory: Most bytes of memory for paused forwards; None for half of the free memory on the device. If they do not
            fit, the remaining batches run again for each layer; 0 runs all batches again. The result is the same, bit
            for bit.

        group: The processes whose data count: "all", or a ``ProcessGroup`` such as torch.distributed.group.WORLD; None
            for this process alone. "all" without an initialized process group is this process alone.
        resume: A file ending in .safetensors, to which each finished layer is written, with an OSError if that fails.
            If the process is killed, the same call measures only the layers that were not finished, and the result has
            the same bits if the loader gives the same batches. A file of another model, other settings, another first
            batch or another number of batches is refused. With a ``group`` the first rank alone reads and writes it.
            It stays when all layers are finished: delete it after the model is saved. Not for ``exact=False``.

    Returns:
        Moments of each measured layer, float64, in execution order, by dotted path; ``restarted`` says why forwards
        were restarted for each layer, "" if they were not. A model without layers to measure gives {}.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``loader`` is not an iterable of batches, another argument has
            a wrong type, or a layer to measure is complex.
        ValueError: If there is no batch, a channel gets fewer than 2 finite values, a statistic does not fit the
            buffer's dtype, ``max_examples`` is below 1, or is given and a batch contains no tensors by which to count
            examples, a second pass over ``loader`` gives another number of batches, ``memory`` is negative, or tensors
            that a pass needs have no values here (sharded, freed, fake, on the meta device); if the process is not in
            ``group``, or is in none; if the file of ``resume`` belongs to another measurement.
        RuntimeError: On every rank, if models or settings differ between the ranks; on the others, if one rank has an
            error; if an exchange fails.

    Warns:
        RuntimeWarning: By path, about layers that no forward reached (they keep their statistics), about batch norm
            that is not a layer (scripted, exported, called as a function), and about batches with NaN or infinity
            (excluded, as a whole, for the affected channels), with the ranks that have them. If there is no layer to
            measure, it says so, and why. If there are several processes and no ``group``, it says whose data count.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> recalibrate(model, [torch.tensor([[0.0], [2.0]]), torch.tensor([[7.0]])])
        {'0': Moments(count=[3], mean=[3], std=[2.94])}
        >>> model[0].running_var
        tensor([13.])
    """
    pool = Pool(group_named(group))
    with pool.all_or_none():
        require_real(model, "recalibrate")
        require_flag(exact, "exact")
        require_memory(memory)
        if forward is not None:
            require_callable(forward, "recalibrate needs a function forward(model, batch)", "Or leave it out.")
        at = device_of(model) if device is None else torch.device(device)
        batches = Batches(loader, max_examples, at, part=pool.part)
        layers = open_layers(model, {**batch_norms(model), **live_layers(model)}, "recalibrate")
        require(statistics_of(layers), "recalibrate")
        settings = {"exact": bool(exact), "max_examples": max_examples, "resume": resume is not None}
        things = fingerprint(model, layers, settings) if pool.is_shared or resume is not None else {}
        pool.require_same(things)
        pool.batches = batches
        view = Observation("recalibrate", model, layers, batches, forward or call, pool)
        if resume is not None and layers:
            view.finished = finished_before(view, resume, things, exact=exact)
        moments, restarted = _measured(view, forward, memory, exact=exact) if layers else ({}, "")
        _warn(view, moments, has_all_data=group is not None or is_alone(), stacklevel=2)
    with torch.no_grad():
        put(chain.from_iterable(_new_values(layers[path], each) for path, each in moments.items()))
    return LayerMoments(moments, restarted)


def _measured(
    view: Observation, forward: Forward | None, memory: int | None, *, exact: bool
) -> tuple[dict[str, InputMoments], str]:
    """The moments of all layers, and why forwards were restarted; afterwards the model is as it was."""
    with preserve_state(view.model), torch.no_grad(), uncompiled():
        to_eval(view.model)
        if view.pool.is_shared and is_sharded(view.model):
            view.batches.has_rows = False  # only some ranks have a batch to cut, and a forward needs all
        else:
            settle(view.batches, view.model, forward)
        moments, restarted = measured(view, partial(_finish, view), memory) if exact else (_in_one_pass(view), "")
    view.finished.require(view.pool.counts)
    if not moments:
        view.pool.require_batches(view.batches.count or 0)
    return moments, restarted


def _finish(view: Observation, path: str, found: InputMoments) -> None:
    """Let a layer normalize by the measured moments of its input."""
    mean, var = found.moments.mean, found.moments.unbiased_var
    view.require_fit(path, mean, var)
    store(view.layers[path], mean, var)


def _in_one_pass(view: Observation) -> dict[str, InputMoments]:
    """Measure every layer in one pass, each batch normalized by its own statistics."""

    def by_its_own(path: str, batch: InputMoments) -> None:
        # eval mode with the batch's statistics: like train mode, but also for one value per channel
        store(view.layers[path], batch.moments.mean, batch.moments.var)

    moments = view.in_one_pass(by_its_own)
    for path, each in moments.items():
        view.require_variance(path, each.moments)
        view.require_fit(path, each.moments.mean, each.moments.unbiased_var)
    return moments


def _new_values(layer: _BatchNorm, found: InputMoments) -> list[tuple[Tensor, Tensor]]:
    """Each buffer of a layer with its new value."""
    values = list(zip(buffers(layer), (found.moments.mean, found.moments.unbiased_var), strict=True))
    counter = getattr(layer, "num_batches_tracked", None)
    return values if counter is None else [*values, (counter, torch.tensor(found.inputs))]


def _warn(view: Observation, found: dict[str, InputMoments], *, has_all_data: bool, stacklevel: int) -> None:
    """Warn about all that the result lacks, such as the data of other processes."""
    if not view.layers:
        message = (
            "recalibrate measured nothing: the model has no batch norm layer that stores statistics and is not frozen. "
            f"Unfreeze its layers, or leave the call out.{unreached(view.model)}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
        return
    view.warn(found, "batches, or a forward=, that use them", stacklevel=stacklevel + 1)
    if no_layers := out_of_reach(view.model):
        reasons = as_sentence(no_layers)
        message = f"recalibrate did not reach all batch norm: {reasons}."
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
    if not has_all_data:
        message = (
            f"recalibrate measured the data of rank {distributed.get_rank()} alone, one of "
            f"{distributed.get_world_size()} processes; the other ranks did not take part. Call it on every rank with "
            'group="all" for the statistics of the data of all ranks. If one rank has all the data, '
            "batchnorm.broadcast_statistics(model) then gives its statistics to the others."
        )
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)
