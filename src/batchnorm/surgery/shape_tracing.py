"""A forward that torch.fx cannot trace, followed in one run on tensors of an example's shapes without values.

Code that takes sizes for numbers, as padding by ``int(math.ceil(size / stride))`` does, runs on such tensors; code that
decides by values cannot, and no graph is made of it. What it decides by sizes is taken as it is for the example. As in
``dataflow``, a graph is believed only if the run set no attributes, drew no random numbers and ran in one context.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from batchnorm.surgery.dataflow import Attributes, random_states, surroundings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.fx import Node

_PLAIN = (int, float, complex, bool, str, slice, range, type(None), type(...))
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.memory_format)


@final
class Inputs:
    """What modules were called with, as tensors without values; of several calls, if they were alike."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[nn.Module, tuple[tuple, dict]] = {}
        self._mixed: set[nn.Module] = set()

    def of(self, module: nn.Module) -> tuple[tuple, dict]:
        """Arguments and keyword arguments.

        Raises:
            TraceError: If the module was not called, or in several ways.
        """
        if module in self._mixed:
            raise TraceError("it is called with inputs of several shapes")
        if module not in self._seen:
            raise TraceError("it did not run on the example")
        return self._seen[module]

    def add(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note a call."""
        try:
            new = tree_map(self._without_values, (args, kwargs))
        except Exception:  # noqa: BLE001 - a tensor of a kind that has no copy without values
            self._mixed.add(module)
            return
        if _kinds(self._seen.setdefault(module, new)) != _kinds(new):
            self._mixed.add(module)

    def _without_values(self, leaf: Any) -> Any:
        return self.mode.from_tensor(leaf.detach()) if isinstance(leaf, Tensor) else leaf


def _kinds(inputs: Any) -> str:
    return str(tree_map(lambda leaf: (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf, inputs))


@contextmanager
def observed_inputs(model: nn.Module) -> Iterator[Inputs]:
    """The inputs of all modules in the block, filled as it runs."""
    seen = Inputs()
    handles = [
        module.register_forward_pre_hook(seen.add, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def recorded(module: nn.Module, inputs: Inputs) -> Graph:
    """The graph of a module's forward in its present mode, as it is for inputs of the shapes that were seen.

    Raises:
        TraceError: If there is none that can be believed, with the reason.
    """
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        raise TraceError("its forward was put on the instance, or is scripted")
    args, kwargs = inputs.of(module)
    attributes, before = Attributes(module), random_states()
    try:
        with warnings.catch_warnings(), inputs.mode:
            warnings.simplefilter("ignore")
            graph = _Recorder(module).graph_of(args, kwargs)
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error
    finally:
        changed = attributes.undo()
    if changed or before != random_states():
        raise TraceError("its forward sets attributes, makes constants or draws random numbers")
    return graph


@final
class _Recorder(TorchFunctionMode):
    """Makes a node of each operation on tensors, and of each call of a child."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.graph = module, Graph()
        self.names = {child: name for name, child in module.named_modules()}
        self.stored = {id(t): name for name, t in [*module.named_parameters(), *module.named_buffers()]}
        self.nodes: dict[int, Node] = {}
        self.kept: list[Any] = []  # so that no id is given to another tensor
        self.calls: list[Any] = []  # of children that run, with what the outermost was given
        self.around = surroundings(stacks=False)

    def graph_of(self, args: tuple, kwargs: dict) -> Graph:
        for name, value in by_name(self.module, args, kwargs).items():
            if _tensors_in(value):
                self._is_made_by(self.graph.placeholder(name), value)
        parts = [
            part for part in self.names if part is not self.module and not isinstance(part, torch.jit.ScriptModule)
        ]
        handles: list[Any] = [part.register_forward_pre_hook(self._enter, with_kwargs=True) for part in parts]
        handles += [part.register_forward_hook(self._leave, with_kwargs=True, always_call=True) for part in parts]
        try:
            with self:
                result = type(self.module).forward(self.module, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.graph.output(self._as_nodes(result))
        return self.graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.calls and _tensors_in(result):
            self._made(result, "call_function", func, (self._as_nodes(tuple(args)), self._as_nodes(dict(kwargs or {}))))
        return result

    def _enter(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        # noted before the call, which may change a list that it is given
        self.calls.append(None if self.calls else (self._as_nodes(args), self._as_nodes(kwargs)))

    def _leave(self, module: nn.Module, _: tuple, __: dict, result: Any) -> None:
        given = self.calls.pop()
        if given is not None and _tensors_in(result):
            self._made(result, "call_module", self.names[module], given)

    def _check(self) -> None:
        if surroundings(stacks=False) != self.around:
            raise TraceError("its forward runs operations inside of a context such as no_grad, autocast or checkpoint")

    def _made(self, result: Any, op: str, target: Any, given: tuple[Any, Any]) -> None:
        self._check()
        self._is_made_by(self.graph.create_node(op, target, *given), result)

    def _is_made_by(self, node: Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self._is(result, node)
            return
        if not isinstance(result, (tuple, list)) or not all(isinstance(t, Tensor) for t in result):
            raise TraceError(f"its forward takes or makes a {type(result).__name__} of tensors and others")
        for index, tensor in enumerate(result):
            self._is(tensor, self.graph.call_function(operator.getitem, (node, index)))

    def _is(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def _as_nodes(self, value: Any) -> Any:
        return tree_map(self._as_node, value)

    def _as_node(self, leaf: Any) -> Any:
        if isinstance(leaf, _PLAIN):
            return leaf
        if not isinstance(leaf, Tensor):
            raise TraceError(f"its forward gives an operation a {type(leaf).__name__}")
        if id(leaf) not in self.nodes:
            if id(leaf) not in self.stored:
                raise TraceError("its forward uses a tensor that is made elsewhere")
            self._is(leaf, self.graph.get_attr(self.stored[id(leaf)]))
        return self.nodes[id(leaf)]


def by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by the names of the forward's parameters."""
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def _tensors_in(value: Any) -> bool:
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return bool(found)
