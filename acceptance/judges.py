"""One judge for each code: whether what a finding says of a layer is so, by arithmetic of its own.

A judge takes a ``Case`` and gives a verdict, "true", "false", "useless" or "unjudged", and what was computed. The
criteria do not repeat the rules' limits where the claim can be tried itself: an effect on the output is computed, a
loading is carried out, a network is run on inputs. ``impossible`` tells whether the remedy can be carried out.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from independent import Layer, layers

VISIBLE = 2.0**-11  # of a result: what half precision rounds away
FAINT = 0.01  # of the layer's root mean square sd
CONSTANT = 0.1  # of it: what is left out changes what follows
RARELY = 0.01  # of the positions
HARD_SWISH = -3.0  # below this input it gives 0


@dataclass(frozen=True)
class Case:
    """A finding, the layer that it names as ``independent`` read it, and the file."""

    finding: Any
    layer: Layer
    path: Path

    @property
    def channels(self) -> list[int]:
        return list(self.finding.channels)


def denormal_variance(case: Case) -> tuple[str, str]:
    """Claimed: machines differ in what they make of it.

    Tried: the multiplier with the variance, and with it flushed to zero where it is denormal in the type that computes,
    which is float32 for half precision.
    """
    layer, var = case.layer, case.layer.var[case.channels]
    kind = np.float64 if layer.dtype == "float64" else np.float32
    gamma = np.ones(len(var)) if layer.gamma is None else layer.gamma[case.channels]

    def multiplier(values: np.ndarray) -> np.ndarray:
        return gamma.astype(kind) / np.sqrt(values.astype(kind) + kind(layer.known_eps))

    with np.errstate(divide="ignore", invalid="ignore"):
        kept, flushed = multiplier(var), multiplier(np.where(var < np.finfo(kind).tiny, 0, var))
    if changed := int(np.sum(kept != flushed)):
        worst = float(np.nanmax(np.abs(kept / flushed - 1)))
        return "true", f"flushed to zero, {changed} of {len(var)} multipliers change, by up to {worst:.2g}"
    words = (
        f"flushed to zero, none of {len(var)} multipliers changes a bit, var / eps {var.max() / layer.known_eps:.1g}"
    )
    is_note = case.finding.severity.name == "INFO" and bool(np.all(var < np.finfo(kind).tiny))
    return ("true", f"told as information only; {words}") if is_note else ("false", words)


def dead_channel(case: Case) -> tuple[str, str]:
    """Claimed: next to nothing comes of the channel.

    Computed: how far its result varies beside the layer's others, how often it is above zero where a ReLU is known to
    follow, and the constant that pruning would drop.
    """
    layer, threshold = case.layer, _threshold(case.layer)
    typical = math.sqrt(float(np.mean(layer.sd**2)))
    varying = [c for c in case.channels if layer.sd[c] >= FAINT * typical]
    shares = {c: _share_above(layer.offset[c], layer.sd[c], threshold) for c in varying if threshold is not None}
    told = f"{len(case.channels)} channels, sd beside a typical {typical:.2g}"
    if lively := [c for c, share in shares.items() if share >= RARELY]:
        worst = max(lively, key=lambda c: shares[c])
        return (
            "false",
            f"{told}: {len(lively)} vary and are active, {worst} by {layer.sd[worst]:.2g}, {shares[worst]:.1%}",
        )
    if len(shares) < len(varying):
        return "unjudged", f"{told}: {len(varying)} vary, and the file does not tell what follows"
    left = [c for c in (_result(layer.offset[c], threshold) for c in case.channels) if c > CONSTANT * typical]
    words = case.finding.remedy
    if left and "prune" in words and not any(word in words for word in ("constant", "beta", "bias")):
        return "useless", f"{told}: pruned as told, {len(left)} would lose a constant of up to {max(left):.2g}"
    return "true", f"{told}: at most {max(layer.sd[c] for c in case.channels):.2g}, or active in less than 1 %"


def rarely_active(layer: Layer) -> list[int]:
    """Channels that a ReLU, where one alone is known to follow, lets through in less than 1 % of the positions."""
    if _threshold(layer) != 0:
        return []
    return [c for c in range(layer.channels) if _share_above(layer.offset[c], layer.sd[c], 0.0) < RARELY]


def _threshold(layer: Layer) -> float | None:
    """Below which input the operator that reads the layer gives nothing: 0 for ReLU, -3 for hard swish."""
    if layer.readers == {"Relu"}:
        return 0.0
    return HARD_SWISH if layer.readers in ({"HardSwish"}, {"Add", "Mul"}) else None


def _result(beta: float, threshold: float | None) -> float:
    """What a ReLU or a hard swish makes of beta; a ReLU's is the least that is left where none is known."""
    return abs(beta) * min(max((beta + 3) / 6, 0), 1) if threshold == HARD_SWISH else max(beta, 0.0)


def _share_above(beta: float, sd: float, threshold: float) -> float:
    """P(beta + sd z > threshold) for a standard normal z."""
    return 0.5 * math.erfc((threshold - beta) / (sd * math.sqrt(2))) if sd else float(beta > threshold)


def constant_channel(case: Case) -> tuple[str, str]:
    """Claimed: a small change of the input is magnified above everything else.

    Tried: the network on noise, waves and a step. Computed where a convolution feeds the layer: how far a change of
    that convolution's own input by 1 can move the result, gain times the norm of the filter.
    """
    if case.path.suffix != ".onnx":
        return "unjudged", "a torch file has no graph to run"
    moved = np.max([_excursion(case, kind) for kind in ("noise", "waves", "step")], axis=0)
    limit, typical, told = _beside(moved, case.channels)
    words = f"on noise, waves and a step they move by up to {told:.2g}, others by {typical:.2g}, at most {limit:.2g}"
    if case.layer.filters is None:
        return ("true" if told > limit else "false"), words
    reach = case.layer.gain * np.linalg.norm(case.layer.filters, axis=1)
    most, common, reached = _beside(reach, case.channels)
    words += f"; gain times filter is at most {reached:.2g}, of others {common:.2g}, at most {most:.2g}"
    return ("true" if told > limit or reached > most else "false"), words


def _beside(values: np.ndarray, channels: list[int]) -> tuple[float, float, float]:
    """Largest and median value of the other channels, and the largest of these."""
    others = np.delete(values, channels)
    return float(others.max(initial=0)), float(np.median(others)) if len(others) else 0.0, float(values[channels].max())


_RUNS: dict[tuple[Path, str], dict[str, np.ndarray]] = {}


def _excursion(case: Case, kind: str) -> np.ndarray:
    """Largest distance between two results of the layer, for each channel, on one made-up input."""
    if (case.path, kind) not in _RUNS:
        _RUNS[case.path, kind] = _run(case.path, kind)
    results = _RUNS[case.path, kind]
    name = next(name for name in case.layer.names if name in results)
    y = np.moveaxis(results[name], 1, 0).reshape(case.layer.channels, -1)
    return y.max(axis=1) - y.min(axis=1)


def _run(path: Path, kind: str) -> dict[str, np.ndarray]:
    """Results of every batch norm node on one input, by ONNX's own reference evaluator."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(path))
    wanted = [node.output[0] for node in model.graph.node if node.op_type == "BatchNormalization"]
    given = {item.name for item in model.graph.initializer}
    inputs = {value.name: _input(value, kind) for value in model.graph.input if value.name not in given}
    results = ReferenceEvaluator(model).run(None, inputs, intermediate=True)
    return {name: np.asarray(results[name]) for name in wanted}


def _input(value: Any, kind: str) -> np.ndarray:
    """Images in [-1, 1]; 64 times 192 points where the graph leaves the size open, 48 high for recognizers of text."""
    sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
    open_sizes = (1, 3, 48, 192) if len(sizes) == len("NCHW") else (1,) * len(sizes)
    shape = [size if size > 0 else default for size, default in zip(sizes, open_sizes, strict=True)]
    if kind == "noise":
        return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    x = np.linspace(0, 1, shape[-1], dtype=np.float32)
    line = np.sin(2 * np.pi * 6 * x) if kind == "waves" else np.where((x * 12).astype(int) % 2, 1, -1)
    return np.broadcast_to(line.astype(np.float32), shape).copy()


def missing_counter(case: Case) -> tuple[str, str]:
    """Claimed: strict loading fails for want of num_batches_tracked. Tried with a layer of torch.nn."""
    import torch

    layer = case.layer
    if layer.container is None:
        return "unjudged", "the file has no state to load"
    stem = layer.keys["running_var"].removesuffix("running_var").rstrip(".")
    part = OrderedDict((name, layer.container[key]) for name, key in layer.keys.items())
    if (metadata := getattr(layer.container, "_metadata", None)) is not None:
        part._metadata = OrderedDict({"": metadata.get(stem, {})})
    fresh = torch.nn.BatchNorm1d(layer.channels, affine="weight" in layer.keys)
    try:
        fresh.load_state_dict(part, strict=True)
    except RuntimeError as error:
        verdict = "true" if "num_batches_tracked" in str(error) else "unjudged"
        return verdict, f"load_state_dict(strict=True): {' '.join(str(error).split())[:150]}"
    return "false", "load_state_dict(strict=True) of a torch.nn layer takes the file's tensors: torch adds the counter"


def never_updated(case: Case) -> tuple[str, str]:
    """Claimed: the statistics are those of a new layer."""
    moved = int(np.sum((case.layer.mean != 0) | (case.layer.var != 1)))
    return ("false" if moved else "true"), f"{moved} of {case.layer.channels} channels are not at mean 0, variance 1"


def few_updates(case: Case) -> tuple[str, str]:
    """Claimed: k updates only. After k updates by momentum m at least (1 - m)^k of the initial variance 1 is left."""
    least, count = float(case.layer.var.min()), case.layer.count or 0
    words = f"{count} updates by 0.1 leave {0.9**count:.3g} of the initial variance 1; the least is {least:.3g}"
    return ("false" if least < 0.9**count * (1 - 1e-5) else "true"), words


def non_finite(case: Case) -> tuple[str, str]:
    """Claimed: NaN or infinity."""
    broken = sum(int(np.sum(~np.isfinite(values))) for values in case.layer.tensors)
    return ("true" if broken else "false"), f"{broken} values are NaN or infinite"


def negative_variance(case: Case) -> tuple[str, str]:
    """Claimed: a variance below zero."""
    return ("true" if case.layer.var.min() < 0 else "false"), f"least variance {case.layer.var.min():.3g}"


def half_precision(case: Case) -> tuple[str, str]:
    """Claimed: statistics in half precision."""
    return ("true" if case.layer.dtype in {"float16", "bfloat16"} else "false"), f"variances are {case.layer.dtype}"


def incomplete(case: Case) -> tuple[str, str]:
    """Claimed: a statistic is missing, or sizes differ."""
    sizes = {len(values) for values in case.layer.tensors}
    whole = len(sizes) == 1 and case.layer.mean is not None and case.layer.var is not None
    return ("false" if whole else "true"), f"sizes {sorted(sizes)}"


def far_mean(case: Case) -> tuple[str, str]:
    """Claimed: digits are lost. Computed: the folded bias in float32 beside float64, in sd of the result."""
    layer, gain = case.layer, case.layer.gain
    exact = layer.offset - layer.mean * gain
    rounded = layer.offset.astype(np.float32) - layer.mean.astype(np.float32) * gain.astype(np.float32)
    loss = float(np.max((np.abs(exact - rounded) / np.maximum(layer.sd, 1e-300))[case.channels]))
    return ("true" if loss > VISIBLE else "false"), f"folding in float32 moves a result by {loss:.2g} sd"


def silent_layer(case: Case) -> tuple[str, str]:
    """Claimed: the layer's result does not vary."""
    largest = float(case.layer.sd.max())
    return ("true" if largest < 1e-6 else "false"), f"largest sd of a result {largest:.2g}"


def eps_mismatch(case: Case) -> tuple[str, str]:
    """Claimed: most layers have another eps, and it matters."""
    layer, every = case.layer, [other.known_eps for other in layers(case.path)]
    most = max(every, key=every.count)
    effect = float(np.median(np.abs(np.sqrt((layer.var + layer.known_eps) / (layer.var + most)) - 1)))
    holds = every.count(most) * 2 > len(every) and effect > VISIBLE
    words = f"{every.count(most)} of {len(every)} have {most:g}; a typical result moves by {effect:.2g}"
    return ("true" if holds else "false"), words


def train_mode(case: Case) -> tuple[str, str]:
    """Claimed: the node normalizes by the batch."""
    return ("true" if case.layer.training else "false"), f"training_mode is {int(case.layer.training)}"


CODES = {
    "BN101": never_updated,
    "BN102": non_finite,
    "BN103": negative_variance,
    "BN104": denormal_variance,
    "BN105": constant_channel,
    "BN106": dead_channel,
    "BN107": non_finite,
    "BN108": half_precision,
    "BN109": incomplete,
    "BN110": far_mean,
    "BN111": silent_layer,
    "BN112": missing_counter,
    "BN114": few_updates,
    "BN503": eps_mismatch,
    "BN504": train_mode,
}


def wrapper_prefix(finding: Any, found: list[Layer]) -> tuple[str, str]:
    """Claimed: load_state_dict(strict=False) loads nothing. Computed: names without the prefix that are in the file."""
    prefix = finding.measured.split("'")[1]
    for layer in found:
        if layer.container is not None and all(str(key).startswith(prefix) for key in layer.container):
            return (
                "true",
                f"all {len(layer.container)} names begin with {prefix!r}: a model without the wrapper knows none",
            )
    return "false", f"names without {prefix!r} are in the file"


def untrained(finding: Any, found: list[Layer]) -> tuple[str, str]:  # noqa: ARG001 - a judge's arguments
    """Claimed: gamma 1 and beta 0 everywhere."""
    moved = sum(bool(np.any(layer.gamma != 1) or np.any(layer.beta != 0)) for layer in found if layer.gamma is not None)
    return ("false" if moved else "true"), f"gamma or beta of {moved} of {len(found)} layers has moved"


def shared_layer(finding: Any, found: list[Layer]) -> tuple[str, str]:
    """Claimed: one layer at several places, whose statistics mix them. Looked up: who reads and who feeds its tensors.

    Two layers with a gamma each that read one value have the same statistics, which an exporter may store once.
    """
    named = [layer for layer in found if finding.layer in layer.names]
    if not named:
        return "unjudged", f"no layer of the name {finding.layer!r} was found by the second reading"
    if named[0].container is None:
        alike = [layer for layer in found if layer.keys["running_var"] == named[0].keys["running_var"]]
        fed, gammas = {layer.fed for layer in alike}, {layer.keys["weight"] for layer in alike}
        words = f"{len(alike)} nodes read these statistics, {len(gammas)} gammas, fed by {len(fed)} values"
        return ("true" if len(fed) > 1 and len(gammas) == 1 else "false"), words
    first = named[0].container[named[0].keys["running_var"]].data_ptr()
    names = [layer.names[-1] for layer in found if layer.container[layer.keys["running_var"]].data_ptr() == first]
    return ("true" if len(names) > 1 else "false"), f"{len(names)} names share the memory of these statistics"


def averaged_weights(finding: Any, found: list[Layer]) -> tuple[str, str]:
    """Claimed: two parts of the file have other weights and the same statistics. Compared: gamma, beta, statistics."""
    parts = re.findall(r"'([^']*)'", finding.measured)
    if len(parts) < len("ab"):
        return "unjudged", "the finding names no two parts of the file"
    one, other = ({layer.names[0].removeprefix(part): layer for layer in found if layer.names[0].startswith(part)}
                  for part in parts[:2])  # fmt: skip
    both = one.keys() & other.keys()
    same = sum(
        bool(np.array_equal(one[k].mean, other[k].mean) and np.array_equal(one[k].var, other[k].var)) for k in both
    )
    moved = sum(not np.array_equal(one[k].gamma, other[k].gamma) for k in both)
    words = f"{same} of {len(both)} layers of both have the same statistics, {moved} another gamma"
    return ("true" if both and same == len(both) and moved else "unjudged"), words


# of the whole file
WHOLE = {"BN113": untrained, "BN115": averaged_weights, "BN302": shared_layer, "BN507": wrapper_prefix}

_TRIED: dict[tuple[Path, str], str] = {}


def impossible(finding: Any, path: Path) -> str:
    """Why the remedy cannot be carried out on this file, or "": its command is run on a copy."""
    words = finding.remedy
    if path.suffix == ".onnx" and ("get_submodule" in words or "load_state_dict" in words):
        return "an ONNX file has no module"
    if not words.startswith("batchnorm fix"):
        return ""
    if (path, finding.code) not in _TRIED:
        _TRIED[path, finding.code] = _tried(words, path, finding.code)
    return _TRIED[path, finding.code]


def _tried(command: str, path: Path, code: str) -> str:
    """What the command says of a copy of the file, where it fails or leaves the finding."""
    from batchnorm.doctor import examine

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        copy, mended = Path(shutil.copy(path, folder)), Path(folder, f"mended{path.suffix}")
        words = [str(copy) if word.endswith(path.name) else word for word in shlex.split(command)[1:]]
        done = subprocess.run(
            [sys.executable, "-m", "batchnorm", *words, "-o", str(mended)], capture_output=True, text=True, check=False
        )
        if done.returncode not in {0, 1}:
            return f"the command ends with {done.returncode}: {' '.join(done.stderr.replace(folder, '').split())[:120]}"
        left = sum(finding.code == code for finding in examine(mended).findings) if mended.exists() else 0
        return f"the command leaves {left} of these findings" if left else ""
