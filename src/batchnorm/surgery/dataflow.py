"""What a module's forward does with the results of its children, as a torch.fx graph of that forward alone.

Every child is one node, whatever is in it. A graph says what one run of the code did with unknown tensors; it is
believed only if nothing else happened in that run and nothing was decided that another run could decide otherwise:

- train and eval mode are traced apart;
- what is set around an operation (no_grad, autocast, saved-tensor hooks, a device) is no part of a graph;
- an attribute that was set, a random number that was drawn, or a constant that was made would not be again;
- optional arguments and questions for a value's type are answered wrongly by a tracer.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
import warnings
from collections import Counter, defaultdict, deque
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from inspect import Parameter
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.nn.modules import module as hooks_of_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.fx import Node

    Callers = dict[nn.Module, set[nn.Module | None]]
    Arguments = dict[nn.Module, dict[str, Any]]

MODES = (True, False)
IN_PLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.iand,
    operator.ior,
    operator.ixor,
)


@final
@dataclass(frozen=True)
class Flow:
    """The forward of one module in train mode (True) and eval mode (False)."""

    module: nn.Module
    graphs: dict[bool, Graph]
    is_bound: bool = False  # its optional arguments were given the values that they were seen to have

    @property
    def is_chain(self) -> bool:
        """Whether children run one after the other, each by its own name even if it has several."""
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


def flows(
    model: nn.Module,
    modes: tuple[bool, ...] = MODES,
    arguments: Arguments | None = None,
    record: Callable[[nn.Module], Graph] | None = None,
) -> tuple[dict[nn.Module, Flow], dict[nn.Module, str]]:
    """The flow of every module that has one, and why the others have none.

    Training flags are changed, and whatever the forwards change; call it inside ``preserve_state``. Optional arguments
    are an obstacle, unless ``arguments`` has their values: what is traced then holds for these values only. What cannot
    be traced is left to ``record``.
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


def _written_forward(module: nn.Module) -> Any:
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
    """Who calls each module, as far as the flows show it.

    A module without a flow is taken to call its children, and to go through the children of chains by itself.
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
    """Who calls each module in the block, filled as it runs."""
    callers: Callers = defaultdict(set)
    running: list[nn.Module | None] = [None]

    def enter(module: nn.Module, _: Any) -> None:
        callers[module].add(running[-1])
        running.append(module)

    def leave(*_: Any) -> None:
        running.pop()

    handles = [
        hooks_of_all.register_module_forward_pre_hook(enter),
        hooks_of_all.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield callers
    finally:
        for handle in handles:
            handle.remove()


def _within_reach(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if is_chain(child):
            yield from _within_reach(child)


@contextmanager
def observed_arguments(model: nn.Module) -> Iterator[Arguments]:
    """The optional arguments of each module in the block, if they are the same plain values in every call."""
    seen: Arguments = {}
    mixed: set[nn.Module] = set()

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        given.apply_defaults()
        values = {name: given.arguments[name] for name in _optional(module)}
        plain = all(isinstance(value, (int, float, str, type(None))) for value in values.values())
        if not plain or seen.setdefault(module, values) != values:
            mixed.add(module)

    handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in model.modules() if _takes_options(m)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
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


def traced(module: nn.Module, arguments: dict[str, Any] | None = None) -> Graph:
    """The graph of one module's forward in its present mode, with optional arguments of these values.

    Raises:
        TraceError: If one cannot be believed, with the reason.
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
    attributes, before = Attributes(module), random_states()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(module, arguments)
            _drop_inputs(graph, arguments or {})
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}") from error
    finally:
        changed = attributes.undo()
    if changed or before != random_states():
        raise TraceError("its forward sets attributes, makes constants or draws random numbers")
    return graph


def _drop_inputs(graph: Graph, arguments: dict[str, Any]) -> None:
    """Take the inputs out whose values were given, and what torch.fx asserts of them."""
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
    """A value that is written in place as one, and does not say of which type it is."""

    @property
    def __class__(self) -> type:
        # torch itself may ask; abc asks on somebody's behalf
        frame: Any = sys._getframe(1)
        while frame.f_globals.get("__name__") in {"abc", "_collections_abc", "typing"}:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").split(".")[0] not in {"torch", __name__.split(".")[0]}:
            raise TraceError("its forward asks for the type of a value")
        return type(self)


def _written_in_place(operation: Any) -> Any:
    def write(self: _Value, other: Any) -> Any:
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
    """What is set around an operation; with ``stacks`` also how many modes are."""
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
    states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
    if torch.cuda.is_initialized():
        states.append([state.tolist() for state in torch.cuda.get_rng_state_all()])
    if numpy_random := sys.modules.get("numpy.random"):
        name, keys, *rest = numpy_random.get_state()
        states.append([name, keys.tolist(), *rest])
    return states


class Attributes:
    """The containers that a module and its parts keep attributes in, and the tensors in them, as they were."""

    def __init__(self, module: nn.Module) -> None:
        found = [container for part in module.modules() for container in _containers(vars(part), depth=2)]
        self.before = [(container, copy(container)) for container in found]
        tensors = (value for container in found for value in _values(container) if isinstance(value, Tensor))
        self.versions = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def undo(self) -> bool:
        """Put back what is in the containers; whether anything was changed, tensors included."""
        changed = [(now, before) for now, before in self.before if not _same_values(now, before)]
        for now, before in changed:
            now.clear()
            (now.update if isinstance(now, (dict, set)) else now.extend)(before)
        return bool(changed) or any(tensor._version != version for tensor, version in self.versions)


def _containers(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, (dict, list, set, deque)):
        yield value
        if depth:
            for item in _values(value):
                yield from _containers(item, depth - 1)


def _values(container: Any) -> list:
    return list(container.values() if isinstance(container, dict) else container)


def _same_values(a: Any, b: Any) -> bool:
    same = len(a) == len(b) and all(x is y for x, y in zip(_values(a), _values(b), strict=True))
    return same and (not isinstance(a, dict) or list(a) == list(b))
