"""Bench: the times of our layers, of torch.nn's layers, and of the memory traffic that every implementation needs.

The memory limit of a call is the time in which torch moves as many bytes as the call must move, in the same rounds. A
``copy`` reads one tensor and writes another; a ``triad`` reads two tensors and writes a third (McCalpin 1995, STREAM).
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import ceil, inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from batchnorm.files.whole import replacing
from batchnorm.paired_timing import BUSY, ROUNDS, others, race, timed
from batchnorm.reporting.blocks import Text, TextTable
from batchnorm.reporting.rows import Check, Report, Row, RuleWords, Suite
from batchnorm.reporting.severity import Severity
from batchnorm.reporting.text import many

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from batchnorm.paired_timing import Contestant
    from batchnorm.reporting.json_values import Json

SCHEMA_VERSION = 1
SHAPES = ((32, 64, 56, 56), (128, 16, 32, 32), (32, 256, 14, 14), (256, 512))
SHORT = ("forward", "step", "residual", "eval")
DTYPES = ("float32", "float64", "bfloat16", "float16")
_COLUMNS = ("shape", "case", "ours ms", "torch ms", "× torch", "× limit")
_LEGEND = "× torch: torch.nn's time divided by ours; × limit: our time divided by the time of copies of the same size."
_TENSORS = 12  # the most tensors of the size of x that a case has in memory at once


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a layer; ``limit`` is the least memory traffic that it needs, as numbers of copies and triads.

    If channels are last and x is larger than the cache, ``reread`` more reads are needed: no part of x has all values
    of a channel, so all of x must be read before any value can be normalized.
    """

    words: str
    train: bool
    relu: bool
    residual: bool
    backward: bool
    limit: Mapping[str, int]
    reread: int


CASES = {
    "forward": Case(
        words="train forward", train=True, relu=False, residual=False, backward=False, limit={"copy": 1}, reread=1
    ),
    "relu": Case(
        words="BN + ReLU forward", train=True, relu=True, residual=False, backward=False, limit={"copy": 1}, reread=1
    ),
    "pass": Case(
        words="forward + backward", train=True, relu=False, residual=False, backward=True,
        limit={"copy": 1, "triad": 1}, reread=3,
    ),
    "step": Case(
        words="BN + ReLU forward + backward", train=True, relu=True, residual=False, backward=True,
        limit={"copy": 1, "triad": 1}, reread=3,
    ),
    "residual": Case(
        words="BN + residual + ReLU forward + backward", train=True, relu=True, residual=True, backward=True,
        limit={"copy": 1, "triad": 2}, reread=4,
    ),
    "eval": Case(
        words="eval BN + ReLU", train=False, relu=True, residual=False, backward=False, limit={"copy": 1}, reread=0
    ),
}  # fmt: skip


class Timing(TypedDict):
    """Times of one case in milliseconds, quartiles of their ratios, and the share of the machine that others used."""

    case: str
    words: str
    shape: list[int]
    dtype: str
    channels_last: bool
    rounds: int
    ours_ms: float
    torch_ms: float
    limit_ms: float
    ratio: float
    ratio_quartiles: list[float]
    to_limit: float
    to_limit_quartiles: list[float]
    others: NotRequired[float]  # missing on a system that does not report it


class Timings(TypedDict):
    """What ``short_table`` measures."""

    schema_version: int
    environment: Mapping[str, str]
    threads: int
    rows: list[Timing]


@dataclass(frozen=True, slots=True)
class CaseInputs:
    """x, a residual and the gradient of y: normal random numbers, the same in every run."""

    x: Tensor
    residual: Tensor
    grad: Tensor

    @classmethod
    def of(cls, shape: Sequence[int], dtype: str = "float32", *, channels_last: bool = False) -> CaseInputs:
        """Inputs of a shape, type and layout.

        Raises:
            ValueError: If ``dtype`` is unknown, no layer has inputs of this shape, the tensors do not fit in memory, or
                ``channels_last`` is True for a shape of fewer than 4 axes.
        """
        import torch

        _check(shape, dtype, channels_last=channels_last)
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        layout = layouts.get(len(shape), torch.contiguous_format)
        source = torch.Generator().manual_seed(0)
        drawn = (torch.randn(*shape, generator=source).mul_(2).add_(0.5) for _ in range(3))
        x, residual, grad = (t.to(getattr(torch, dtype)).contiguous(memory_format=layout) for t in drawn)
        return cls(x.requires_grad_(), residual.requires_grad_(), grad)


def parse_shape(text: str) -> tuple[int, ...]:
    """The shape in a text like "32x64x56x56".

    Raises:
        ValueError: If the text is no shape, no layer has inputs of this shape, or the tensors do not fit in memory.
    """
    axes = text.lower().split("x")
    if not all(axis.isdecimal() for axis in axes):
        raise ValueError(f"a shape must be numbers joined by x, got {text!r}. Write 32x64x56x56, for example.")
    shape = tuple(map(int, axes))
    _check(shape, "float32", channels_last=False)
    return shape


def _memory() -> float:
    """The machine's memory in bytes; infinity if the system does not report it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else inf


def _layer_names() -> dict[int, str]:
    """The layers by the number of their inputs' axes."""
    from batchnorm.layer_checks import SHAPES

    return {ndim: name for name, shapes in SHAPES.items() for ndim in shapes}


def _check(shape: Sequence[int], dtype: str, *, channels_last: bool) -> None:
    text = "x".join(map(str, shape))
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}. Leave dtype out for float32.")
    if len(shape) not in _layer_names() or min(shape) < 1 or prod(shape) == shape[1]:
        raise ValueError(
            f"a shape must be NxC, NxCxL, NxCxHxW or NxCxDxHxW with at least 2 values per channel, got {text}. "
            "Write 32x64x56x56, for example."
        )
    size = 8 if dtype == "float64" else 4  # bytes; half types are drawn as float32
    if (needed := _TENSORS * size * prod(shape)) > (available := _memory()):
        raise ValueError(
            f"{_TENSORS} tensors of a shape must fit in memory, got {text}, which needs {needed / 1e9:.3g} GB of "
            f"{available / 1e9:.3g}. Give a smaller shape."
        )
    if channels_last and len(shape) < 4:
        raise ValueError(
            f"channels_last needs shapes of 4 or 5 axes, got {text}. Leave channels_last out, or give other shapes."
        )


def layers(shape: Sequence[int], dtype: str, case: Case) -> dict[str, nn.Module]:
    """Our layer, with the case's ReLU, and torch.nn's layer; parameters are float32 for half types too."""
    import torch

    from batchnorm import layers as our

    name, kind = _layer_names()[len(shape)], torch.float64 if dtype == "float64" else torch.float32
    act = "relu" if case.relu else None
    pair = {"ours": getattr(our, name)(shape[1], act=act), "torch": getattr(torch.nn, name)(shape[1])}
    return {side: layer.to(kind).train(case.train) for side, layer in pair.items()}


def call(
    case: Case, run: Callable[..., Tensor], parameters: Sequence[Tensor], inputs: CaseInputs
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """One call of ``case``: ``run`` computes y from x, and from a residual if the case has one."""
    import torch

    arguments = (inputs.x, inputs.residual) if case.residual else (inputs.x,)
    differentiated = (*arguments, *parameters)

    def one_call() -> Tensor | tuple[Tensor, ...]:
        with torch.set_grad_enabled(case.backward):
            y = run(*arguments)
            # not y.backward(): it would also add the gradients of x to x.grad, memory traffic that no network has
            return torch.autograd.grad(y, differentiated, inputs.grad) if case.backward else y

    return one_call


def composed(case: Case, layer: Callable[[Tensor], Tensor], *, inplace: bool = False) -> Callable[..., Tensor]:
    """What users of torch.nn write for ``case``: the layer, a sum and a ReLU, which overwrite y if ``inplace``."""
    import torch

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        if residual is not None:
            y = y.add_(residual) if inplace else y + residual
        return y if not case.relu else y.relu_() if inplace else torch.relu(y)

    return run


def contestants(case: Case, inputs: CaseInputs) -> dict[str, Contestant]:
    """Our layer and torch.nn's for the same call, and memory traffic in tensors of the same size."""
    sides = layers(inputs.x.shape, str(inputs.x.dtype).removeprefix("torch."), case)
    runs = {"ours": sides["ours"], "torch": composed(case, sides["torch"])}
    calls = {side: call(case, run, list(sides[side].parameters()), inputs) for side, run in runs.items()}
    return {side: timed(one_call) for side, one_call in calls.items()} | traffic(inputs.x.nbytes)


def traffic(size: int) -> dict[str, Contestant]:
    """Contestants that only move memory, between existing tensors of ``size`` bytes."""
    import torch

    a, b, out = (torch.ones(ceil(size / 4)) for _ in range(3))
    calls = {"copy": lambda: out.copy_(a), "triad": lambda: torch.add(a, b, alpha=2, out=out), "read": a.sum}
    return {name: timed(one_call) for name, one_call in calls.items()}


def short_table(
    shapes: Sequence[Sequence[int]] | None = None,
    dtype: str = "float32",
    *,
    channels_last: bool = False,
    threads: int | None = None,
    rounds: int = ROUNDS,
    progress: Callable[[float], None] = lambda share: None,  # noqa: ARG005
) -> Timings:
    """The environment and, for each shape and case, our time, torch.nn's and the memory limit, as JSON values.

    Args:
        shapes: Shapes of x. By default all of ``SHAPES``, or those with at least 4 axes if ``channels_last``.
        dtype: Type of x; one of ``DTYPES``.
        channels_last: Whether channels are last in memory.
        threads: Threads of torch; by default torch's present number.
        rounds: How often each case is measured; 3 or more.
        progress: Called after each case with the share of cases that are measured, 1 at the end.

    Raises:
        ValueError: If no layer has inputs of a shape, the tensors do not fit in memory, a type or layout is impossible,
            ``threads`` is less than 1, or ``rounds`` is less than 3.
    """
    from batchnorm.experiment.environment import environment

    if shapes is None:
        shapes = [shape for shape in SHAPES if len(shape) > 3 or not channels_last]
    for shape in shapes:
        _check(shape, dtype, channels_last=channels_last)
    rows = []
    with threads_of_torch(threads) as count:
        for shape, name in product(shapes, SHORT):
            inputs = CaseInputs.of(shape, dtype, channels_last=channels_last)
            rows.append(_row(name, inputs, channels_last=channels_last, rounds=rounds))
            progress(len(rows) / (len(shapes) * len(SHORT)))
    return {"schema_version": SCHEMA_VERSION, "environment": environment(), "threads": count, "rows": rows}


def _row(name: str, inputs: CaseInputs, *, channels_last: bool, rounds: int) -> Timing:
    case = CASES[name]
    with others() as busy:
        run = race(contestants(case, inputs), rounds=rounds)
    ratio, to_limit = run.ratio({"torch": 1}, {"ours": 1}), run.ratio({"ours": 1}, case.limit)
    timing: Timing = {
        "case": name,
        "words": case.words,
        "shape": list(inputs.x.shape),
        "dtype": str(inputs.x.dtype).removeprefix("torch."),
        "channels_last": channels_last,
        "rounds": rounds,
        "ours_ms": 1e3 * run.time({"ours": 1}).median,
        "torch_ms": 1e3 * run.time({"torch": 1}).median,
        "limit_ms": 1e3 * run.time(case.limit).median,
        "ratio": ratio.median,
        "ratio_quartiles": [ratio.low, ratio.high],
        "to_limit": to_limit.median,
        "to_limit_quartiles": [to_limit.low, to_limit.high],
    }
    if "others" in busy:
        timing["others"] = busy["others"]
    return timing


@contextmanager
def threads_of_torch(count: int | None) -> Iterator[int]:
    """A block in which torch uses ``count`` threads; None keeps torch's present number.

    Raises:
        ValueError: If ``count`` is less than 1.
    """
    import torch

    if count is not None and count < 1:
        raise ValueError(f"threads must be 1 or more, got {count}. Leave threads out for torch's own number.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def report(data: Timings) -> Report:
    """The measured times as a report, which every output format can show."""
    rows = [(row, "×".join(map(str, row["shape"]))) for row in data["rows"]]
    figures = [
        (shape, row["words"], f"{row['ours_ms']:.3g}", f"{row['torch_ms']:.3g}", f"{row['ratio']:.2f}",
         f"{row['to_limit']:.2f}")
        for row, shape in rows
    ]  # fmt: skip
    lines = [f"{shape}: {row['case']}: {_in_words(row)}" for row, shape in rows]
    text = json.dumps(data, indent=1)
    busy = max(row.get("others", 0.0) for row in data["rows"])
    notes = [f"Other programs used up to {busy:.0%} of the machine: repeat the command when they have ended."]
    return Report(
        command="batchnorm bench", target="batch norm layers", headline=f"{many(len(rows), 'case')} against torch.nn",
        json=lambda: text, records=json.loads(text)["rows"], lines=lines, notes=notes if busy > BUSY else (),
        document=[TextTable(_COLUMNS, figures, words=2), *map(Text, notes if busy > BUSY else ()), Text(_LEGEND)],
        rows=[Row(rule=row["case"], severity=Severity.INFO, place=shape, words=f"{shape}: {_in_words(row)}")
              for row, shape in rows],
        rules=[RuleWords(code=name, title=f"{CASES[name].words}, timed.") for name in SHORT],
        suites=[Suite(name="bench", checks=[Check(name=f"{shape} {row['case']}", output=_in_words(row))
                                            for row, shape in rows])],
    )  # fmt: skip


def _in_words(row: Timing) -> str:
    return (
        f"{row['words']}: ours {row['ours_ms']:.3g} ms, torch.nn {row['torch_ms']:.3g} ms: ours is "
        f"{row['ratio']:.2f} times as fast and takes {row['to_limit']:.2f} times the memory limit"
    )


def write(data: Mapping[str, Json], path: str | os.PathLike[str]) -> None:
    """Write JSON to ``path``; if an error is raised, no file is written or changed.

    Raises:
        ValueError: If a number is NaN or infinite.
        OSError: If the file cannot be written.
    """
    path = Path(path).resolve()
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())
