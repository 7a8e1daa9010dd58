"""The layers' conformance table: options, properties that a layer keeps under each option, and the page with the ticks.

    python -m conformance        (in the folder tests) writes docs/conformance.md

``test_conformance`` runs every cell: a tick is a property that was checked; a number is an exception, seen to fail.
"""

from __future__ import annotations

import copy
import io
import pickle
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layouts import LAYOUTS
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from batchnorm import step, step_backward
from batchnorm.kernels import choice
from batchnorm.kernels.activations import activate
from batchnorm.kernels.reference import wide_dtype
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.variants.renorm import Renorm

PAGE = Path(__file__).parent.parent / "docs" / "conformance.md"
C = 3
SHAPES: dict[str, tuple[type, tuple[int, ...]]] = {
    "(N, C)": (BatchNorm1d, (12, C)),
    "(N, C, L)": (BatchNorm1d, (6, C, 8)),
    "(N, C, H, W)": (BatchNorm2d, (6, C, 4, 3)),
    "(N, C, D, H, W)": (BatchNorm3d, (6, C, 2, 3, 2)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RMAX, DMAX, GHOST, OWN = 1.25, 0.25, 3, 0.25
Keywords = dict[str, Any]


# --- options ----------------------------------------------------------------------------------------------


def valid_positions(x: Tensor) -> Tensor:
    """A mask (N, ...) with some padding; the first two examples are valid."""
    positions = torch.arange(x[:, 0].numel()).reshape(x.shape[0], *x.shape[2:])
    return (positions % 5 != 3) | (torch.arange(x.shape[0]) < 2).reshape(-1, *[1] * (x.ndim - 2))


def few_weights(x: Tensor) -> Tensor:
    """A weight for each example, 0 among them."""
    return 1 + torch.arange(x.shape[0]) % 3 / 2.0 - (torch.arange(x.shape[0]) == 1).float()


def some_lengths(x: Tensor) -> Keywords:
    """Lengths along axis 2."""
    return {"lengths": 1 + (torch.arange(x.shape[0]) * 3) % x.shape[2], "length_axis": 2}


def some_residual(x: Tensor) -> Keywords:
    """A residual of the input's type."""
    return {"residual": torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype)}


@dataclass(frozen=True)
class Option:
    """A way to use a layer.

    Args:
        settings: Arguments of the class.
        arguments: Further arguments of a call, from its input.
        least_axes: Least number of axes of an input.
        dtypes: Types of inputs and layers, the widest first.
        normalized: Called with the layer, x and the counts in float64, in place of ``by_moments``.
    """

    settings: Keywords = field(default_factory=dict)
    arguments: Callable[[Tensor], Keywords] = lambda x: {}
    least_axes: int = 2
    dtypes: tuple[torch.dtype, ...] = DTYPES
    normalized: Callable[[Any, Tensor, Tensor], Tensor] | None = None


def expected(option: Option, layer: nn.Module, x: Tensor, arguments: Keywords) -> tuple[Tensor, Tensor, Tensor]:
    """y and the stored statistics afterwards, in float64, from the formulas of the documentation alone."""
    counts = counts_of(x, arguments)
    after = stored = stored_in(layer)
    if layer.training:
        (mean, var), total, m = moments(x, counts), counts.expand_as(x).sum(others(x)), layer.momentum
        after = stored[0] * (1 - m) + m * mean, stored[1] * (1 - m) + m * var * total / (total - 1)
    p = (option.normalized or by_moments)(layer, x, counts)
    p = p * along(wide(layer.weight), x) + along(wide(layer.bias), x)
    y = activate(p + arguments.get("residual", 0), layer.act, layer.act_param)
    is_padding = padding_in(x, arguments) if layer.padding == "zero" else None
    return (y if is_padding is None else torch.where(is_padding, 0, y)), *(t.detach() for t in after)


def stored_in(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return wide(layer.running_mean), layer.running_var.double()


def wide(t: Tensor) -> Tensor:
    """A tensor in float64 or complex128."""
    return t.to(torch.complex128) if t.is_complex() else t.double()


def moments(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, if each value counts as ``counts`` values."""
    total = counts.expand_as(x).sum(others(x))
    mean = (counts * x).sum(others(x)) / total
    return mean, (counts * (x - along(mean, x)).abs() ** 2).sum(others(x)) / total


def by_moments(layer: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + eps), of the batch or, in eval mode, as stored."""
    mean, var = moments(x, counts) if layer.training else stored_in(layer)
    return (x - along(mean, x)) / (along(var, x) + layer.eps).sqrt()


def by_renorm(layer: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """r z + d: Ioffe 2017, algorithm 1, with RMAX and DMAX."""
    z = by_moments(layer, x, counts)
    if not layer.training:
        return z
    (mean, var), (stored, stored_var) = moments(x.detach(), counts), stored_in(layer)
    sigma = (stored_var + layer.eps).sqrt()
    r = ((var + layer.eps).sqrt() / sigma).clamp(1 / RMAX, RMAX)
    return z * along(r, x) + along(((mean - stored) / sigma).clamp(-DMAX, DMAX), x)


def by_ghost_batches(layer: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """Each of K ghost batches by its own moments: example i is in ghost batch i mod K."""
    if not layer.training:
        return by_moments(layer, x, counts)
    ghosts, y = -(-len(x) // GHOST), torch.empty_like(x)
    counts = counts.expand(len(x), *counts.shape[1:])
    for k in range(ghosts):
        y[k::ghosts] = by_moments(layer, x[k::ghosts], counts[k::ghosts])
    return y


def by_own_weight(layer: nn.Module, x: Tensor, counts: Tensor) -> Tensor:
    """In eval mode each example by a mixture of its own moments and the stored ones: Summers and Dinneen 2020."""
    if layer.training:
        return by_moments(layer, x, counts)
    mean, var = stored_in(layer)
    rows = []
    for example in x.split(1):
        own_mean, own_var = moments(example, torch.ones([1] * x.ndim))
        mixed = OWN * own_mean + (1 - OWN) * mean
        spread = OWN * own_var + (1 - OWN) * var + OWN * (1 - OWN) * (own_mean - mean) ** 2
        rows.append((example - along(mixed, x)) / (along(spread, x) + layer.eps).sqrt())
    return torch.cat(rows)


def padding_in(x: Tensor, arguments: Keywords) -> Tensor | None:
    if "mask" in arguments:
        return ~arguments["mask"].reshape(x.shape[0], 1, *x.shape[2:])
    if "lengths" in arguments:
        positions = torch.arange(x.shape[2]).reshape(-1, *[1] * (x.ndim - 3))
        return positions >= arguments["lengths"].reshape(-1, *[1] * (x.ndim - 1))
    return None


def counts_of(x: Tensor, arguments: Keywords) -> Tensor:
    """How many values each value counts as."""
    if "counts" in arguments:
        return arguments["counts"]
    padding = padding_in(x, arguments)
    counts = torch.ones([1] * x.ndim, dtype=torch.float64) if padding is None else (~padding).double()
    if "weight" in arguments:
        counts = counts * arguments["weight"].double().reshape(-1, *[1] * (x.ndim - 1))
    return counts


def along(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def others(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


OPTIONS: dict[str, Option] = {
    "plain": Option(),
    "act, residual": Option({"act": "leaky_relu"}, some_residual),
    'memory="save"': Option({"memory": "save", "act": "leaky_relu"}),
    "mask": Option(arguments=lambda x: {"mask": valid_positions(x)}),
    "lengths": Option(arguments=some_lengths, least_axes=3),
    "weight": Option(arguments=lambda x: {"weight": few_weights(x)}),
    'padding="keep"': Option({"padding": "keep"}, lambda x: {"mask": valid_positions(x)}),
    "axis=-1": Option({"axis": -1}),
    "axis=-1, mask": Option({"axis": -1}, lambda x: {"mask": valid_positions(x)}),
    "renorm": Option({"renorm": Renorm(RMAX, DMAX)}, normalized=by_renorm),
    "ghost_batch_size": Option({"ghost_batch_size": GHOST}, normalized=by_ghost_batches),
    "own_weight": Option({"own_weight": OWN}, normalized=by_own_weight),
    "complex": Option(dtypes=(torch.complex128, torch.complex64)),
}


class Call(nn.Module):
    """Calls a layer for an input (N, C, ...), wherever the layer has its channels; tensors are given by position."""

    def __init__(self, layer: nn.Module, arguments: Keywords) -> None:
        super().__init__()
        self.layer, self.arguments = layer, arguments
        self.names = [name for name, value in arguments.items() if torch.is_tensor(value)]

    def forward(self, x: Tensor, *values: Tensor) -> Tensor:
        arguments = self.arguments | dict(zip(self.names, values, strict=False))
        if self.layer.axis == 1 or x.ndim == 2:
            return self.layer(x, **arguments)
        y = self.layer(x.permute(0, *range(2, x.ndim), 1), **arguments)
        return y.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def inputs_of(option: Option) -> list[tuple[type, tuple[int, ...]]]:
    return [(kind, shape) for kind, shape in SHAPES.values() if len(shape) >= option.least_axes]


def made(option: Option, kind: type, dtype: torch.dtype | None = None, *, training: bool = True) -> nn.Module:
    """A layer with parameters and stored statistics that are not at their initial values."""
    layer = kind(C, dtype=dtype or option.dtypes[0], **option.settings).train(training)
    with torch.no_grad():
        for t, low, high in (
            (layer.weight, 0.5, 2), (layer.bias, -1, 1), (layer.running_mean, 1, 3), (layer.running_var, 2, 6),
        ):  # fmt: skip
            t.copy_(torch.linspace(low, high, C) * (1 + 0.5j if t.is_complex() else 1))
    return layer


def batch(option: Option, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    return (2 + 2 * torch.randn(shape, dtype=option.dtypes[0])).to(dtype or option.dtypes[0])


def right(option: Option, layer: nn.Module, x: Tensor, arguments: Keywords) -> tuple[Tensor, Tensor, Tensor]:
    exact = {name: wide(t) for name, t in arguments.items() if torch.is_tensor(t) and t.is_floating_point()}
    return expected(option, layer, wide(x), arguments | exact)


def close(found: Tensor, value: Tensor, dtype: torch.dtype) -> None:
    """Within 64 roundings of the arithmetic and 2 of the type, of the largest number that the formula adds."""
    size = value.detach().abs().max() + 8  # gamma z and beta are below 8
    u = 64 * torch.finfo(wide_dtype(dtype)).eps + 2 * torch.finfo(dtype).eps
    assert found.shape == value.shape
    assert (wide(found) - wide(value)).abs().max() <= u * size


# --- properties -------------------------------------------------------------------------------------------


def agrees_with_the_formula(option: Option, *, training: bool, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    for kind, shape in inputs_of(option):
        for dtype in dtypes or option.dtypes:
            layer, x = made(option, kind, dtype, training=training), batch(option, shape, dtype)
            check(option, layer, x, x)


def check(option: Option, layer: nn.Module, x: Tensor, given: Tensor) -> None:
    """Result, gradients and stored statistics of a layer on ``given``, whose values are those of ``x``."""
    arguments = option.arguments(x)
    twin, exact = copy.deepcopy(layer).to(option.dtypes[0]), wide(x.detach()).clone().requires_grad_()
    value, *after = right(option, twin, exact, arguments)
    grad = torch.linspace(-1, 1, x.numel()).reshape(x.shape).to(x.dtype)
    leaf = given.detach().requires_grad_()
    y = Call(layer, arguments)(leaf.clone(memory_format=torch.preserve_format) if layer.memory else leaf)
    assert y.dtype == x.dtype
    close(y, value, x.dtype)
    wanted = torch.autograd.grad(value, (exact, twin.weight, twin.bias), wide(grad))
    found = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), grad)
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs, x.dtype)
    for stored, theirs in zip((layer.running_mean, layer.running_var), after, strict=True):
        close(stored, theirs, x.dtype if x.dtype in {torch.float64, torch.complex128} else torch.float32)


def any_layout(option: Option) -> None:
    for kind, shape in inputs_of(option):
        for layout in LAYOUTS:
            given, layer = layout(batch(option, shape)), made(option, kind)
            layer.eps = 1.0  # the variance of an expanded tensor may be 0
            check(option, layer, given, given)


def empty_batches_change_nothing(option: Option) -> None:
    for kind, shape in inputs_of(option):
        layer = made(option, kind)
        before = copy.deepcopy(layer.state_dict())
        x = torch.zeros(0, *shape[1:], dtype=option.dtypes[0], requires_grad=True)
        y = Call(layer, option.arguments(x.detach()))(x)
        y.abs().sum().backward()
        assert y.shape == x.grad.shape == x.shape
        assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())


def autocast_leaves_types_alone(option: Option) -> None:
    for kind, shape in inputs_of(option):
        x = batch(option, shape, option.dtypes[1])
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(Call(made(option, kind, x.dtype), option.arguments(x))(x.clone()))
        assert torch.equal(*results)


def kernels_agree(option: Option) -> None:
    """The reference kernels, which BATCHNORM_KERNELS=reference selects, compute the same."""
    before = choice._FORCED
    try:
        choice._FORCED = "reference"
        for training in (True, False):
            agrees_with_the_formula(option, training=training, dtypes=option.dtypes[1:2])
    finally:
        choice._FORCED = before


def compiles_whole(option: Option) -> None:
    for kind, shape in inputs_of(option)[1:2]:
        for training in (True, False):
            torch.compiler.reset()
            layer, twin, x = (
                made(option, kind, training=training),
                made(option, kind, training=training),
                batch(option, shape),
            )
            run = torch.compile(Call(layer, option.arguments(x)), fullgraph=True, backend="aot_eager")
            same_step(run, layer, Call(twin, option.arguments(x)), x)


def same_step(run: Callable[[Tensor], Tensor], layer: nn.Module, twin: Call, x: Tensor) -> None:
    """A forward and backward pass of ``run``, which calls the layer, and of its twin give the same."""
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, call in zip(leaves, (run, twin), strict=True):
        call(leaf).abs().square().sum().backward()
    close(leaves[0].grad, leaves[1].grad, x.dtype)
    for mine, theirs in zip(layer.state_dict().values(), twin.layer.state_dict().values(), strict=True):
        close(mine, theirs, x.dtype)


def exports(option: Option) -> None:
    """torch.export in both modes: the train program moves the statistics with the layer's momentum and eps."""
    for kind, shape in inputs_of(option)[1:2]:
        for training in (True, False):
            x = batch(option, shape)
            call, twin = (Call(made(option, kind, training=training), option.arguments(x)) for _ in range(2))
            program = torch.export.export(call.train(training), (x,)).module()
            close(program(x), twin(x.clone()), x.dtype)
            for name in ("running_mean", "running_var"):
                close(program.state_dict()[f"layer.{name}"], twin.layer.state_dict()[name], x.dtype)


def runs_in_onnx(option: Option) -> None:
    """The eval result of onnxruntime, from an ONNX program of opset 17."""
    import onnxruntime

    for kind, shape in inputs_of(option)[1:2]:
        x = batch(option, shape, option.dtypes[1])
        layer, arguments = made(option, kind, x.dtype, training=False), option.arguments(x)
        tensors = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
        call = Call(layer, arguments).eval()
        file, names = io.BytesIO(), ["x", *tensors]
        torch.onnx.export(call, (x, *tensors.values()), file, dynamo=False, opset_version=17, input_names=names)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        present = {node.name for node in session.get_inputs()}
        feeds = {name: t.numpy() for name, t in {"x": x, **tensors}.items() if name in present}
        found = torch.from_numpy(session.run(None, feeds)[0])
        close(found, call(x.clone()).detach(), torch.float32)


def is_vectorized(option: Option) -> None:
    """vmap over two models gives the results of each, in both modes."""
    for kind, shape in inputs_of(option)[1:2]:
        for training in (True, False):
            x = batch(option, shape)
            calls = [Call(made(option, kind, training=training), option.arguments(x)) for _ in range(2)]
            with torch.no_grad():
                calls[1].layer.weight.mul_(2)
            values = torch.stack([call(x.clone()) for call in copy.deepcopy(calls)])
            parameters, buffers = stack_module_state(calls)
            one = copy.deepcopy(calls[0])
            found = vmap(lambda p, b, x, one=one: functional_call(one, (p, b), (x,)), (0, 0, None))
            close(found(parameters, buffers, x), values, x.dtype)


def has_functional_gradients(option: Option) -> None:
    kind, shape = inputs_of(option)[1]
    x = batch(option, shape)
    call, twin = (Call(made(option, kind), option.arguments(x)) for _ in range(2))
    leaf = x.clone().requires_grad_()
    twin(leaf).abs().square().sum().backward()
    close(torch.func.grad(lambda x: call(x).abs().square().sum())(x), leaf.grad, x.dtype)


def has_second_derivatives(option: Option) -> None:
    layer, x = made(option, BatchNorm1d), batch(option, (4, C, 3)).requires_grad_()
    layer.running_mean.fill_(100)  # so far away that all corrections of renorm are at their limits, and constant
    layer.running_var.fill_(0.01)
    layer.momentum = 0.0
    call = Call(layer, option.arguments(x.detach()))
    assert torch.autograd.gradgradcheck(lambda x: call(x * 1), (x,))


def a_whole_step_is_one_batch(option: Option) -> None:
    """step_backward on two micro-batches: gradients and stored statistics of one batch of all their values."""
    for kind, shape in inputs_of(option):
        layer, twin, x = made(option, kind), made(option, kind), batch(option, (2 * shape[0], *shape[1:]))
        micros = x.chunk(2)
        parts = [option.arguments(micro) for micro in micros]
        joined = {k: torch.cat([p[k] for p in parts]) if torch.is_tensor(v) else v for k, v in parts[0].items()}
        step_backward(
            Call(layer, {}), micros, lambda y, _: y.abs().pow(3).sum(), reduction="sum",
            forward=lambda model, micro: Call(model.layer, option.arguments(micro))(micro),
        )  # fmt: skip
        Call(twin, joined)(x).abs().pow(3).sum().backward()
        for found, value in ((layer.weight, twin.weight), (layer.bias, twin.bias)):
            close(found.grad, value.grad, x.dtype)
        for name, value in twin.state_dict().items():
            close(layer.state_dict()[name], value, x.dtype)


def copies_are_the_same(option: Option) -> None:
    for kind, shape in inputs_of(option):
        layer, x = made(option, kind), batch(option, shape)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
        y = Call(layer, option.arguments(x))(x.clone())
        for other in copies:
            assert repr(other) == repr(made(option, kind))
            assert torch.equal(Call(other, option.arguments(x))(x.clone()), y)


def state_is_torchs(option: Option) -> None:
    """The five keys of torch.nn's layer, which loads the state, and whose state loads."""
    for kind, _ in inputs_of(option):
        layer = made(option, kind)
        theirs = next(c for c in kind.__mro__ if c.__module__.startswith("torch.nn"))(C, dtype=option.dtypes[0])
        assert list(layer.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(layer.state_dict())
        layer.load_state_dict(theirs.state_dict())


def recomputation_stores_nothing(option: Option) -> None:
    for kind, shape in inputs_of(option):
        for reentrant in (True, False):
            x = batch(option, shape)
            call, twin = (Call(made(option, kind), option.arguments(x)) for _ in range(2))
            same_step(partial(checkpoint, call, use_reentrant=reentrant), call.layer, twin, x)


def a_step_stores_the_union(option: Option) -> None:
    """Two micro-batches in bn.step: the stored statistics are those of one batch of all their values."""
    for kind, shape in inputs_of(option):
        layer, x = made(option, kind), batch(option, (2 * shape[0], *shape[1:]))
        micros = x.chunk(2)
        plain = Option(dtypes=option.dtypes)
        one = made(plain, kind)
        one.momentum, joined = layer.momentum, [counts_of(micro, option.arguments(micro)) for micro in micros]
        _, *after = expected(plain, one, x, {"counts": torch.cat([c.expand_as(micros[0]) for c in joined])})
        with step(layer):
            for micro in micros:
                Call(layer, option.arguments(micro))(micro)
        for found, value in zip((layer.running_mean, layer.running_var), after, strict=True):
            close(found, value, x.dtype)
        assert int(layer.num_batches_tracked) == 1


PROPERTIES: dict[str, Callable[[Option], None]] = {
    "formula, train, four types": partial(agrees_with_the_formula, training=True),
    "formula, eval, four types": partial(agrees_with_the_formula, training=False),
    "contiguous, channels_last, strided, expanded inputs": any_layout,
    "empty batches": empty_batches_change_nothing,
    "reference kernels": kernels_agree,
    "autocast": autocast_leaves_types_alone,
    "torch.compile(fullgraph=True)": compiles_whole,
    "torch.export, train and eval": exports,
    "ONNX (opset 17, eval) in onnxruntime": runs_in_onnx,
    "vmap over models": is_vectorized,
    "torch.func.grad": has_functional_gradients,
    "second derivatives": has_second_derivatives,
    "activation checkpointing, reentrant or not": recomputation_stores_nothing,
    "micro-batches in bn.step": a_step_stores_the_union,
    "micro-batches in bn.step_backward": a_whole_step_is_one_batch,
    "copies and pickles": copies_are_the_same,
    "state_dict of torch.nn": state_is_torchs,
}


@dataclass(frozen=True)
class Exempt:
    """A property that does not hold under an option: the error that shows it, and the reason."""

    error: type[Exception]
    match: str
    reason: str


EXCEPTIONS: dict[tuple[str, str], Exempt] = {
    ("micro-batches in bn.step_backward", "ghost_batch_size"): Exempt(
        ValueError, "needs layers that normalize whole batches",
        "Ghost batches are parts of a micro-batch, so a step has nothing to join. Use `bn.step`.",
    ),
    ("ONNX (opset 17, eval) in onnxruntime", "complex"): Exempt(
        RuntimeError, "unexpected tensor scalar type", "ONNX has no operators on complex numbers."
    ),
    ("state_dict of torch.nn", "complex"): Exempt(
        RuntimeError, "Casting complex values", "torch.nn's layers have no complex statistics."
    ),
    ("second derivatives", 'memory="save"'): Exempt(
        RuntimeError, "wrote the result over the input",
        "The result was written over the input, which second derivatives need. Set `memory=None`.",
    ),
}  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------

INTRODUCTION = f"""# Conformance

What holds for the layers under each option. `tests/test_conformance.py` runs every cell: a tick is a check that
passed, and a number leads to the reason below the table. Inputs are {", ".join(f"`{shape}`" for shape in SHAPES)};
compilers, exporters and transforms are checked on `(N, C, L)`. "Formula" compares result, gradients and stored
statistics with the formula in float64, for inputs of float64, float32, bfloat16 and float16, within 64 roundings of the
arithmetic and 2 of the type.

"""

CAPABILITIES = """## Capabilities

Libraries of batch normalization in autumn 2026, as their sources say. A test shows each capability of this package.

| capability | others | this package | tests |
|---|---|---|---|
"""


def page() -> str:
    """The table in Markdown, with the reasons of its exceptions."""
    reasons = list(dict.fromkeys(exempt.reason for exempt in EXCEPTIONS.values()))

    def cell(name: str, option: str) -> str:
        exempt = EXCEPTIONS.get((name, option))
        return "✓" if exempt is None else str(1 + reasons.index(exempt.reason))

    head = f"| | {' | '.join(f'`{option}`' for option in OPTIONS)} |\n|---|{'---|' * len(OPTIONS)}\n"
    rows = (f"| {name} | {' | '.join(cell(name, option) for option in OPTIONS)} |\n" for name in PROPERTIES)
    notes = (f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    return f"{INTRODUCTION}{head}{''.join(rows)}\n{''.join(notes)}\n{_capabilities()}"


def capabilities() -> list[dict[str, Any]]:
    """The rows of capabilities.toml."""
    return tomllib.loads((Path(__file__).parent / "capabilities.toml").read_text())["capability"]


def _capabilities() -> str:
    rows = (
        f"| {row['name']} | {row['others']} | {row['ours']} | {', '.join(f'`{test}`' for test in row['tests'])} |\n"
        for row in capabilities()
    )
    return f"{CAPABILITIES}{''.join(rows)}"


if __name__ == "__main__":
    PAGE.write_text(page())
