"""Graphs of forwards that torch.fx cannot trace: one run on tensors that have an example's shapes and no values.

Code that computes with sizes, such as padding by ``int(math.ceil(size / stride))``, runs on such tensors. Code with
branches that depend on values does not run on them, so it has no graph. Branches that depend on sizes are valid for
the example's sizes only. As in ``dataflow``, a graph is used only if the run set no attributes, drew no random numbers
and ran in one context.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from batchnorm.population.hooks import attached
from batchnorm.population.tensor_trees import Batch, Leaf
from batchnorm.surgery.trace_effects import surroundings, without_effects

Operation = Callable[..., object]
Given = tuple[Batch, Batch]  # arguments and keyword arguments, with a node in place of each tensor

_PLAIN = (int, float, complex, bool, str, slice, range, type(None), type(...))
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)


@final
class InputShapes:
    """The arguments of each module, with tensors without values; only if all calls had the same shapes and types."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[nn.Module, tuple[tuple, dict]] = {}
        self._mixed: set[nn.Module] = set()

    def of(self, module: nn.Module) -> tuple[tuple, dict]:
        """Arguments and keyword arguments of a module.

        Raises:
            TraceError: If the module was not called, was called with different arguments, or with a tensor that has no
                copy without values.
        """
        if module in self._mixed:
            raise TraceError("it is called with different inputs, or with a tensor that has no copy without values")
        if module not in self._seen:
            raise TraceError("it did not run on the example")
        return self._seen[module]

    def add(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Store the arguments of a call."""
        try:
            new = tree_map(self._without_values, (args, kwargs))
        except Exception:  # noqa: BLE001 - a tensor of a kind that has no copy without values
            self._mixed.add(module)
            return
        if _kinds(self._seen.setdefault(module, new)) != _kinds(new):
            self._mixed.add(module)

    def _without_values(self, leaf: Leaf) -> Leaf:
        return self.mode.from_tensor(leaf.detach()) if isinstance(leaf, Tensor) else leaf


def _kinds(inputs: Batch) -> str:
    return str(tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, inputs))


@contextmanager
def observed_inputs(model: nn.Module) -> Iterator[InputShapes]:
    """A block that records the inputs of all modules."""
    seen = InputShapes()
    with attached(module.register_forward_pre_hook(seen.add, with_kwargs=True) for module in _unscripted(model)):
        yield seen


def _unscripted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]


def recorded(module: nn.Module, inputs: InputShapes) -> Graph:
    """The graph of a module's forward in its present mode, for inputs of the recorded shapes.

    Raises:
        TraceError: If no graph can be used, with the reason.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise TraceError("its forward was put on the instance, or is scripted")
    args, kwargs = inputs.of(module)
    with without_effects(module), inputs.mode:
        return _Recorder(module).graph_of(args, kwargs)


@final
class _Recorder(TorchFunctionMode):
    """Makes a graph of one run: a node for each operation on tensors, and for each call of a child."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.graph = module, Graph()
        self.names = {child: name for name, child in module.named_modules()}
        self.stored = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
        self.nodes: dict[int, Node] = {}
        self.kept: list[Tensor] = []  # keeps tensors alive, so that their ids stay unique
        self.calls: list[Given | None] = []  # for each running child: its arguments, None inside another child
        self.around = surroundings(stacks=False)

    def graph_of(self, args: tuple, kwargs: dict) -> Graph:
        for name, value in by_name(self.module, args, kwargs).items():
            if _tensors_in(value):
                self._is_made_by(self.graph.placeholder(name), value)
        with attached(self._hooks()), self:
            result = type(self.module).forward(self.module, *args, **kwargs)
        self.graph.output(self._as_nodes(result))
        return self.graph

    def _hooks(self) -> Iterator[RemovableHandle]:
        for part in _unscripted(self.module):
            if part is not self.module:
                yield part.register_forward_pre_hook(self._enter, with_kwargs=True)
                yield part.register_forward_hook(self._leave, with_kwargs=True, always_call=True)

    def __torch_function__(
        self,
        func: Operation,
        types: Sequence[type],
        args: tuple[Batch, ...] = (),
        kwargs: dict[str, Batch] | None = None,
    ) -> Batch:
        result = func(*args, **(kwargs or {}))
        if not self.calls and _tensors_in(result):
            self._made(result, "call_function", func, (self._as_nodes(tuple(args)), self._as_nodes(dict(kwargs or {}))))
        return result

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        # stored before the call, which may change a list among its arguments
        self.calls.append(None if self.calls else (self._as_nodes(args), self._as_nodes(kwargs)))

    def _leave(self, module: nn.Module, _: tuple, __: dict, result: Batch) -> None:
        arguments = self.calls.pop()
        if arguments is not None and _tensors_in(result):
            self._made(result, "call_module", self.names[module], arguments)

    def _check(self) -> None:
        if surroundings(stacks=False) != self.around:
            raise TraceError("its forward runs operations inside of a context such as no_grad, autocast or checkpoint")

    def _made(self, result: Batch, op: str, target: Operation | str, given: Given) -> None:
        self._check()
        self._is_made_by(self.graph.create_node(op, target, *given), result)

    def _is_made_by(self, node: Node, result: Batch) -> None:
        if isinstance(result, Tensor):
            self._is(result, node)
            return
        if not isinstance(result, (tuple, list)) or not all(isinstance(t, Tensor) for t in result):
            raise TraceError(
                f"its forward gets or makes a {type(result).__name__} that is not a list or tuple of tensors only"
            )
        for index, tensor in enumerate(result):
            self._is(tensor, self.graph.call_function(operator.getitem, (node, index)))

    def _is(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def _as_nodes(self, value: Batch) -> Batch:
        return tree_map(self._as_node, value)

    def _as_node(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, _PLAIN):
            return leaf
        if not isinstance(leaf, Tensor):
            raise TraceError(f"its forward passes a {type(leaf).__name__} to an operation")
        if id(leaf) not in self.nodes:
            if id(leaf) not in self.stored:
                raise TraceError("its forward uses a tensor that is made elsewhere")
            self._is(leaf, self.graph.get_attr(self.stored[id(leaf)]))
        return self.nodes[id(leaf)]


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Batch]:
    """The arguments of a call by the names of the forward's parameters."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _tensors_in(value: Batch) -> bool:
    tensors: list[Tensor] = []
    tree_map(lambda leaf: tensors.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return bool(tensors)
