"""BN5: export, folding and deployment."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from itertools import takewhile
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchnorm.checkpoint.stored import Stored
    from batchnorm.rules.rule_evidence import Evidence

# what half precision rounds away: half of the distance between 1 and the next float16
EPS_EFFECT = 2**-11
# Statistics that went through half precision differ by up to 2^-11 of their values: 0.01 sd for means 20 sd from 0.
SAME_MEAN = 0.01
SAME_VARIANCE = 0.01


def not_folded(evidence: Evidence) -> Iterator[Finding]:
    """A layer could be folded into its neighbour for inference.

    Why:
        In eval mode batch norm multiplies and adds constants. The convolution or linear layer beside it can do that
        for nothing, which saves a pass over the activations.

    How:
        Layers in eval mode whose neighbour alone feeds them, as the traced graph shows. Silent while the model is in
        train mode.

    Example:
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()

    Fix:
        batchnorm.fold(model.eval(), example) gives a folded copy; keep the original to train on.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.
    """
    graph, structure = evidence.graph, evidence.structure
    if graph is None or not graph.foldable or (structure is not None and structure.training):
        return
    pairs = [f"{layer} into {into}" for layer, into in graph.foldable.items()]
    yield Finding("", f"{len(pairs)} of {len(evidence.stored)} layers can be folded: {listed(pairs)}")


def wrong_fold(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The model's outputs differ from those of the model that it was made from.

    Why:
        Folding, fusing, converting and exporting must not change eval outputs by more than rounding. torch's own
        fusing gets grouped transposed convolutions and reused layers wrong without a message.

    How:
        The largest difference of outputs on one example, relative to the largest output. The limit is the rounding
        of deep sums: 1024 eps of float32 and float64, 16 eps of half precision and TF32.

    Example:
        batchnorm.doctor.examine(folded, data, reference=original)

    Fix:
        batchnorm.fold(original, example), which folds only where outputs stay the same.

    References:
        pytorch#180995, ultralytics PR 25364.
    """
    reference = evidence.reference
    if reference is None:
        return
    if reference.difference is None:
        yield Unknown("", reference.unknown or "no outputs were compared with the reference's")
        return
    if not reference.difference <= reference.tolerance:  # NaN is no agreement
        yield Finding(
            "",
            f"outputs differ by {reference.difference:.2g} of the largest one",
            limit=f"{reference.tolerance:.1g}",
            consequence=f"The model does not compute what {reference.path} computes.",
        )


def eps_mismatch(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """eps differs between layers, or from the model that the weights were imported from.

    Why:
        Weights come without their eps. Keras uses 1e-3, torch 1e-5, and some models 1e-3 in part: with the wrong one
        every output is scaled wrong, most where the variance is small.

    How:
        Each layer's eps against the reference's; without a reference, against the eps of more than half of the
        layers. Fires if the layer's median variance makes that a change of more than 2^-11 of the output, what half
        precision rounds away. Silent where two or more such layers are a part of the model by themselves, as a head
        of another library is. Files say eps only in ONNX, or where they hold the whole model.

    Example:
        Keras weights in nn.BatchNorm2d(8), whose eps is 1e-5.

    Fix:
        layer.eps = the original's eps. If two parts of a model have an eps of their own on purpose, ignore it.

    References:
        Keras BatchNormalization, epsilon=1e-3. pytorch/ao PR 4758.
    """
    known = {name: eps for name in evidence.stored if (eps := evidence.known_eps(name)) is not None}
    if evidence.stored and not known:
        yield Unknown("", "eps is not told")
    expected, source = (evidence.reference.eps, evidence.reference.path) if evidence.reference else ({}, "")
    usual = _usual_eps(known)
    for name, eps in known.items():
        other = expected.get(name, usual)
        if other is None or (name not in expected and _is_own_part(known, eps)):
            continue
        effect = _effect(evidence.stored[name], eps, other)
        if effect > EPS_EFFECT:
            who = f" where {source} has" if name in expected else ", most layers have"
            yield Finding(
                name,
                f"eps {eps:g}{who} {other:g}",
                consequence=f"Outputs of a typical channel differ by {effect:.2g} of their size, outputs of "
                "channels with small variance by more.",
                remedy=f'model.get_submodule("{name}").eps = {other:g}',
            )


def train_mode_in_export(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """An exported layer normalizes by the batch.

    Why:
        The file was exported in train mode. Its answer for an example depends on the batch it comes in, and for one
        example alone it is mostly beta.

    How:
        BatchNormalization nodes with training_mode 1, or with outputs for running statistics.

    Example:
        torch.onnx.export(model, x, "model.onnx", training=TrainingMode.TRAINING)

    Fix:
        model.eval(), and export again.

    References:
        ONNX BatchNormalization, training_mode. pytorch#75252.
    """
    for name in evidence.file.in_train_mode if evidence.file else ():
        yield Finding(name, "training_mode 1")
    if evidence.file and evidence.file.format != "onnx":
        yield Unknown("", "only an exported graph has a mode")


def functional_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A functional call normalizes by the batch in eval mode.

    Why:
        F.batch_norm(..., training=True) measures the batch whatever mode the module is in. model.eval() does not
        reach it, and nothing in the state_dict shows it.

    How:
        Calls of torch.nn.functional.batch_norm and torch.batch_norm with training=True, on one batch in eval mode,
        outside of batch norm layers. The module whose forward makes the call is named.

    Example:
        F.batch_norm(x, None, None, training=True)

    Fix:
        A batch norm layer; or training=self.training with running statistics in buffers.

    References:
        torch.nn.functional.batch_norm.
    """
    for name in evidence.run.functional if evidence.run else ():
        yield Finding(
            name,
            f"{name + '.forward' if name else 'the forward of the model itself'} calls batch_norm with training=True",
        )
    if evidence.run and (why := evidence.run.unknown.get("functional")):
        yield Unknown("", why)


def depends_on_companions(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """An example's eval output depends on what else is in its batch.

    Why:
        In use, an example comes alone or among others than in the test. Its answer must not change by that.

    How:
        The first example's eval output alone and among up to 8, relative to its largest value. The limit is what
        rounding explains, 1024 eps of float32. A model that raises for one example alone, and not for a few, is a
        finding too. Silent where BN505 names the cause. Not checked where outputs are not one for each example, or
        batches hold one example, or cannot be cut into examples.

    Example:
        nn.BatchNorm2d(8, track_running_stats=False); (x - x.mean()) / x.std() in forward

    Fix:
        Store statistics: batch norm layers that track them, or InputNorm for inputs.

    References:
        pytorch#5406.
    """
    run = evidence.run
    if run is None or run.functional:
        return
    if run.companions is None and not run.alone_error:
        yield Unknown("", run.unknown.get("companions", "no example was run alone"))
    elif run.alone_error or not (run.companions or 0.0) <= run.companions_tolerance:
        modules = (evidence.modules or {}).items()
        without = [name for name, module in modules if not module.tracks and evidence.stored[name].running_mean is None]
        change = f"an example's output changes by {run.companions or 0.0:.2g} of its size when it is alone"
        yield Finding(
            "",
            f"one example alone raises {run.alone_error}" if run.alone_error else change,
            limit="no error" if run.alone_error else f"{run.companions_tolerance:.1g}",
            consequence=f"Answers depend on the "
            f"batch{': no statistics are stored by ' + listed(without) if without else ''}.",
        )


def wrapper_prefix(evidence: Evidence) -> Iterator[Finding]:
    """Names in the file carry a wrapper's prefix.

    Why:
        DataParallel and DistributedDataParallel put "module." and torch.compile "_orig_mod." in front of every name.
        load_state_dict then finds no name it knows; with strict=False it loads nothing and says nothing, and the
        layers keep mean 0 and variance 1.

    How:
        "module." or "_orig_mod.", once or several times, in front of all names of the model's state.

    Example:
        torch.save(DataParallel(model).state_dict(), "model.pt")

    Fix:
        Save model.module.state_dict(), or take the prefix off.

    References:
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present.
    """
    # the dictionaries around the state are in the prefix too
    found = re.search(r"(?:(?:module|_orig_mod)\.)+$", evidence.file.prefix) if evidence.file else None
    if found:
        prefix = found[0]
        yield Finding(
            "",
            f"every name begins with {prefix!r}",
            remedy=f'torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "{prefix}")',
        )


def reference_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Stored statistics differ from the reference's.

    Why:
        A folded, converted or imported model has the statistics of its original. Others are from another checkpoint,
        or were moved by a forward pass in train mode.

    How:
        Layers of the same name: means farther apart than 0.01 of the reference's standard deviation, or variances by
        more than 1 %. Copies in half precision stay within. Layers that only one of both has are left out.

    Example:
        model.train(); model(x)  # a look at the shapes, before saving

    Fix:
        Load the reference's running_mean and running_var; or nothing, if the model was recalibrated on purpose.

    References:
        pytorch/ao PR 4758.
    """
    known = evidence.reference.stored if evidence.reference else {}
    if evidence.stored and not evidence.stored.keys() & known.keys():
        yield Unknown("", "no layer has the name of one of the reference's")
    for name, theirs in known.items():
        ours = evidence.stored.get(name)
        if ours and (channels := _differing(ours, theirs, evidence.eps(name))):
            yield Finding(
                name, f"{len(channels)} of {ours.channels} channels differ from the reference's", channels=channels
            )


def activation_dropped(evidence: Evidence) -> Iterator[Finding]:
    """A layer that also applied an activation was replaced, and nothing applies it.

    Why:
        Layers of this package can apply an activation and add a residual. Code that knows torch.nn's batch norm takes
        their parameters and statistics over into a layer of its own, which does neither: the network computes
        something else, and nothing fails.

    How:
        A module holds the very tensors of a layer with act=, which is not part of the model: its running_mean or
        running_var, or both gamma and beta of a layer that no longer exists. Or a placeholder that convert left for
        an activation stands in a model without its layer. Values that were copied (load_state_dict, data.copy_) or
        computed anew (fuse_conv_bn_eval) tell nothing of the layer: a loss there shows only beside the model of
        before, as BN502 with reference=.

    Example:
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv, batchnorm.BatchNorm2d(64, act="relu")))

    Fix:
        batchnorm.for_export(model) before the conversion, whose activations are modules of their own.

    References:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm.
    """
    for name, act in (evidence.structure.dropped if evidence.structure else {}).items():
        yield Finding(
            name, f"it has the place of a layer with act={act!r}, which is not in the model", limit=f"{act} behind it"
        )


def _usual_eps(known: Mapping[str, float]) -> float | None:
    """The eps of more than half of the layers, if there is one."""
    (eps, count), *_ = Counter(known.values()).most_common(1) or [(0.0, 0)]
    return eps if 2 * count > len(known) else None


def _is_own_part(known: Mapping[str, float], eps: float) -> bool:
    """Whether all layers of this eps, two or more, are a part of the model with no other layer in it."""
    paths = [name.split(".")[:-1] for name, other in known.items() if other == eps]
    around = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*paths, strict=False))]
    inside = [name for name in known if name.split(".")[: len(around)] == around]
    return len(paths) > 1 and bool(around) and len(inside) == len(paths)


def _effect(stored: Stored, eps: float, other: float) -> float:
    """Relative change of a typical channel's output if its layer had another eps."""
    variances = [var for var in stored.running_var or () if 0 <= var < math.inf]
    var = statistics.median(variances) if variances else 1.0
    return abs(math.sqrt((var + eps) / (var + other)) - 1) if var + other > 0 else 0.0


def _differing(ours: Stored, theirs: Stored, eps: float) -> tuple[int, ...]:
    """Channels whose statistics are not the same; none if there are none to compare."""
    tensors = (ours.running_mean, theirs.running_mean, ours.running_var, theirs.running_var)
    mean, their_mean, var, their_var = ((), (), (), ()) if None in tensors else tensors
    channels = zip(mean or (), their_mean or (), var or (), their_var or (), strict=False)
    return tuple(
        channel
        for channel, (a, b, v, w) in enumerate(channels)
        if not (_near(a, b, SAME_MEAN * math.sqrt(max(w + eps, 0))) and _near(v, w, SAME_VARIANCE * (w + eps)))
    )


def _near(a: float, b: float, distance: float) -> bool:
    """Whether two numbers are the same, also where they are NaN or infinite, or no farther apart."""
    return a == b or (math.isnan(a) and math.isnan(b)) or (abs(a - b) < math.inf and abs(a - b) <= distance)
