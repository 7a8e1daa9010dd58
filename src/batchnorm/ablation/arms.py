"""The arms: one model, made four times with different normalization.

All arms have the same parameters and, for one seed, the same initial weights:

    with       y = gamma (x - mu_B) / sqrt(var_B + eps) + beta      batch norm as it is in the model
    without    y = gamma x + beta                                   the same parameters, no statistics
    once       y = gamma (x - mu_0) / sqrt(var_0 + eps) + beta      mu_0, var_0 of the first training batch, fixed
    scaled     as ``without``, with an InputNorm before the model

The last arm exists only if the input is one floating-point tensor of two or more axes (``effort`` has all conditions).
In the last three arms the layers are frozen: for ``without`` and ``scaled`` they store mean 0 and variance 1 - eps, for
``once`` the statistics of the first batch. So the other parts of a layer (an activation, a residual) still work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.ablation.user_data import Data, inputs_of
from batchnorm.ablation.user_model import Subject
from batchnorm.call_types import Batch
from batchnorm.inputs import InputNorm
from batchnorm.layers import batch_norms
from batchnorm.moments import Moments
from batchnorm.population.batches import call
from batchnorm.population.freezing import freeze, has_stored_statistics
from batchnorm.population.hooks import seeing

WITH, WITHOUT, ONCE, SCALED = "with", "without", "once", "scaled"
CALLED = {
    WITH: "with batch norm",
    WITHOUT: "without batch norm",
    ONCE: "normalized once",
    SCALED: "with normalized inputs only",
}


def make_arm(subject: Subject, arm: str, seed: int) -> nn.Module:
    """A new model for an arm, with the initial weights that the seed gives, in train mode."""
    model = subject.fresh(seed)
    if arm == ONCE:
        fix(model, next(subject.data.deal(seed)))
    elif arm in {WITHOUT, SCALED}:
        strip(model)
    if arm == SCALED:
        normalize_inputs(model, subject.data)
    return model


def strip(model: nn.Module) -> None:
    """Make every batch norm layer compute gamma x + beta."""
    for layer in batch_norms(model).values():
        _store(layer, torch.zeros(layer.num_features), torch.full((layer.num_features,), 1.0 - layer.eps))
    freeze(model)


def fix(model: nn.Module, batch: Batch) -> None:
    """Freeze every batch norm layer with the statistics that its inputs have on this batch.

    The model runs once, in its present mode (train mode in ``make_arm``). The stored variance is the biased one, as in
    train mode, so on this batch the outputs stay the same, except for rounding. They change if a layer is called
    several times (the statistics of its calls are pooled), or if the forward draws random numbers. A layer that does
    not run keeps its statistics; if it has none, it gets mean 0 and variance 1.
    """
    moments: dict[str, Moments] = {}

    def see(path: str, _: nn.Module, x: Tensor) -> None:
        moments[path] = moments.get(path, Moments.empty()) + Moments.of(x.detach())

    layers = batch_norms(model)
    with seeing(layers, see), torch.no_grad():
        call(model, batch)
    for path, layer in layers.items():
        if path in moments:
            _store(layer, moments[path].mean, moments[path].var)
        elif not has_stored_statistics(layer):  # a layer that did not run
            _store(layer, torch.zeros(layer.num_features), torch.ones(layer.num_features))
    freeze(model)


def normalize_inputs(model: nn.Module, data: Data) -> None:
    """Put an InputNorm of the training data in front of the model."""
    norm = input_norm(data)

    def hook(_: nn.Module, args: tuple) -> tuple:
        return (norm(args[0]), *args[1:])

    model.register_forward_pre_hook(hook)


def input_norm(data: Data) -> InputNorm:
    """Normalization of each feature, (N, F), or channel, (N, C, ...), by the training data."""
    inputs = [inputs_of(batch) for batch in data.train]
    return InputNorm.from_moments(sum((Moments.of(x) for x in inputs if x is not None), Moments.empty()))


def _store(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    if has_stored_statistics(layer):
        pair = (layer.running_mean, mean), (layer.running_var, var)
        with torch.no_grad():
            for buffer, value in pair:
                assert buffer is not None  # noqa: S101 - has_stored_statistics has checked it
                buffer.copy_(value)
        return
    like = next((t for t in layer.parameters() if t.is_floating_point()), torch.empty(0))
    layer.track_running_stats = True
    layer.running_mean, layer.running_var = (t.to(like.device, torch.float32) for t in (mean, var))
