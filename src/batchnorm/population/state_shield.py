"""preserve_state: undoes every change that a tool makes to a model inside a block.

A model is a graph of modules, containers and tensors. At the start every module, container and tensor is visited once,
and a function is made that restores it; at the end all these functions run. A function changes only what differs, in
place, so that optimizers, tied parameters and earlier graphs stay valid.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.argument_types import require_module
from batchnorm.layers import LAYERS
from batchnorm.population.sharded_models import is_flat, keep_together, own_shards
from batchnorm.population.tensor_memory import (
    bits_of,
    has_memory,
    is_freed,
    memory_of,
    parts_of,
    resize_storage,
    same_bits,
    same_memory,
    storage_size,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Undo = Callable[[], object]

_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[nn.Module]:
    """The model, for use by any tool; after the block, also after an exception, it is as it was, bit for bit.

    Restored are parameters, buffers, gradients, ``requires_grad``, the training flag of every module, hooks of
    modules and tensors, submodules, classes, plain attributes (momentum, lists, tensors that are not buffers),
    and the random states of torch (CPU, and CUDA if it was in use), Python and NumPy. Tensors stay the same
    objects in the same memory. A tensor whose bits did not change is not written, so autograd graphs recorded
    before the block stay valid. Memory is compared as bits: a NaN keeps its bits.

    Memory that was freed before the block (FSDP, offloading) is not fetched; memory that is freed in the block is
    restored. A sharded model is restored as it was, sharded or gathered, so every rank must leave the block.
    Tensors without values (fake, on the meta device, inside a transform of torch.func) are restored as references.

    Inside ``step`` or ``step_backward``, forwards of the block do not count: the layers are outside of the step.

    The block needs the memory of one more copy of the model. Objects of other classes that a module refers to
    (a configuration, a logger, a NumPy array) are restored as references; changes inside them stay.

    Args:
        model: Any module, also one whose lazy layers have no shape yet.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
        >>> with preserve_state(model):
        ...     y = model(torch.randn(8, 2) + 5)
        >>> model[0].running_mean, int(model[0].num_batches_tracked)
        (tensor([0., 0.]), 0)
    """
    require_module(model, "preserve_state")
    steps = _remember(model)
    _leave_step(model)
    with preserve_random_state():
        try:
            yield model
        finally:
            _take_back(steps)


def _leave_step(model: nn.Module) -> None:
    """Take our layers out of an open step, which counts no forward of the block; its end puts them into it again."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            vars(module).pop("_step", None)


def _take_back(steps: list[Undo]) -> None:
    """Run all steps, also if some fail, so that everything possible is restored; then raise the first error."""
    errors: list[Exception] = []
    for step in steps:
        try:
            step()
        except Exception as error:  # noqa: BLE001 - raised after the other steps
            errors.append(error)
    if errors:
        raise errors[0]


@contextmanager
def preserve_random_state(*generators: torch.Generator) -> Iterator[None]:
    """A block after which random states are as before: of torch, Python, NumPy if loaded, and ``generators``.

    The states of torch are those of the CPU and, if CUDA was in use before the block, of all CUDA devices.
    """
    put_back = random_states(*generators)
    try:
        yield
    finally:
        put_back()


def random_states(*generators: torch.Generator) -> Callable[[], None]:
    """A function that puts the present random states back, those of ``preserve_random_state``, as often as called."""
    states = [(put_back, read()) for read, put_back in _random_sources(*generators)]

    def put_back_all() -> None:
        for put_back, state in states:
            put_back(state)

    return put_back_all


def random_state() -> tuple[object, ...]:
    """The random states of torch, Python and NumPy that ``preserve_random_state`` restores, for comparison."""
    return tuple(_comparable(read()) for read, _ in _random_sources())


def _comparable(state: object) -> object:
    """A state that ``==`` can compare: torch has one or more tensors, NumPy a tuple with an array."""
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    if isinstance(state, list) or (isinstance(state, tuple) and isinstance(state[0], str)):
        return tuple(part.tobytes() if hasattr(part, "tobytes") else _comparable(part) for part in state)
    return state


def _random_sources(*generators: torch.Generator) -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Functions that read and restore each random state."""
    sources: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
        (torch.get_rng_state, torch.set_rng_state),
        (random.getstate, random.setstate),
        *((generator.get_state, generator.set_state) for generator in generators),
    ]
    if torch.cuda.is_initialized():
        sources.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all))
    if numpy_random := sys.modules.get("numpy.random"):
        sources.append((numpy_random.get_state, numpy_random.set_state))
    return sources


def _remember(model: nn.Module) -> list[Undo]:
    """The steps that restore everything reachable from ``model``."""
    visited: dict[int, object] = {}  # keeps objects alive, so that no id is used twice
    waiting: list[object] = [model]
    steps: list[Undo] = []
    while waiting:
        item = waiting.pop()
        if id(item) in visited:
            continue
        visited[id(item)] = item
        step, parts = _remember_one(item)
        waiting.extend(parts)
        if step is not None:
            steps.append(step)
    return steps


def _remember_one(item: object) -> tuple[Undo | None, list[Any]]:
    """The step that restores ``item`` itself, and the objects that it refers to."""
    if isinstance(item, Tensor) and is_flat(item):
        return _undo_grad(item), own_shards(item)
    if isinstance(item, Tensor):
        return _undo_tensor(item), _parts_of_tensor(item)
    if isinstance(item, nn.Module):
        # a scripted module keeps its parts outside its attributes, so use its methods
        tensors = [*item.parameters(recurse=False), *item.buffers(recurse=False)]
        return _undo_module(item), [vars(item), *item.children(), *tensors]
    if isinstance(item, dict):
        return _undo_dict(item), list(item.values())
    if isinstance(item, (list, deque)):
        return _undo_list(item), list(item)
    if isinstance(item, set):
        return _undo_set(item), []
    if isinstance(item, tuple):
        return None, list(item)
    if isinstance(item, torch.Generator):
        state = item.get_state()
        return lambda: item.set_state(state), []
    return None, []


def _undo_module(module: nn.Module) -> Undo:
    kind, together = type(module), keep_together(module)
    training = getattr(module, "training", None)  # torch.jit.freeze removes the flag

    def undo() -> None:
        if together is not None:
            together()
        if type(module) is not kind:
            module.__class__ = kind
        if training is not None and module.training != training:
            module.training = training

    return undo


def _undo_dict(container: dict) -> Undo:
    before = dict(container)

    def undo() -> None:
        same = len(container) == len(before) and all(
            k is key and v is value for (k, v), (key, value) in zip(container.items(), before.items(), strict=True)
        )
        if not same:
            container.clear()
            container.update(before)

    return undo


def _undo_list(container: list | deque) -> Undo:
    before = list(container)

    def undo() -> None:
        if len(container) != len(before) or any(v is not value for v, value in zip(container, before, strict=True)):
            container.clear()
            container.extend(before)

    return undo


def _undo_set(container: set) -> Undo:
    before = set(container)

    def undo() -> None:
        if container != before:
            container.clear()
            container.update(before)

    return undo


def _parts_of_tensor(tensor: Tensor) -> list[object]:
    # a tensor's own attributes, its hooks, and its gradient, which only some tensors have
    grad = tensor.grad if _owns_grad(tensor) else None
    return [vars(tensor), grad, *parts_of(tensor), *(getattr(tensor, name) for name in _TENSOR_HOOKS)]


def _undo_tensor(tensor: Tensor) -> Undo:
    kind, needs_grad = type(tensor), tensor.requires_grad
    undo_memory = _undo_memory(tensor) if has_memory(tensor) else None
    undo_grad = _undo_grad(tensor)
    hooks = {name: getattr(tensor, name) for name in _TENSOR_HOOKS}

    def undo() -> None:
        if undo_memory is not None:
            undo_memory()
        if type(tensor) is not kind:
            tensor.__class__ = kind
        if _is_leaf(tensor) and tensor.requires_grad != needs_grad:
            tensor.requires_grad_(needs_grad)
        undo_grad()
        for name, own in hooks.items():
            if (now := getattr(tensor, name)) is not own:
                if now is not None:
                    now.clear()  # autograd may still hold a dict of hooks that the tensor has dropped
                setattr(tensor, name, own)

    return undo


def _undo_grad(tensor: Tensor) -> Undo:
    owns_grad = _owns_grad(tensor)
    grad = tensor.grad if owns_grad else None

    def undo() -> None:
        if owns_grad and tensor.grad is not grad and (grad is None or grad.shape == tensor.shape):
            tensor.grad = grad

    return undo


def _undo_memory(tensor: Tensor) -> Undo:
    """The step that gives a tensor its current memory again, with the same size and bits."""
    memory, size = memory_of(tensor), storage_size(tensor)
    before = None if is_freed(tensor) else bits_of(memory).clone()

    def undo() -> None:
        if not same_memory(memory_of(tensor), memory):  # cast, moved, resized, or materialized by a lazy layer
            tensor.data = memory
        if before is None or is_freed(tensor):  # freed before the block and fetched in it, or the reverse
            resize_storage(tensor, size)
        if before is None or same_bits(now := bits_of(memory_of(tensor)), before):
            return
        write(now if now.dtype != tensor.dtype or _is_leaf(tensor) is None else tensor, before)

    return undo


def _owns_grad(tensor: Tensor) -> bool:
    return bool(_is_leaf(tensor)) or (_is_leaf(tensor) is not None and tensor.retains_grad)


def _is_leaf(tensor: Tensor) -> bool | None:
    """Whether a tensor is a leaf; None if autograd cannot tell: for a view whose base was written to, as in FSDP1."""
    try:
        return tensor.is_leaf
    except RuntimeError:
        return None
