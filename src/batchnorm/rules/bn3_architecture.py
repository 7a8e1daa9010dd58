"""BN3: the place of a layer in the network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Severity, Unknown
from batchnorm.rules.phrases import count_calls, listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from batchnorm.checkpoint.stored import Checkpoint, Shared
    from batchnorm.rules.rule_evidence import Evidence


def bias_before_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """A bias right before batch norm has no effect.

    Why:
        Batch norm subtracts the mean, and the bias with it. The bias has a gradient of zero up to rounding, and costs
        memory and time.

    How:
        In the traced code a convolution or linear layer with a bias is called at one place, and only this layer reads
        the result. Not reported for frozen layers: the mean that they subtract does not follow the bias.

    Example:
        nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)

    Fix:
        bias=False in the layer before. In a trained model leave the bias, or merge it with batchnorm.fold.

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
        Inputs at different places have different distributions. Train mode normalizes each input by its own batch. Eval
        mode normalizes all inputs by one average over the places, which fits none of them.

    How:
        The layer was called more than once in one forward pass; or, if calls are not known, it is registered under
        several names. In a file of torch.save: the mean and variance of two names in one state are the same bytes of
        the file. That proves that both names mean one layer, but not that the layer is called twice. So the severity is
        only info if the weight before the layer, or the module around it, is stored once too. Then the names may be two
        ways to one call, as after self.body = self.encoder.body. In an ONNX file: several nodes use the same four
        tensors and normalize different inputs. A file of safetensors does not show sharing.

    Example:
        x = self.bn(self.conv1(x)); x = self.bn(self.conv2(x))

    Fix:
        One layer for each place. The layers may share gamma and beta: second.weight = first.weight.

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
        remedy = f"count its calls: {count_calls(evidence)}"
        yield from (_stored_once(shared, evidence.file, remedy) for shared in evidence.file.shared)


def _stored_once(shared: Shared, file: Checkpoint, remedy: str) -> Finding:
    """The finding for one layer with several names in a file. torch.save does not prove that each of them is called."""
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
    finding = Finding(
        names[0],
        f"{what} under {len(names)} names: {listed(names)}",
        limit="one place for each layer",
        consequence=f"If each of them is called, {mixture}",
    )
    if not shared.is_alias:
        return finding
    return replace(
        finding,
        limit="one name, or names of one call",
        consequence="Harmless if the names are two ways to the same call. If each is called on inputs of its "
        f"own, {mixture}",
        remedy=remedy,
        severity=Severity.INFO,
    )


def dropout_before_batch_norm(evidence: Evidence) -> Iterator[Finding]:
    """Dropout right before batch norm makes train and eval variances differ.

    Why:
        Dropout keeps the mean and raises the variance in train mode. Stored statistics are those of train mode, so eval
        mode divides by a standard deviation that its inputs do not have.

    How:
        The layer receives the result of dropout with p > 0, a module or a function, directly or through activations,
        pooling or flatten.

    Example:
        nn.Dropout(0.5), nn.BatchNorm1d(256): eval inputs have 1 / sqrt(2) of the stored standard deviation or more.

    Fix:
        Put dropout behind the last batch norm layer; or call batchnorm.recalibrate(model, loader), which measures
        statistics in eval mode.

    References:
        Li, Chen, Hu and Yang 2019, "Understanding the Disharmony between Dropout and Batch Normalization".
    """
    for name, dropout in evidence.graph.behind_dropout.items() if evidence.graph else ():
        yield Finding(name, f"{dropout!r} is before it")


def batch_norm_twice(evidence: Evidence) -> Iterator[Finding]:
    """Batch norm follows batch norm.

    Why:
        The second layer normalizes the gamma and beta of the first one away. Up to eps, it computes the same without
        the first layer.

    How:
        In the traced code the layer's input is the result of another batch norm layer, which nothing else reads.

    Example:
        nn.BatchNorm1d(8), nn.BatchNorm1d(8)

    Fix:
        Remove the first layer.
    """
    for name, first in evidence.graph.behind_batch_norm.items() if evidence.graph else ():
        yield Finding(name, f"its input is the result of {first!r}", remedy=f"remove {first!r}")
