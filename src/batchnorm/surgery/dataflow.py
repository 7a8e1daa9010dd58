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
import random
import sys
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.node import Argument
from torch.fx.proxy import TraceError
from torch.nn.modules import module as hooks_of_all

from batchnorm.population.hooks import attached
from batchnorm.population.tensor_trees import Batch

Callers = dict[nn.Module, set[nn.Module | None]]
Options = dict[str, Batch]  # values of optional arguments in a call, by name
Arguments = dict[nn.Module, Options]
Written = Callable[..., object]

Container = dict[object, object] | list[object] | set[object] | deque[object]  # types of attributes that contain values

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


@contextmanager
def without_effects(module: nn.Module) -> Iterator[None]:
    """A block that runs a module's forward; at its end the module has its attributes back, but not values of tensors.

    Raises:
        TraceError: If the forward raises, or has an effect that a graph does not repeat.
    """
    attributes, before = Attributes(module), random_states()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error
    finally:
        changed = attributes.undo()
    if changed or before != random_states():
        raise TraceError("its forward sets attributes, makes constants or draws random numbers")


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

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        if surroundings() != self._surroundings:
            raise TraceError("its forward runs operations inside of a context such as no_grad, autocast or checkpoint")
        return super().create_node(*args, **kwargs)


def surroundings(*, stacks: bool = True) -> tuple:
    """The context of an operation, such as no_grad and autocast; with ``stacks`` also the number of active modes."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast,
        torch.get_default_dtype(),
        (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) if stacks else (),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def random_states() -> list:
    """The states of the generators that a forward may draw from."""
    states: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    if torch.cuda.is_initialized():
        states.append([state.tolist() for state in torch.cuda.get_rng_state_all()])
    if numpy_random := sys.modules.get("numpy.random"):
        name, keys, *rest = numpy_random.get_state()
        states.append([name, keys.tolist(), *rest])
    return states


class Attributes:
    """A snapshot of the attributes of a module and its submodules, with the version numbers of their tensors."""

    def __init__(self, module: nn.Module) -> None:
        containers = [container for part in module.modules() for container in _containers(vars(part), depth=2)]
        self.before = [(container, copy(container)) for container in containers]
        tensors = (value for container in containers for value in _values(container) if isinstance(value, Tensor))
        self.versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def undo(self) -> bool:
        """Restore the attributes. Returns whether an attribute or a tensor had changed; tensors are not restored."""
        changed = [(now, before) for now, before in self.before if not _same_values(now, before)]
        for now, before in changed:
            now.clear()
            put: Any = now.update if isinstance(now, (dict, set)) else now.extend
            put(before)
        return bool(changed) or any(tensor._version != version for tensor, version in self.versions)


def _containers(value: object, depth: int) -> Iterator[Container]:
    if isinstance(value, (dict, list, set, deque)):
        yield value
        if depth:
            for item in _values(value):
                yield from _containers(item, depth - 1)


def _values(container: Container) -> list[object]:
    return list(container.values() if isinstance(container, dict) else container)


def _same_values(a: Container, b: Container) -> bool:
    same = len(a) == len(b) and all(x is y for x, y in zip(_values(a), _values(b), strict=True))
    return same and (not isinstance(a, dict) or list(a) == list(b))
