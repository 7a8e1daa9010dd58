"""What a module's forward does with the results of its children, as a torch.fx graph of that forward alone.

Every child is one node, whatever is in it. A graph records what one run of the code did with unknown tensors. It is
used only if the run had no other effect and made no choice that another run could make differently:

- train and eval mode are traced separately;
- a graph does not hold the settings around an operation (no_grad, autocast, saved-tensor hooks, a device);
- a graph does not repeat what the run did besides: set an attribute, draw a random number, make a constant;
- a tracer gives wrong answers where the code asks for optional arguments or for the type of a value.
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
Options = dict[str, Batch]  # of a call, by name
Arguments = dict[nn.Module, Options]
Written = Callable[..., object]

Container = dict[object, object] | list[object] | set[object] | deque[object]  # what a module keeps attributes in

MODES = (True, False)
IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor,
)  # fmt: skip


@final
@dataclass(frozen=True)
class Flow:
    """The forward of one module in train mode (True) and eval mode (False)."""

    module: nn.Module
    graphs: dict[bool, Graph]
    is_bound: bool = False  # the graphs hold for one set of values of its optional arguments

    @property
    def is_chain(self) -> bool:
        """Whether children run one after the other, each name once."""
        return is_chain(self.module)

    @property
    def is_writable(self) -> bool:
        """Whether another forward may be given to the module."""
        return not self.is_chain and not isinstance(self.module, GraphModule)

    def called(self, node: Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def calls(self) -> list[nn.Module]:
        """Every module that is called in some mode."""
        called = (self.called(node) for graph in self.graphs.values() for node in graph.nodes)
        return [module for module in called if module is not None]


def name_of(node: Node) -> str:
    """The name of the function, method or module that a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def is_named_in_place(node: Node) -> bool:
    """Whether a node calls what changes its input in place, by torch's convention for names."""
    name = name_of(node)
    return node.op.startswith("call") and name.endswith("_") and not name.endswith("__")


def flows(
    model: nn.Module,
    modes: tuple[bool, ...] = MODES,
    arguments: Arguments | None = None,
    record: Callable[[nn.Module], Graph] | None = None,
) -> tuple[dict[nn.Module, Flow], dict[nn.Module, str]]:
    """The flow of every module that has one, and why the others have none.

    Training flags change, and whatever the forwards change: call it inside ``preserve_state``. A forward with optional
    arguments has no flow unless ``arguments`` has their values; its flow then holds for these values only. Forwards
    that cannot be traced go to ``record``.
    """
    arguments = arguments or {}
    graphs: dict[nn.Module, dict[bool, Graph]] = defaultdict(dict)
    reasons: dict[nn.Module, str] = {}
    followed: set[nn.Module] = set()
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
                    followed.add(parent)
                except TraceError as other:
                    reasons.setdefault(parent, f"{error}; and {other}" if str(error) != str(other) else str(error))
    sound = [module for module in parents if module not in reasons]
    bound = followed | arguments.keys()
    return {module: Flow(module, graphs[module], module in bound) for module in sound}, reasons


def is_chain(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, as a Sequential does."""
    return _written_forward(module) is nn.Sequential.forward


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, as a ModuleList does."""
    return _written_forward(module) is nn.Module.forward


def _written_forward(module: nn.Module) -> Written | None:
    # looked up without running what a scripted module does on access
    return None if "forward" in vars(module) else inspect.getattr_static(type(module), "forward")


def set_mode(model: nn.Module, mode: bool) -> None:
    """Set every training flag, and run nobody's own ``train``."""
    for module in model.modules():
        module.training = mode


def registrations(model: nn.Module) -> Counter:
    """Under how many names each module is."""
    return Counter(child for parent in model.modules() for child in parent._modules.values())


def static_callers(model: nn.Module, known: dict[nn.Module, Flow]) -> Callers:
    """The callers of each module, according to the flows.

    A module without a flow is assumed to call all its children, and the children of chains too.
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
    """The callers of each module, filled while the block runs."""
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
    """The optional arguments of each module, if every call in the block gives them the same plain values."""
    seen: Arguments = {}
    mixed: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        given.apply_defaults()
        values = {name: given.arguments[name] for name in _optional(module)}
        plain = all(isinstance(value, (int, float, str, type(None))) for value in values.values())
        if not plain or seen.setdefault(module, values) != values:
            mixed.add(module)

    taking = [module for module in model.modules() if _takes_options(module)]
    try:
        with attached(module.register_forward_pre_hook(look, with_kwargs=True) for module in taking):
            yield seen
    finally:
        for module in mixed:
            seen.pop(module, None)


def _takes_options(module: nn.Module) -> bool:
    """Whether a module has children and optional arguments, and only such as have names."""
    if not any(module.children()) or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return bool(_optional(module)) and not kinds & {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}


def _optional(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.items()
    several = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}
    return [name for name, p in parameters if p.default is not p.empty or p.kind in several]


def traced(module: nn.Module, arguments: Options | None = None) -> Graph:
    """The graph of one module's forward in its present mode, with optional arguments of these values.

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
    """A block that runs a module's forward and leaves the module as it was.

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
    given = [n for n in graph.nodes if n.op == "placeholder" and n.name.rpartition("_")[0] in arguments]
    for node in given:
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
    """A value that keeps operations in place apart, and refuses questions about its type."""

    @property
    def __class__(self) -> type:
        # torch itself may ask; abc asks on somebody's behalf
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
    # torch.fx takes x += y for x = x + y, which is another thing where x has another name
    setattr(_Value, f"__{_operation.__name__}__", _written_in_place(_operation))


class _Tracer(Tracer):
    """Children are leaves, buffers are values, and all operations run in the surroundings of the first."""

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
    """The settings around an operation; with ``stacks`` also the number of active modes."""
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
    """The attributes of a module and of its parts, with the versions of their tensors, at one time."""

    def __init__(self, module: nn.Module) -> None:
        found = [container for part in module.modules() for container in _containers(vars(part), depth=2)]
        self.before = [(container, copy(container)) for container in found]
        tensors = (value for container in found for value in _values(container) if isinstance(value, Tensor))
        self.versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def undo(self) -> bool:
        """Restore the attributes; whether anything had changed, tensors included."""
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
