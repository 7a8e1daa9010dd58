"""Measurement: runs a model on data and measures it and its batch norm layers, without changing the model.

One pass in eval mode measures every layer's inputs. Then one example runs alone and among others, and one training step
is tried. The statistics of a layer's inputs are those of eval mode: the layers before it normalize by their stored
statistics.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from batchnorm.call_types import Arguments, Batch
from batchnorm.channel_axis import channels_second
from batchnorm.doctor.measuring.batch_clustering import order_p
from batchnorm.doctor.measuring.layer_inputs import InputMeasurement, is_measurable, plain
from batchnorm.doctor.measuring.live_layers import layers_of
from batchnorm.doctor.measuring.short_runs import BatchDependence, Step, batch_dependence, example_subset, train_step
from batchnorm.inputs import InputNorm
from batchnorm.layers import batch_norms
from batchnorm.moments import Moments
from batchnorm.padded_batches import valid_mask
from batchnorm.population.absent_numbers import require_real
from batchnorm.population.batches import Batches, call, device_of, on_device_of
from batchnorm.population.eager import own_run
from batchnorm.population.eval_mode import to_eval
from batchnorm.population.hooks import attached
from batchnorm.population.state_shield import preserve_random_state, preserve_state
from batchnorm.population.tensor_trees import examples_in, tensors_in
from batchnorm.rules.rule_evidence import Loop, MeasuredLayer, Run

# inputs with more features are pixels, tokens or positions, not columns of a table
_MOST_FEATURES = 4096
_COLUMNS = 64  # channels in the permutation test, all layers together
_SUSPECT = 1e-3  # if an F test's p is below this, the permutation test runs
_NOT_DENSE = "its input is not a dense floating-point tensor with channels"
# these functions take ``training`` as their sixth argument
_MEASURE_BATCHES = {
    F.batch_norm,
    torch.batch_norm,
    torch.native_batch_norm,
    torch.ops.aten.batch_norm.default,
    torch.ops.aten.native_batch_norm.default,
    torch.ops.aten._native_batch_norm_legit.default,
    torch.ops.aten._native_batch_norm_legit.no_stats,
}


def measure(
    model: nn.Module, data: Iterable[Batch], *, max_examples: int | None
) -> tuple[dict[str, MeasuredLayer], Run, str, Batch]:
    """Measurements of every layer and of the whole model, a description ("512 examples in 8 batches"), and a batch.

    The batch is a copy of the loader's first batch.

    Layers are in the order in which they first ran. Layers that did not run, lazy layers without a shape, and layers
    without a dense floating-point input are left out. The model, its gradients and the random states are as before, bit
    for bit, also if the model raises.

    Args:
        model: Runs in eval mode, and on a few examples for one step in train mode.
        data: Batches as for ``recalibrate``. An iterator is read into memory first.
        max_examples: Largest number of examples; the last batch is cut. None: all are used.

    Raises:
        TypeError: If ``data`` is not an iterable of batches.
        ValueError: If there is no batch, its examples cannot be counted, the model computes gradients, or values that
            it needs cannot be read.
        Exception: Errors of the model in eval mode.
    """
    require_real(model, "examine")
    batches = Batches(data, max_examples, device_of(model), who="examine")
    with preserve_state(model), preserve_random_state(*batches.generators), own_run(), torch.no_grad():
        to_eval(model)
        view = _View(model)
        with view.hooks(), _without_gradients():
            for batch in batches:
                view.see(batch)
        subset = example_subset(model, view.first)
        if subset.uncut:
            view.rows_are_no_examples()
        alone = batch_dependence(model, subset)
        step = train_step(model, subset)
    run = replace(_run_of(view, alone, step), unknown=_unknown(view, alone, step, is_scripted=_is_scripted(model)))
    order = [name for name in view.calls if view.gauges[name].values]
    measured = {name: view.gauges[name].measured() for name in order}
    return measured, replace(run, order_p=view.order_p(measured)), view.summary(), view.first


def _run_of(view: _View, alone: BatchDependence, step: Step) -> Run:
    is_raw = view.not_raw is None and bool(view.inputs.count.any())
    return Run(
        never_ran=tuple(name for name in view.gauges if not view.calls[name]),
        updates_forward=step.forward,
        updates_backward=step.backward,
        functional=tuple(view.functional),
        companions=alone.change,
        companions_tolerance=alone.tolerance,
        alone_error=alone.error,
        train_error=step.error,
        input_scales=plain(view.inputs.std) if is_raw else None,
        input_means=plain(view.inputs.mean) if is_raw else None,
        unwatched=view.unwatched,
        unmeasured=view.unmeasured(),
    )


def _unknown(view: _View, alone: BatchDependence, step: Step, *, is_scripted: bool) -> dict[str, str]:
    """The parts of a run that are not known, with the reason."""
    unknown = {
        "companions": alone.unknown,
        "step": step.unknown,
        "backward": step.no_backward,
        "functional": "scripted code cannot be inspected" if is_scripted else "",
        "inputs": "the model gets no tensor that can be observed" if view.not_raw is None else view.not_raw,
    }
    return {part: why for part, why in unknown.items() if why}


@contextmanager
def _without_gradients() -> Iterator[None]:
    """A block without gradients. If the model computes gradients in it, the error has a remedy."""
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            f"examine runs a model without gradients, got a model that computes gradients in its forward: {error}. "
            "Put torch.enable_grad() around that part of its forward."
        ) from error


class _View:
    """Everything observed in a model's runs over the data."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layers = batch_norms(model)
        columns = max(1, _COLUMNS // max(1, len(layers)))
        self.gauges = {name: InputMeasurement(layer, columns=columns) for name, layer in layers.items()}
        self.calls: Counter[str] = Counter()  # keys in the order of first calls
        self.examples = 0
        self.batches = 0
        self.first: Batch = None  # a copy of the first batch
        self.functional: dict[str, None] = {}
        self.inputs = Moments.empty()
        # None while inputs are measured; else the reason why they are not; "" if the model normalizes them first
        self.not_raw: str | None = None
        self._lazy = {name for name, gauge in self.gauges.items() if isinstance(gauge.layer, LazyModuleMixin)}
        self._entering: Tensor | None = None
        self._size = 0  # examples in the current batch

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """A block in which the model is observed."""
        normalizers = [module for module in self.model.modules() if isinstance(module, (InputNorm, _BatchNorm))]
        # the model's hook comes first: if the model is a single layer, all hooks are on the same module
        hooks = [
            (self.model, self._enter),
            *((module, self._normalize) for module in normalizers),
            *((gauge.layer, partial(self._gauge, name)) for name, gauge in self.gauges.items()),
        ]
        takers = [(module, hook) for module, hook in hooks if _takes_hooks(module)]
        with attached(module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in takers):
            yield

    def see(self, batch: Batch) -> None:
        """Run the model on one batch."""
        self._size = examples_in(batch) or 0
        self.examples += self._size
        self.batches += 1
        before = Counter(self.calls)
        if self.first is None:
            self.first = on_device_of(self.model, batch)
            with _functional_calls(self.model, self.functional):
                call(self.model, batch)
        else:
            call(self.model, batch)
        for name in self.calls:
            self.gauges[name].is_clusterable &= self.calls[name] - before[name] < 2

    def summary(self) -> str:
        """A description of the data: "512 examples in 8 batches"."""
        examples = "1 example" if self.examples == 1 else f"{self.examples} examples"
        return f"{examples} in {'1 batch' if self.batches == 1 else f'{self.batches} batches'}"

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        x = self._entering = next(iter(tensors_in((args, kwargs))), None)
        if self.not_raw is None:
            self.not_raw = _not_features(x)
        if x is not None and self.not_raw is None:
            new = Moments.of(x, mask=torch.isfinite(x))
            if self.inputs.shape in {torch.Size(), new.shape}:
                self.inputs = self.inputs + new
            else:
                self.not_raw = "batches have different numbers of features"

    def _normalize(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        if any(x is self._entering for x in tensors_in((args, kwargs))):
            self.not_raw = ""

    def rows_are_no_examples(self) -> None:
        """Exclude all layers from the comparison of batches: rows are nodes, points or edges."""
        for gauge in self.gauges.values():
            gauge.is_clusterable = False

    def order_p(self, measured: dict[str, MeasuredLayer]) -> float | None:
        """p of the permutation test over all layers; None if no F test gave a reason to run it."""
        p = {name: layer.clustering_p for name, layer in measured.items() if layer.clustering_p is not None}
        if not p or min(p.values()) >= _SUSPECT:
            return None
        suspect = self.gauges[min(p, key=lambda name: p[name])].rows
        rows = [self.gauges[name].rows for name in p]
        # only layers that ran on batches of the same sizes
        alike = [each for each in rows if list(map(len, each)) == list(map(len, suspect))]
        return order_p([torch.cat(layers, 1) for layers in zip(*alike, strict=True)])

    @property
    def unwatched(self) -> tuple[str, ...]:
        """Layers whose calls cannot be observed."""
        return tuple(name for name in layers_of(self.model) if name not in self.gauges)

    def unmeasured(self) -> dict[str, str]:
        """Layers that ran without a measurement or cannot be observed, each with the reason."""
        ran = [name for name in self.calls if not self.gauges[name].values]
        closed = dict.fromkeys(self.unwatched, "it cannot be observed by hooks")
        return closed | {name: "it is lazy" if name in self._lazy else _NOT_DENSE for name in ran}

    def _gauge(self, name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls[name] += 1
        # a user's class may give its input any name, and may have further inputs
        x = next(filter(is_measurable, tensors_in((args, kwargs))), None)
        if x is not None and name not in self._lazy:
            layer = self.gauges[name].layer
            x = channels_second(layer, x)
            self.gauges[name].add(x, self._size, valid_mask(layer, x, kwargs))


def _not_features(x: Tensor | None) -> str | None:
    """Why an input is not a table of features; None if it is one."""
    if x is None:
        return "the model gets no tensor"
    if not is_measurable(x):
        return "inputs are not floating-point features"
    return None if 0 < x.shape[1] <= _MOST_FEATURES else f"inputs have more than {_MOST_FEATURES} features, or none"


def _is_scripted(model: nn.Module) -> bool:
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


def _takes_hooks(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


@contextmanager
def _functional_calls(model: nn.Module, found: dict[str, None]) -> Iterator[None]:
    """A block that adds to ``found`` the names of modules whose own code calls batch norm with batch statistics."""
    names = {module: name for name, module in model.named_modules()}
    running: list[nn.Module] = []

    def enter(module: nn.Module, _: object) -> None:
        running.append(module)

    def leave(module: nn.Module, *_: object) -> None:
        if running and running[-1] is module:  # a module is missing if it raised before our hook ran
            running.pop()

    def see() -> None:
        if running and not isinstance(running[-1], _BatchNorm):
            found[names[running[-1]]] = None

    takers = list(filter(_takes_hooks, names))
    enters = (module.register_forward_pre_hook(enter) for module in takers)
    leaves = (module.register_forward_hook(leave, always_call=True) for module in takers)
    with attached(chain(enters, leaves)), _Calls(see):
        yield


class _Calls(TorchFunctionMode):
    """A block that reports every call of batch norm with batch statistics."""

    def __init__(self, report: Callable[[], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(self, func: Any, types: object, args: Arguments = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _MEASURE_BATCHES and (kwargs["training"] if "training" in kwargs else args[5:6] == (True,)):
            self._report()
        return func(*args, **kwargs)


def loop_of(data: Batch, *, batch_size: int | None = None, accumulation: int = 1, world_size: int = 1) -> Loop | None:
    """The training loop's settings, by a loader or list of batches and the arguments; None if nothing is known.

    Args:
        data: A DataLoader, or a list of two or more batches. Other data say nothing about the loop.
        batch_size: Examples per device; replaces the loader's.
        accumulation: Batches per optimizer step.
        world_size: Processes that train together.
    """
    size, last = _sizes(data, batch_size)
    if size is None and accumulation == world_size == 1:
        return None
    return Loop(size, last, accumulation, world_size)


def _sizes(data: Batch, wanted: int | None) -> tuple[int | None, int | None]:
    """Examples in a batch, and in the last batch; None if not known."""
    if isinstance(data, torch.utils.data.DataLoader):
        source = data if data.batch_size is not None else data.batch_sampler
        size = wanted or getattr(source, "batch_size", None)
        examples = _length(getattr(data.batch_sampler, "sampler", data.sampler))
        if not isinstance(size, int) or examples is None:
            return size if isinstance(size, int) else None, None
        return size, size if getattr(source, "drop_last", False) else examples % size or size
    if isinstance(data, Sequence) and not isinstance(data, (str, bytes)) and len(data) > 1:
        sizes = [size for batch in (data[0], data[-1]) if (size := examples_in(batch))]
        if len(sizes) == 2:
            return wanted or sizes[0], sizes[1] if wanted in {None, sizes[0]} else None
    return wanted, None


def _length(source: object) -> int | None:
    """The length of a data set or sampler; None if it has none, as a streamed data set."""
    if not isinstance(source, Sized):
        return None
    try:
        return len(source)
    except TypeError:
        return None
