"""adapt: replaces a model's stored statistics by those of shifted inputs, or mixes both.

A network's knowledge is in its weights; its batch norm layers describe its inputs. If only the inputs changed, new
statistics are the whole repair (Li et al. 2016, "Revisiting batch normalization for practical domain adaptation":
AdaBN).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from batchnorm.adaptation.layer_statistics import adaptable, mixed
from batchnorm.argument_types import require_number
from batchnorm.moments import Moments
from batchnorm.population.batch_rows import settle
from batchnorm.population.batches import Batches, device_of
from batchnorm.population.eager import uncompiled
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.input_moments import InputMoments
from batchnorm.population.layer_by_layer import LayerMoments, measured, require_memory
from batchnorm.population.observation import Observation
from batchnorm.population.state_shield import preserve_state
from batchnorm.population.stored_statistics import Statistics, buffers, store

if TYPE_CHECKING:
    from batchnorm.call_types import Batch
    from batchnorm.population.lock_step import Finish


def adapt(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    prior: float | None = None,
    ema: float | None = None,
    max_examples: int | None = None,
    memory: int | None = None,
) -> LayerMoments:
    """Replace a model's stored statistics by those of the given data; return the moments of each layer's inputs.

    Without options the statistics become those of the data, as ``recalibrate`` measures them: layer by layer, dropout
    off, independent of batch sizes and order. Only ``running_mean`` and ``running_var`` change, in place and at the
    very end: not weights, gamma, beta, ``num_batches_tracked``, modes or random states. An exception leaves the model
    bit-identical.

    Frozen layers, and layers in eval mode inside a model in train mode, keep their statistics. Layers of other
    libraries are adapted too, also those that never measure a batch in training (torchvision's and detectron2's
    FrozenBatchNorm2d).

    Args:
        model: The model; only its stored statistics are changed, in place.
        loader: Batches in the forms that ``recalibrate`` accepts; labels are not used.
        prior: Number of examples (not values) that the stored statistics count as; the variance includes the spread
            between stored and measured means (see ``batchnorm.adaptation.layer_statistics``). 0 equals None, infinity
            keeps the stored statistics. Each layer is measured while the layers before it normalize by mixed ones.
        ema: Weight of each batch in an exponential average that starts from the stored statistics, in the loader's
            order; each batch is normalized by statistics that include it (Yuan et al. 2023, "Robust test-time
            adaptation in dynamic scenarios", eq. 5; unlike theirs, the variance includes the spread between means). The
            data are read once.
        max_examples: Stop after this many examples; the last batch is cut to fit if possible, as in ``recalibrate``.
        memory: Most bytes of memory for paused forwards, as in ``recalibrate``; it does not change the result.

    Returns:
        Moments of each layer's inputs by path, float64, in execution order; ``restarted`` as in ``recalibrate``. With
        ``ema`` the moments are of all batches, each normalized by the average at its time.

    Raises:
        TypeError: If ``loader`` is not an iterable of batches, or an option that must be a number is not.
        ValueError: If the model has no layer to adapt, an option is out of range, there is no batch, a channel gets
            fewer than 2 finite values (with ``ema`` fewer are allowed), or a statistic does not fit its buffer.

    Warns:
        RuntimeWarning: About layers that no forward reached, and batches with NaN or infinity.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))  # stores mean 0 and variance 1
        >>> _ = adapt(model, [torch.tensor([[3.0], [5.0]])], prior=2)
        >>> model[0].running_mean, model[0].running_var  # var: (1 + 2) / 2, plus (4 - 0)^2 / 4 between the means
        (tensor([2.]), tensor([5.5000]))
    """
    _check(prior, ema)
    require_memory(memory)
    layers = adaptable(model, "adapt")
    with preserve_state(model), torch.no_grad(), uncompiled():
        view = Observation("adapt", model, layers, Batches(loader, max_examples, device_of(model), who="adapt"))
        to_eval(model)
        settle(view.batches, model)
        if ema is not None:
            moments, restarted = _averaged(view, ema), ""
        else:
            moments, restarted = measured(view, _mixing(view, prior or 0.0), memory)
        new = Statistics.of(layers)
    view.warn(moments, "batches that use them", stacklevel=2)
    new.put(layers)
    return LayerMoments(moments, restarted)


def _mixing(view: Observation, prior: float) -> Finish:
    """A function that stores a layer's new statistics, mixed with ``prior`` examples of its stored ones."""
    stored = Statistics.of(view.layers)

    def finish(path: str, found: InputMoments) -> None:
        # a channel that was excluded from some batches has fewer examples
        examples = view.examples * found.moments.count / max(1, found.values)
        if not math.isinf(prior):
            _store(view, path, mixed((stored.mean[path], stored.var[path]), prior, found.moments, examples))

    return finish


def _averaged(view: Observation, weight: float) -> dict[str, InputMoments]:
    """Moments of all inputs, measured in one pass, in which the layers' statistics become exponential averages."""

    def average(path: str, batch: InputMoments) -> None:
        new = batch.moments
        _store(view, path, mixed(buffers(view.layers[path]), 1 - weight, new, torch.where(new.count > 0, weight, 0.0)))

    return view.in_one_pass(average)


def _store(view: Observation, path: str, new: Moments) -> None:
    view.require_fit(path, new.mean, new.var)
    store(view.layers[path], new.mean, new.var)


@contextmanager
def adapted(
    model: nn.Module, loader: Iterable[Batch], *, prior: float | None = None, ema: float | None = None,
    max_examples: int | None = None, memory: int | None = None,
) -> Iterator[nn.Module]:  # fmt: skip
    """The model, adapted by ``adapt`` in the block; its statistics are restored after it, bit for bit, also on errors.

    Only statistics are restored, not other changes to the model.
    """
    layers = adaptable(model, "adapted")
    before = Statistics.of(layers)
    try:
        adapt(model, loader, prior=prior, ema=ema, max_examples=max_examples, memory=memory)
        yield model
    finally:
        before.put(layers)


def _check(prior: float | None, ema: float | None) -> None:
    for name, value in (("prior", prior), ("ema", ema)):
        if value is not None:
            require_number(value, name, "Leave it out for the statistics of the data alone.")
    if prior is not None and ema is not None:
        raise ValueError("adapt needs prior or ema, got both. Leave one out; ema starts from the stored statistics.")
    if prior is not None and not prior >= 0:
        raise ValueError(f"prior must be a number of examples, 0 or more, got {prior}. 16 is usual.")
    if ema is not None and not 0 < ema <= 1:
        raise ValueError(f"ema must be above 0 and at most 1, got {ema}. 0.05 is usual.")
