"""What a module's forward does with the results of its children, as a torch.fx graph of that forward alone.

Each call of a child is one node, whatever the child contains. A graph records one run of the forward on tensors
without values. A forward gets a graph only if that run is valid for all later runs, so:

- train and eval mode are traced separately;
- operations inside of a context (no_grad, autocast, saved-tensor hooks, a device) are refused: a graph does not record
  the context;
- setting attributes, drawing random numbers and making constants are refused: a graph does not repeat them;
- optional arguments whose values are not known are refused;
- questions for the type of a value are refused, because a tracer answers them wrongly.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, final

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch.nn.modules import module as hooks_of_all

from batchnorm.population.hooks import attached
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery.trace_effects import surroundings, without_effects

Callers = dict[nn.Module, set[nn.Module | None]]
Options = dict[str, Batch]  # values of optional arguments in a call, by name
Arguments = dict[nn.Module, Options]
Written = Callable[..., object]


MODES = (True, False)
IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor,
)  # fmt: skip


@final
@dataclass(frozen=True)
class Flow:
    """The forward of one module: its graphs in train mode (True) and eval mode (False)."""

    module: nn.Module
    graphs: dict[bool, Graph]
    is_bound: bool = False  # the graphs are valid for one set of optional arguments, or for the example's sizes

    @property
    def is_chain(self) -> bool:
        """Whether the module runs its children one after the other, as a Sequential does."""
        return is_chain(self.module)

    @property
    def is_writable(self) -> bool:
        """Whether the module may get another forward."""
        return not self.is_chain and not isinstance(self.module, GraphModule)

    def called(self, node: Node) -> nn.Module | None:
        """The module that a node calls; None for other nodes."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def calls(self) -> list[nn.Module]:
        """The modules that are called in train or eval mode, one entry for each call."""
        called = (self.called(node) for graph in self.graphs.values() for node in graph.nodes)
        return [module for module in called if module is not None]


def name_of(node: Node) -> str:
    """The name of the function, method or module that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_named_in_place(node: Node) -> bool:
    """Whether a node calls an operation that changes its input in place: torch's names for these end in one _."""
    name = name_of(node)
    return node.op.startswith("call") and name.endswith("_") and not name.endswith("__")


def flows(
    model: nn.Module,
    modes: tuple[bool, ...] = MODES,
    arguments: Arguments | None = None,
    record: Callable[[nn.Module], Graph] | None = None,
) -> tuple[dict[nn.Module, Flow], dict[nn.Module, str]]:
    """The flow of every module whose forward can be traced, and for the other modules the reason why it cannot.

    This changes training flags, and whatever the forwards change: call it inside ``preserve_state``. A forward with
    optional arguments has a flow only if ``arguments`` has their values; the flow is then valid for these values only.
    For a forward that cannot be traced, ``record`` is called to make the graph.
    """
    arguments = arguments or {}
    graphs: dict[nn.Module, dict[bool, Graph]] = defaultdict(dict)
    reasons: dict[nn.Module, str] = {}
    by_record: set[nn.Module] = set()
    parents = [module for module in model.modules() if any(module.children()) and not is_container(module)]
    for mode in modes:
        set_mode(model, mode)
        for parent in parents:
            try:
                graphs[parent][mode] = traced(parent, arguments.get(parent))
            except TraceError as error:
                if record is None:
                    reasons.setdefault(parent, str(error))
                    continue
                try:
                    graphs[parent][mode] = record(parent)
                    by_record.add(parent)
                except TraceError as other:
                    reasons.setdefault(parent, f"{error}; and {other}" if str(error) != str(other) else str(error))
    readable = [module for module in parents if module not in reasons]
    bound = by_record | arguments.keys()
    return {module: Flow(module, graphs[module], module in bound) for module in readable}, reasons


def is_chain(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as a Sequential does."""
    return _written_forward(module) is nn.Sequential.forward


def is_container(module: nn.Module) -> bool:
    """Whether a module has no forward and only contains modules, as a ModuleList does."""
    return _written_forward(module) is nn.Module.forward


def _written_forward(module: nn.Module) -> Written | None:
    # static lookup, because access to a scripted module runs code
    return None if "forward" in vars(module) else inspect.getattr_static(type(module), "forward")


def set_mode(model: nn.Module, mode: bool) -> None:
    """Set the training flag of every module without calling ``train``, which a class may override."""
    for module in model.modules():
        module.training = mode


def registrations(model: nn.Module) -> Counter:
    """The number of names under which each module is registered."""
    return Counter(child for parent in model.modules() for child in parent._modules.values())


def static_callers(model: nn.Module, known: dict[nn.Module, Flow]) -> Callers:
    """The callers of each module, according to the flows.

    A module without a flow is assumed to call all its children, and also the children of a child that is a chain.
    """
    callers: Callers = defaultdict(set)
    waiting: list[tuple[nn.Module | None, nn.Module]] = [(None, model)]
    while waiting:
        caller, module = waiting.pop()
        if caller in callers[module]:
            continue
        callers[module].add(caller)
        flow = known.get(module)
        waiting += [(module, child) for child in (flow.calls() if flow else _within_reach(module))]
    return callers


@contextmanager
def observed_callers() -> Iterator[Callers]:
    """A block that records the callers of each module."""
    callers: Callers = defaultdict(set)
    running: list[nn.Module | None] = [None]

    def enter(module: nn.Module, _: tuple[Batch, ...]) -> None:
        callers[module].add(running[-1])
        running.append(module)

    def leave(*_: Batch) -> None:
        running.pop()

    hooks = (
        hooks_of_all.register_module_forward_pre_hook(enter),
        hooks_of_all.register_module_forward_hook(leave, always_call=True),
    )
    with attached(hooks):
        yield callers


def _within_reach(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if is_chain(child):
            yield from _within_reach(child)


@contextmanager
def observed_arguments(model: nn.Module) -> Iterator[Arguments]:
    """A block that records each module's optional arguments, if all calls pass the same numbers, texts or None."""
    seen: Arguments = {}
    mixed: set[nn.Module] = set()

    def add_arguments(module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        call.apply_defaults()
        values = {name: call.arguments[name] for name in _optional(module)}
        is_recordable = all(isinstance(value, (int, float, str, type(None))) for value in values.values())
        if not is_recordable or seen.setdefault(module, values) != values:
            mixed.add(module)

    with_options = [module for module in model.modules() if _takes_options(module)]
    try:
        with attached(module.register_forward_pre_hook(add_arguments, with_kwargs=True) for module in with_options):
            yield seen
    finally:
        for module in mixed:
            seen.pop(module, None)


def _takes_options(module: nn.Module) -> bool:
    """Whether a module has children, and its class's forward has optional arguments, but no ``*args`` or ``**kwargs``.

    False for modules of TorchScript, and for a forward that was put on the instance.
    """
    if not any(module.children()) or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return bool(_optional(module)) and not kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


def _optional(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.items()
    several = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    return [name for name, p in parameters if p.default is not p.empty or p.kind in several]


def traced(module: nn.Module, arguments: Options | None = None) -> Graph:
    """The graph of one module's forward in its present mode, with these values of its optional arguments.

    Raises:
        TraceError: If the graph cannot be used, with the reason.
    """
    if is_chain(module):
        return _chained(module)
    if "forward" in vars(module):
        raise TraceError("its forward was put on the instance")
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError("it is scripted")
    optional = _optional(module)
    if optional and arguments is None:
        raise TraceError(f"its forward has the optional argument {optional[0]!r}")
    with without_effects(module):
        graph = _Tracer().trace(module, arguments)
        _drop_inputs(graph, arguments or {})
    return graph


def _drop_inputs(graph: Graph, arguments: Options) -> None:
    """Remove inputs whose values are fixed, and torch.fx's assertions about them."""
    fixed_inputs = [n for n in graph.nodes if n.op == "placeholder" and n.name.rpartition("_")[0] in arguments]
    for node in fixed_inputs:
        for user in reversed([*node.users]):
            for further in [*user.users]:
                graph.erase_node(further)
            graph.erase_node(user)
        graph.erase_node(node)


def _chained(module: nn.Module) -> Graph:
    graph = Graph()
    last = graph.placeholder("input")
    for name in module._modules:
        last = graph.call_module(name, (last,))
    graph.output(last)
    return graph


class _Value(Proxy):
    """A traced value that records operations in place as such, and refuses questions for its type."""

    @property
    def __class__(self) -> type:
        # torch and this package may ask for the type; abc and typing ask on behalf of their caller
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") in {"abc", "_collections_abc", "typing"}:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").split(".")[0] not in {"torch", __name__.split(".")[0]}:
            raise TraceError("its forward asks for the type of a value")
        return type(self)


def _written_in_place(operation: Written) -> Written:
    def write(self: _Value, other: Argument) -> Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return write


for _operation in IN_PLACE:
    # torch.fx records x += y as x = x + y, which differs if another name refers to the same tensor
    setattr(_Value, f"__{_operation.__name__}__", _written_in_place(_operation))


class _Tracer(Tracer):
    """A tracer that enters no child, traces buffers as values, and raises if the context of operations changes."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._surroundings = surroundings()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True

    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: object) -> Node:
        if surroundings() != self._surroundings:
            raise TraceError("its forward runs operations inside of a context such as no_grad, autocast or checkpoint")
        return super().create_node(*args, **kwargs)
