"""What a fused model holds in place of what was fused, each with its way back.

Where an activation was a module of its own, ``Absorbed`` stands in its place and hands its input on. Where it was
an operation inside of a module's forward, the module is made an instance of a subclass of its class whose forward
is written anew; its attributes, children, hooks and methods stay, and going back is giving it its class again.

Code that knows torch.nn's batch norm may put a layer of its own in the place of ours, which does not apply what ours
did. Both see that when they run: the activation is applied where it was written.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from inspect import ismodule
from typing import Any, final

from torch import Tensor, nn
from torch.fx import Graph

from batchnorm.kernels.activations import activate
from batchnorm.layers import LAYERS
from batchnorm.ownership import carried_from
from batchnorm.tracing import call_whole

# paths of layers from the module that calls them, and the activations that they took over
Fused = tuple[tuple[tuple[str, ...], str], ...]

MARK = "_act_was_fused"  # on a layer whose activation was written elsewhere


def applied_by(module: Any) -> str | None:
    """The activation that a module of this package applies to its result, or None."""
    if isinstance(module, LAYERS):
        return module._act
    act = vars(module).get("act") if getattr(type(module), "_applies_act", False) else None
    return act if isinstance(act, str) else None


def is_applied(owner: nn.Module, path: Sequence[str], act: str) -> bool:
    """Whether what stands at a path applies an activation itself, or wraps a layer that does."""
    module = owner
    for name in path:
        if (child := module._modules.get(name)) is None:
            break
        module = child
    if applied_by(module) == act:
        return True
    return module is not owner and any(applied_by(part) == act for part in module.modules())


@final
class Absorbed(nn.Identity):
    """Stands where an activation was that the batch norm layer before it now applies.

    It knows the layer, and the module that calls both. Once another module stands in the layer's place there, or the
    layer is no more, or applies nothing, the activation is applied here again.
    """

    # weak references: a model is freed without the garbage collector, and a replaced layer is known by being freed
    _caller: Any = None
    _layer: Any = None
    _place: tuple[tuple[str, ...], str, float] | None = None

    def __init__(self, activation: nn.Module, caller: nn.Module, path: Sequence[str], layer: Any) -> None:
        super().__init__()
        self._kept = (activation,)  # in a tuple, so that it is no child
        self._caller, self._layer = weakref.ref(caller), weakref.ref(layer)
        self._place = tuple(path), str(applied_by(layer)), float(layer.act_param)
        self.training = activation.training

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn's name, which callers may use
        """The input itself, or activated where the layer does not do so."""
        if not isinstance(input, Tensor) and (node := call_whole(self, input)) is not None:
            return node
        if self._place is None or self.is_idle():
            return input
        _, act, param = self._place
        return activate(input, act, param)

    def is_idle(self) -> bool:
        """Whether the layer still applies the activation, if that can be known."""
        if self._place is None:
            return True
        path, act, _ = self._place
        caller, layer = _alive(self._caller), _alive(self._layer)
        if caller is not None and is_applied(caller, path, act):
            return True
        if layer is None or applied_by(layer) != act:
            return False
        # names move when something is inserted before; parts of a model outlive it
        return caller is None or any(part is layer for part in caller.modules())

    def stand_in(self) -> nn.Module | None:
        """What is now where the layer was, if that is known."""
        caller = _alive(self._caller)
        return None if caller is None or self._place is None else _at(caller, self._place[0])

    def is_stray(self, parts: Iterable[nn.Module]) -> bool:
        """Whether it relies on a layer that is not among these parts of a model."""
        layer = _alive(self._layer)
        return layer is not None and self.is_idle() and not any(part in (layer, self.stand_in()) for part in parts)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle: with the layer, which the model holds anyway, and without its caller."""
        return vars(self) | {"_caller": None, "_layer": _alive(self._layer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take it over, also from before a placeholder knew its layer."""
        super().__setstate__(state)
        if (layer := vars(self).get("_layer")) is not None:
            vars(self)["_layer"] = weakref.ref(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Absorbed:
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if (caller := memo.get(id(_alive(self._caller)))) is not None:
            vars(new)["_caller"] = weakref.ref(caller)
        return new

    def restored(self) -> nn.Module:
        """The activation, in the mode that was asked of its place."""
        return self._kept[0].train(self.training)

    def extra_repr(self) -> str:
        """The activation and who applies it."""
        return f"{self._kept[0]}, applied by the batch norm layer before it"


def dropped(model: nn.Module) -> dict[str, str]:
    """Lost activations: the path of each module whose former layer applied one, and the activation's name.

    Such a module has the tensors of a layer of ours that is not part of the model; or it is the placeholder of an
    activation whose layer is not part of the model, and something runs before it.
    """
    parts = dict(model.named_modules())
    kept = {id(t) for part in parts.values() if applied_by(part) for t in _tensors(part)}
    awake = [part for part in parts.values() if isinstance(part, Absorbed) and not part.is_idle()]
    elsewhere = {id(part.stand_in()) for part in awake}
    for part in parts.values():
        if isinstance(part, Rewritten):
            elsewhere |= {id(_at(part, path)) for path, act in part._fused if not is_applied(part, path, act)}
    lost_track = {part._place[1] for part in awake if part.stand_in() is None and part._place}
    found = {}
    for path, part in parts.items():
        act = None if applied_by(part) or id(part) in elsewhere else carried_from(part)
        if act is not None and act not in lost_track and not any(id(t) in kept for t in _tensors(part)):
            found[path] = act
    leaves = [(path, part) for path, part in parts.items() if not part._modules]
    for path, part in leaves[1:]:
        if isinstance(part, Absorbed) and part._place and part.is_stray(parts.values()):
            found[path] = part._place[1]
    return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None]


def _at(module: nn.Module, path: Sequence[str]) -> nn.Module | None:
    for name in path:
        if (child := module._modules.get(name)) is None:
            return None
        module = child
    return module


def _alive(reference: Any) -> Any:
    return None if reference is None else reference()


@final
@dataclass(frozen=True)
class Code:
    """The source of a forward and the names that it uses, in a form that pickle accepts."""

    source: str
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, graph: Graph) -> Code:
        """The code of a graph, as a method of the module that was traced."""
        code = graph.python_code("self")
        names = sorted(code.globals.items())
        modules = tuple((name, value.__name__) for name, value in names if ismodule(value))
        return cls(code.src, modules, tuple((name, value) for name, value in names if not ismodule(value)))

    def compiled(self) -> Any:
        """The forward as a function of the module and its inputs."""
        names = {name: import_module(path) for name, path in self.modules} | dict(self.objects)
        exec(compile(self.source, "<forward fused by batchnorm>", "exec", dont_inherit=True), names)  # noqa: S102 - as torch.fx does with what it has traced
        return names["forward"]


class Rewritten(nn.Module):
    """Mixed into the class of a module with a new forward, which differs by mode if the old one did."""

    _codes: tuple[Code, Code]
    _fused: Fused

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so pickle and deepcopy get what it was made from
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_module, (_written_class(type(self)), *self._codes, self._fused), *state


def rewrite(module: nn.Module, train: Graph, evaluate: Graph, fused: Fused) -> None:
    """Change the module in place: its forward does what the graphs say, in train and in eval mode.

    ``fused`` has the paths of the layers that now apply an activation, and which.
    """
    kind = type(module)
    if isinstance(module, Rewritten):
        kind, fused = _written_class(kind), (*module._fused, *fused)
    module.__class__ = _rewritten_class(kind, Code.of(train), Code.of(evaluate), fused)


def restore(module: nn.Module) -> None:
    """Change the module in place: its forward is the written one again."""
    if isinstance(module, Rewritten):
        module.__class__ = _written_class(type(module))


@cache
def _rewritten_class(kind: type, train: Code, evaluate: Code, fused: Fused = ()) -> Any:
    namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_codes": (train, evaluate), "_fused": fused}
    forward = _forward(kind, train, evaluate, fused)
    return type(f"Fused{kind.__name__}", (Rewritten, kind), namespace | {"forward": forward})


def _forward(kind: Any, train: Code, evaluate: Code, fused: Fused) -> Any:
    in_train = train.compiled()
    in_eval = in_train if train == evaluate else evaluate.compiled()

    @wraps(in_train)  # for its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        applied = [is_applied(self, path, act) for path, act in fused]
        if all(applied):
            return (in_train if self.training else in_eval)(self, *args, **kwargs)
        if any(applied):
            _refuse(self, fused, applied)
        return kind.forward(self, *args, **kwargs)

    return forward


def _refuse(module: nn.Module, fused: Fused, applied: Sequence[bool]) -> None:
    others = [f"{'.'.join(path)!r} ({act})" for (path, act), done in zip(fused, applied, strict=True) if not done]
    raise RuntimeError(
        f"{type(module).__name__} needs all its fused layers or none, got others in the place of {', '.join(others)}, "
        "which do not apply the activation. Replace layers before convert(fuse=True), or call revert first."
    )


def _written_class(kind: type) -> type:
    return kind.__bases__[1]


def _empty_module(kind: type, train: Code, evaluate: Code, fused: Fused = ()) -> object:
    rewritten = _rewritten_class(kind, train, evaluate, fused)
    return rewritten.__new__(rewritten)
