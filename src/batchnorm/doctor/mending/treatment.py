"""treat: a copy of a model in which everything is mended that can be mended.

First, settings and values that need no data are mended, by the table of remedies. Then the layers that are still sick
are measured on data; healthy layers keep their statistics. A mended layer changes the inputs of later layers. So layers
whose fault shows without data are measured first. Then the model is examined again, and layers that do not fit their
inputs are measured, until the examination names no further layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.argument_types import require_flag, require_module, require_type
from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.examination import Selection, examine
from batchnorm.doctor.measuring.live_layers import layers_of, stored_of
from batchnorm.doctor.mending.remedies import (
    EPS,
    MEASURED,
    TENSORS,
    Change,
    changed,
    is_same,
    needs_data,
    prescribe,
    remedies,
)
from batchnorm.doctor.mending.torch_files import put
from batchnorm.layers import batch_norms
from batchnorm.population import freeze, recalibrate, unfreeze
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batches import rereadable
from batchnorm.population.freezing import has_stored_statistics
from batchnorm.processes import alone
from batchnorm.rules import RULES
from batchnorm.rules.bn1_stale_statistics import RESIDUE, USUAL_MOMENTUM
from batchnorm.rules.finding import Finding, Fix
from batchnorm.surgery.replacement import duplicate

Model = TypeVar("Model", bound=nn.Module)


def treat(
    model: Model, diagnosis: Diagnosis | None = None, data: Iterable[object] | None = None, *, unsafe: bool = False
) -> Model:
    """A copy of the model in which the findings of a diagnosis are mended, as far as they can be.

    Without data, only remedies are applied that leave eval outputs as they are, up to float32 rounding: for settings of
    training (BN002, BN004, BN007, BN008), variances that are 0 up to rounding (BN103, BN104), and half precision
    statistics if the layer can run with float32 (BN108). With data, the statistics of sick layers are measured again
    over all batches, as ``recalibrate`` does; those of healthy layers stay. Weights outside of batch norm are never
    changed. A second treatment changes nothing.

    Args:
        model: Not changed.
        diagnosis: A diagnosis of this model; by default ``examine(model, data)``. Silenced findings are not treated.
        data: Batches of training data. An iterator is read into memory, because the data are read several times.
        unsafe: Also replace values about which nothing is known, which changes eval outputs. A gamma that is NaN or
            infinite becomes 1, such a beta 0. Without data, impossible statistics become the median of the layer's
            other channels.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``diagnosis`` is not a ``Diagnosis``, or ``unsafe`` is no bool.
        ValueError: If the diagnosis names layers that the model does not have, or as ``recalibrate``.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> sick = nn.Sequential(nn.BatchNorm1d(2))
        >>> _ = sick[0].running_var.fill_(float("nan"))
        >>> treat(sick, data=[torch.tensor([[0.0, 1.0], [2.0, 5.0]])])[0].running_var
        tensor([2., 8.])
    """
    require_module(model, "treat")
    remedy = "Pass what examine(model, data) returns, and batches as data=."
    require_type(diagnosis, (Diagnosis, NoneType), "treat needs a diagnosis", remedy)
    require_flag(unsafe, "unsafe")
    if data is not None:
        require_real(model, "treat")
    batches = rereadable(data)
    new = duplicate(model, "treat", "Use batchnorm.recalibrate and batchnorm.freeze")
    found = examine(model, batches) if diagnosis is None else diagnosis
    _check(new, found.findings)
    mended = _mend(new, found.findings, unsafe=unsafe)
    if batches is not None:
        _measure_sick(new, found, batches, again=mended)
    return new


def differences(
    before: nn.Module, after: nn.Module, findings: Iterable[Finding], *, measured: bool
) -> dict[str, Change]:
    """The changes that a treatment made in the numbers of each layer, with the findings that they mend.

    Args:
        before: The model.
        after: The result of ``treat``.
        findings: The findings that were treated.
        measured: Whether ``treat`` had data.
    """
    old, new, treated = layers_of(before), layers_of(after), list(findings)
    changes = {}
    for path, layer in new.items():
        was, now = stored_of(path, old[path]), stored_of(path, layer)
        if not is_same(was, now):
            words = (_words(finding, measured=measured) for finding in treated if finding.layer in {path, ""})
            applied = tuple(dict.fromkeys(filter(None, words))) or (MEASURED.words,)
            changes[path] = Change(layer=path, before=was, after=now, words=applied, eps=now.eps or EPS)
    return changes


def _words(finding: Finding, *, measured: bool) -> str:
    """The remedy that changed a layer's numbers for a finding, in words; "" if there is none."""
    ways = [remedy for remedy in remedies(finding) if remedy.setting is None]
    if needs_data(finding):
        ways = [remedy for remedy in ways if (remedy.fix is Fix.DATA) is measured and remedy.fix is not Fix.SAFE]
    return f"{finding.code} {ways[0].words}" if ways else ""


def _check(model: nn.Module, findings: Iterable[Finding]) -> None:
    layers = {*layers_of(model), ""}
    for finding in findings:
        if remedies(finding) and finding.layer not in layers:
            raise ValueError(
                f"treat needs a diagnosis of this model, got {finding.code} of {finding.layer!r}, a layer that the "
                "model lacks. Examine this model, or leave the diagnosis out."
            )


def _mend(model: nn.Module, findings: Iterable[Finding], *, unsafe: bool) -> bool:
    """Apply all remedies that need no data, in place; return whether a number changed."""
    findings = list(findings)
    layers = layers_of(model)
    for finding in findings:
        for remedy in remedies(finding):
            if remedy.setting is not None and finding.layer in layers:
                remedy.setting(layers[finding.layer])
    stored = {path: stored_of(path, layer) for path, layer in layers.items()}
    changes = prescribe(stored, findings, lambda path: stored[path].eps or EPS, unsafe=unsafe)
    for path, change in changes.items():
        _store(layers[path], change)
    return bool(changes)


def _store(layer: nn.Module, change: Change) -> None:
    for key in TENSORS:
        dtype, tensor = change.after.dtypes.get(key), getattr(layer, key, None)
        channels = changed(change.before, change.after, key)
        if tensor is None or not isinstance(dtype, str):
            continue
        wide = getattr(torch, dtype)
        if wide != tensor.dtype and not _runs_with(layer, wide):
            wide = tensor.dtype
        if channels or wide != tensor.dtype:
            setattr(layer, key, put(tensor, getattr(change.after, key), channels, wide))


@torch.no_grad()
def _runs_with(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether batch norm runs in both modes with statistics of this type and the layer's gamma and beta."""
    mean, var, weight, bias = (getattr(layer, key) for key in TENSORS)
    x = torch.randn(2, len(mean), device=mean.device).to(mean.dtype if weight is None else weight.dtype)
    try:
        for training in (False, True):
            F.batch_norm(x, mean.to(dtype, copy=True), var.to(dtype, copy=True), weight, bias, training)
    except RuntimeError:
        return False
    return True


def _measure_sick(model: nn.Module, diagnosis: Diagnosis, data: Iterable[object], *, again: bool) -> None:
    """Measure the statistics of sick layers on data, in place, until no other layer is found sick.

    Args:
        model: Changed in place.
        diagnosis: The diagnosis of the model before it was mended.
        data: Batches.
        again: Whether the model has changed since the diagnosis.
    """
    measurable = {path for path, layer in batch_norms(model).items() if has_stored_statistics(layer)}
    # rules that could not run on the sick model may run on the mended one
    selection = Selection(select=(*diagnosis.checked, *diagnosis.not_checked))
    findings = diagnosis.findings
    # a finding on data may be the consequence of an earlier layer's stored values
    sick = _to_measure((finding for finding in findings if "measured" not in RULES[finding.code].needs), measurable)
    if sick:
        _measure(model, sick, data)
    if sick or again:
        findings = examine(model, data, selection=selection).findings
    while more := _to_measure(findings, measurable) - sick:
        sick |= more
        _measure(model, sick, data)
        findings = examine(model, data, selection=selection).findings


def _to_measure(findings: Iterable[Finding], known: set[str]) -> set[str]:
    """Layers that are mended by data; all layers, if a finding is about the whole model."""
    named = {finding.layer for finding in findings if needs_data(finding)}
    return known if "" in named else named & known


def _measure(model: nn.Module, sick: set[str], data: Iterable[object]) -> None:
    """Measure exact statistics of sick layers on a copy, with all other layers frozen; then copy them back."""
    patient = duplicate(model, "treat", "Use batchnorm.recalibrate").eval()
    for path, layer in batch_norms(patient).items():
        if path in sick:
            unfreeze(layer)
        elif has_stored_statistics(layer):
            freeze(layer)
    with alone():
        measured = recalibrate(patient, data)
    layers, copies = batch_norms(model), batch_norms(patient)
    with torch.no_grad():
        for path in measured:
            _take_over(layers[path], copies[path])


def _take_over(layer: _BatchNorm, measured: _BatchNorm) -> None:
    for key in ("running_mean", "running_var"):
        getattr(layer, key).copy_(getattr(measured, key))
    new, old = measured.num_batches_tracked, layer.num_batches_tracked
    if new is not None and old is not None:
        old.fill_(next((n for n in (int(new), int(old)) if not _has_start(n, layer.momentum)), 0))


def _has_start(count: int, momentum: float | None) -> bool:
    """Whether a running average with this counter would still contain its initial values. Exact statistics do not.

    A file does not store momentum, so torch's default is tried too. A counter of 0 makes no claim about an average.
    """
    return momentum is not None and any(abs(1 - m) ** count > RESIDUE for m in (momentum, USUAL_MOMENTUM) if m)
