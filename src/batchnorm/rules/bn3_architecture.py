"""BN3: where a layer stands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Severity, Unknown
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.checkpoint.stored import Checkpoint, Shared
    from batchnorm.rules.rule_evidence import Evidence


def bias_before_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """A bias right before batch norm has no effect.

    Why:
        Batch norm subtracts the mean, and the bias with it. Its gradient is zero but for rounding; it takes memory,
        time and, with weight decay, attention.

    How:
        A convolution or linear layer with a bias, called at one place, whose result only this layer reads, in the
        traced code. Silent for frozen layers: what they subtract does not move with the bias.

    Example:
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)

    Fix:
        bias=False in the layer before. For a trained model leave it, or let batchnorm.fold take it in.

    References:
        Ioffe and Szegedy 2015, section 3.2.
    """
    for name, producer in evidence.graph.biased.items() if evidence.graph else ():
        if (module := (evidence.modules or {}).get(name)) and module.frozen:
            continue
        yield Finding(name, f"{producer!r} before it has a bias", remedy=f"bias=False in {producer!r}")


def shared_layer(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """One layer is used at several places and mixes their statistics.

    Why:
        Each place has a distribution of its own. Train mode normalizes each by its own batch; eval mode normalizes
        all of them by one average over the places, which fits none.

    How:
        The layer was called more than once in one forward pass; or, where calls are not known, it is registered
        under several names. In a file of torch.save: two names of one state whose mean and variance are the same bytes
        of the file. That proves one layer, not two calls. So it is only told as info where the weight before the
        layer, or the module around it, is stored once as well: then the names may be two ways to one call, as in
        self.body = self.encoder.body. In an ONNX file: nodes that have the same four tensors
        and normalize different inputs. safetensors has no sharing to be seen.

    Example:
        x = self.bn(self.conv1(x)); x = self.bn(self.conv2(x))

    Fix:
        A layer for each place. They may share gamma and beta: second.weight = first.weight.

    References:
        Cooijmans et al. 2017, "Recurrent Batch Normalization": statistics for each time step.
    """
    calls = evidence.graph.calls if evidence.graph else None
    if evidence.graph and evidence.stored and calls is None:
        yield Unknown("", "needs an example to count calls")
    calls = calls or {}
    names = evidence.structure.names if evidence.structure else {}
    for name in evidence.stored if evidence.graph else ():
        # two names may be two ways to one call
        if (count := calls.get(name, len(names.get(name, ())))) > 1:
            yield Finding(name, f"used at {count} places")
    if evidence.file and not evidence.graph:
        yield from (_stored_once(shared, evidence.file) for shared in evidence.file.shared)


def _stored_once(shared: Shared, file: Checkpoint) -> Finding:
    """What a file proves, and what it does not: that one layer has several names, not that each of them is called."""
    names = [file.shown(name) for name in shared.names]
    if shared.is_called:
        return Finding(
            names[0],
            f"it normalizes different inputs at {len(names)} places: {listed(names)}",
            consequence="Statistics of one layer that runs at several places are a mixture that fits none of them.",
            severity=Severity.WARNING,
        )
    what = "one layer" if shared.layers == 1 else f"{shared.layers} layers, stored once,"
    mixture = "the stored statistics are a mixture that fits none of the places."
    found = Finding(
        names[0],
        f"{what} under {len(names)} names: {listed(names)}",
        limit="one place for each layer",
        consequence=f"If each of them is called, {mixture}",
    )
    if not shared.is_alias:
        return found
    return replace(
        found,
        limit="one name, or names of one call",
        consequence="Harmless if the names are two ways to the same call. If each is called on inputs of its "
        f"own, {mixture}",
        remedy="count its calls: batchnorm doctor model.py:make_model --data data.py:loader",
        severity=Severity.INFO,
    )


def dropout_before_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """Dropout right before batch norm makes train and eval variances differ.

    Why:
        Dropout keeps the mean and raises the variance in train mode. Stored statistics are those of train mode, so
        eval mode divides by a standard deviation that its inputs do not have.

    How:
        A dropout module with p > 0 whose result goes to the layer, directly or through an activation.

    Example:
        nn.Dropout(0.5), nn.BatchNorm1d(256): eval inputs have 1 / sqrt(2) of the stored standard deviation or more.

    Fix:
        Put dropout behind the last batch norm layer, or batchnorm.recalibrate(model, loader), which measures in
        eval mode.

    References:
        Li, Chen, Hu and Yang 2019, "Understanding the Disharmony between Dropout and Batch Normalization".
    """
    for name, dropout in evidence.graph.behind_dropout.items() if evidence.graph else ():
        yield Finding(name, f"{dropout!r} before it")


def batch_norm_twice(evidence: Evidence) -> Iterator[Finding]:
    """Batch norm follows batch norm.

    Why:
        The first one's gamma and beta are normalized away: the second computes what it would have computed alone,
        but for eps.

    How:
        A layer whose input is another layer's result, in the traced code.

    Example:
        nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    Fix:
        Remove the first one.
    """
    for name, first in evidence.graph.behind_batch_norm.items() if evidence.graph else ():
        yield Finding(name, f"its input is the result of {first!r}", remedy=f"remove {first!r}")
