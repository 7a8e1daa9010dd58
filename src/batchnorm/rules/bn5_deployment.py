"""BN5: export, folding and deployment."""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from itertools import takewhile
from typing import TYPE_CHECKING

from batchnorm.rules.finding import Finding, Unknown
from batchnorm.rules.phrases import fill_from_base, listed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from batchnorm.checkpoint.stored import Stored
    from batchnorm.rules.rule_evidence import Evidence

# the rounding error of half precision: half of the distance between 1 and the next float16
EPS_EFFECT = 2**-11
# Half precision changes statistics by up to 2^-11 of their values: by 0.01 sd, if a mean is 20 sd from 0.
SAME_MEAN = 0.01
SAME_VARIANCE = 0.01


def not_folded(evidence: Evidence) -> Iterator[Finding]:
    """A layer could be folded into its neighbour for inference.

    Why:
        In eval mode batch norm multiplies and adds constants. A convolution or linear layer beside it can include these
        constants in its weights, which saves a pass over the activations.

    How:
        The traced graph shows a convolution or linear layer into which batchnorm.fold can merge the layer. Not reported
        if the model is in train mode.

    Example:
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()

    Fix:
        batchnorm.fold(model.eval(), example) returns a folded copy; keep the original for training.

    References:
        Jacob et al. 2018, "Quantization and Training of Neural Networks", section 3.2.
    """
    graph, structure = evidence.graph, evidence.structure
    if graph is None or not graph.foldable or (structure is not None and structure.training):
        return
    pairs = [f"{layer} into {into}" for layer, into in graph.foldable.items()]
    yield Finding("", f"{len(pairs)} of {len(evidence.stored)} layers can be folded: {listed(pairs)}")


def wrong_fold(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """The model's outputs differ from those of the reference from which it was made.

    Why:
        Folding, fusing, converting and exporting must not change eval outputs by more than rounding. torch's own fusion
        is wrong for grouped transposed convolutions and reused layers, and gives no message.

    How:
        The largest difference of eval outputs on one batch, relative to the largest output. The limit is the rounding
        error of deep networks: 1024 eps of float64, and of float32 on a CPU; 16 eps of half precision, and of TF32 for
        float32 on a GPU.

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
    """eps differs between layers, or from the model that the weights come from.

    Why:
        Saved weights do not include eps. Keras uses 1e-3, torch 1e-5, and some models use 1e-3 in a part of their
        layers. With a wrong eps all outputs have the wrong scale. The error is largest in channels with a small
        variance.

    How:
        Each layer's eps is compared with that of the reference's layer of the same name. If the reference has no such
        layer, or no reference was given, it is compared with the eps that more than half of the layers have. Reported
        if the difference changes the output of a channel with the layer's median variance by more than 2^-11, the
        rounding error of half precision. Without a reference layer of the same name, not reported if two or more layers
        with this eps are all the layers of a part of the model, such as a head of another library. Only ONNX files and
        files with a whole model store eps.

    Example:
        Keras weights in nn.BatchNorm2d(8), whose eps is 1e-5.

    Fix:
        layer.eps = the original's eps. If two parts of a model have different eps on purpose, ignore this finding.

    References:
        Keras BatchNormalization, epsilon=1e-3. pytorch/ao PR 4758.
    """
    eps_of = {name: eps for name in evidence.stored if (eps := evidence.known_eps(name)) is not None}
    if evidence.stored and not eps_of:
        yield Unknown("", "eps is not known")
    expected, source = (evidence.reference.eps, evidence.reference.path) if evidence.reference else ({}, "")
    usual = _usual_eps(eps_of)
    for name, eps in eps_of.items():
        other = expected.get(name, usual)
        if other is None or (name not in expected and _is_own_part(eps_of, eps)):
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
        The model was exported in train mode. Its output for an example depends on the other examples in the batch, and
        for a single example it is mostly beta.

    How:
        The graph has BatchNormalization nodes with training_mode 1, or with outputs for running statistics.

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
        yield Unknown("", "only an ONNX graph shows the mode of the export")


def functional_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A functional call normalizes by the batch in eval mode.

    Why:
        F.batch_norm(..., training=True) uses batch statistics in every mode of the module. model.eval() does not change
        that, and the state_dict does not show it.

    How:
        The model runs on one batch in eval mode. Code outside of batch norm layers calls a function such as
        torch.nn.functional.batch_norm with training=True. The finding names the module whose forward makes the call.

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
    """An example's eval output depends on the other examples in its batch.

    Why:
        In use, an example is alone in its batch, or among other examples than in the test. That must not change its
        output.

    How:
        The first example's eval output is compared when it is alone in the batch and when the batch has up to 8
        examples. The difference is relative to the largest output; the limit is that of BN502. Also
        reported if the model raises an error for one example alone, but not for several. Not reported if BN505 names
        the cause. Not checked if outputs do not have one row for each example, if a batch has one example, or if it
        cannot be cut into examples.

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
    """Names in the file begin with a wrapper's prefix.

    Why:
        DataParallel and DistributedDataParallel put "module." and torch.compile "_orig_mod." in front of every name.
        Then no name matches the model. load_state_dict(strict=False) loads nothing, without an error, and the layers
        keep mean 0 and variance 1.

    How:
        All names of the model's state begin with "module." or "_orig_mod.", once or several times.

    Example:
        torch.save(DataParallel(model).state_dict(), "model.pt")

    Fix:
        Save model.module.state_dict(), or remove the prefix from the names.

    References:
        torch.nn.modules.utils.consume_prefix_in_state_dict_if_present.
    """
    # file.prefix also contains the keys of the dicts around the state
    match = re.search(r"(?:(?:module|_orig_mod)\.)+$", evidence.file.prefix) if evidence.file else None
    if match:
        prefix = match[0]
        yield Finding(
            "",
            f"every name begins with {prefix!r}",
            remedy=f'torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(state, "{prefix}")',
        )


def statistics_left_out(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """A file has gamma and beta of layers, but not their statistics.

    Why:
        A file of parameters alone (model.named_parameters(), "only what is trained", an adapter of PEFT or LoRA) has no
        buffers. Loaded into a new model, gamma and beta meet mean 0 and variance 1; loaded into the base model, they
        meet the base's statistics, although train mode has updated them since.

    How:
        A module of the file has a weight and a bias of one axis and equal length, no running_mean, running_var or
        num_batches_tracked, and a name that says batch norm: bn1, batch_norm, BatchNorm_0. Layers with other names,
        such as downsample.1, cannot be told from other normalizations. An adapter without such a module is not judged:
        only its base shows which layers there are.

    Example:
        torch.save(dict(model.named_parameters()), "model.pt")

    Fix:
        batchnorm fix FILE --base BASE copies the statistics of the base model's file. If they changed in training, save
        model.state_dict(), or measure them again. Ignore this finding if the layers have track_running_stats=False.

    References:
        peft#1732, peft PR 3481.
    """
    file = evidence.file
    if file is None:
        return
    if layers := file.without_statistics:
        what = "an adapter" if file.is_adapter else "the file"
        yield Finding(
            "",
            f"{what} has gamma and beta, but no statistics, of {listed(layers)}",
            remedy=fill_from_base(evidence),
        )
    elif file.is_adapter and not evidence.stored:
        yield Unknown("", "an adapter's file does not show the base model's layers")


def reference_statistics(evidence: Evidence) -> Iterator[Finding | Unknown]:
    """Stored statistics differ from the reference's.

    Why:
        A folded, converted or imported model should have the statistics of its original. If they differ, they are from
        another checkpoint, or a forward pass in train mode changed them.

    How:
        In layers of the same name, means differ by more than 0.01 of the reference's standard deviation, or variances
        by more than 1 %. Copies in half precision are within these limits. Layers that only one model has are left out.

    Example:
        model.train(); model(x)  # a look at the shapes, before saving

    Fix:
        Copy the reference's running_mean and running_var into the layers of the same names: a folded model has fewer
        layers, so that load_state_dict does not fit. Do nothing if the model was recalibrated on purpose.

    References:
        pytorch/ao PR 4758.
    """
    references = evidence.reference.stored if evidence.reference else {}
    if evidence.stored and not evidence.stored.keys() & references.keys():
        yield Unknown("", "no layer has the same name as a layer of the reference")
    for name, theirs in references.items():
        ours = evidence.stored.get(name)
        if ours and (channels := _differing(ours, theirs, evidence.eps(name))):
            yield Finding(
                name, f"{len(channels)} of {ours.channels} channels differ from the reference's", channels=channels,
                remedy="" if ours.channels == theirs.channels else "pass the version that the model was made from as "
                f"reference: its layer of this name has {ours.channels} channels, not {theirs.channels}",
            )  # fmt: skip


def activation_dropped(evidence: Evidence) -> Iterator[Finding]:
    """A layer that also applied an activation was replaced, and the activation is lost.

    Why:
        Layers of this package can apply an activation and add a residual. Code that converts torch.nn's batch norm
        copies only their parameters and statistics into another layer, which does neither. The network then computes
        something else, without an error.

    How:
        A module has tensor objects of a layer with act= that is not part of the model. These are running_mean or
        running_var; or, if that layer no longer exists, both gamma and beta. Or the model has a placeholder that
        convert put in place of an activation, but not the layer that applies the activation. Values that were copied
        (load_state_dict, data.copy_) or computed again (fuse_conv_bn_eval) do not show a lost activation. Only a
        comparison with the original model does, as BN502 with reference=.

    Example:
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(conv, batchnorm.BatchNorm2d(64, act="relu")))

    Fix:
        Convert batchnorm.for_export(model) in place of the model: there activations are modules of their own.

    References:
        torch.nn.SyncBatchNorm.convert_sync_batchnorm.
    """
    for name, act in (evidence.structure.dropped if evidence.structure else {}).items():
        yield Finding(
            name, f"it replaces a layer with act={act!r}, which is not in the model", limit=f"{act} behind it"
        )


def _usual_eps(known: Mapping[str, float]) -> float | None:
    """The eps that more than half of the layers have; None if no eps is so frequent."""
    (eps, count), *_ = Counter(known.values()).most_common(1) or [(0.0, 0)]
    return eps if 2 * count > len(known) else None


def _is_own_part(known: Mapping[str, float], eps: float) -> bool:
    """Whether two or more layers have this eps, in a part of the model that has no other batch norm layer."""
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
    """Channels whose statistics are not the same; () if a mean or a variance is missing."""
    tensors = (ours.running_mean, theirs.running_mean, ours.running_var, theirs.running_var)
    mean, their_mean, var, their_var = ((), (), (), ()) if None in tensors else tensors
    channels = zip(mean or (), their_mean or (), var or (), their_var or (), strict=False)
    return tuple(
        channel
        for channel, (a, b, v, w) in enumerate(channels)
        if not (_near(a, b, SAME_MEAN * math.sqrt(max(w + eps, 0))) and _near(v, w, SAME_VARIANCE * (w + eps)))
    )


def _near(a: float, b: float, distance: float) -> bool:
    """Whether two numbers differ by at most ``distance``. NaN equals NaN, and an infinity equals itself."""
    return a == b or (math.isnan(a) and math.isnan(b)) or (abs(a - b) < math.inf and abs(a - b) <= distance)
