"""The replacements for fused activations in a model, and how they are undone.

If the activation was a module, an ``Absorbed``, which returns its input, takes its place. If it was an operation in a
module's forward, that module gets a subclass of its class with a new forward (``Rewritten``). The module's attributes,
children, hooks and methods stay; to undo the fusion, the module gets its old class back.

Later, other code may replace a fused layer by a layer that does not apply the activation, as conversions of torch.nn's
batch norm do. ``Absorbed`` and ``Rewritten`` detect that when they run. Then the activation is applied at its original
place.
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

# for each fused layer its path from the module that calls it, and the activation that it now applies
Fused = tuple[tuple[tuple[str, ...], str], ...]

MARK = "_act_was_fused"  # an attribute of layers whose activation came from fusion


def applied_by(module: nn.Module) -> str | None:
    """The activation that a module of this package applies to its result; None for other modules."""
    if isinstance(module, LAYERS):
        return module._act
    act = vars(module).get("act") if getattr(type(module), "_applies_act", False) else None
    return act if isinstance(act, str) else None


def is_applied(owner: nn.Module, path: Sequence[str], act: str) -> bool:
    """Whether the module at a path applies the activation itself, or contains a module that does."""
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
    """Takes the place of an activation module that was fused into the batch norm layer before it.

    It refers to the layer, and to the module that calls both. If the layer was replaced or deleted, or no longer
    applies the activation, the activation is applied here again.
    """

    # weak references: models are freed without the garbage collector, and a freed layer shows that it was replaced
    _caller: Any = None
    _layer: Any = None
    _place: tuple[tuple[str, ...], str, float] | None = None

    def __init__(self, activation: nn.Module, caller: nn.Module, path: Sequence[str], layer: Any) -> None:
        super().__init__()
        self._kept = (activation,)  # a module in a tuple is not registered as a child
        self._caller, self._layer = weakref.ref(caller), weakref.ref(layer)
        self._place = tuple(path), str(applied_by(layer)), float(layer.act_param)
        self.training = activation.training

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn's name, which callers may use
        """The input; the activation is applied to it if the layer does not apply it."""
        if not isinstance(input, Tensor) and (node := call_whole(self, input)) is not None:
            return node
        if self._place is None or self.is_idle():
            return input
        _, act, param = self._place
        return activate(input, act, param)

    def is_idle(self) -> bool:
        """Whether the layer still applies the activation; True if nothing shows that it does not."""
        if self._place is None:
            return True
        path, act, _ = self._place
        caller, layer = _alive(self._caller), _alive(self._layer)
        if caller is not None and is_applied(caller, path, act):
            return True
        if layer is None or applied_by(layer) != act:
            return False
        # the path may have changed when a module was inserted; the calling module may be freed while its parts are not
        return caller is None or any(part is layer for part in caller.modules())

    def stand_in(self) -> nn.Module | None:
        """The module that is now in the layer's place; None if that is not known."""
        caller = _alive(self._caller)
        return None if caller is None or self._place is None else _at(caller, self._place[0])

    def is_stray(self, parts: Iterable[nn.Module]) -> bool:
        """Whether this placeholder relies on a layer that is not among these parts of a model."""
        layer = _alive(self._layer)
        return layer is not None and self.is_idle() and not any(part in (layer, self.stand_in()) for part in parts)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle: with the layer, which the model contains anyway, and without the calling module."""
        return vars(self) | {"_caller": None, "_layer": _alive(self._layer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state; states from earlier versions have no layer."""
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
        """The activation module, in the mode of this placeholder."""
        return self._kept[0].train(self.training)

    def extra_repr(self) -> str:
        """The activation, and which layer applies it."""
        return f"{self._kept[0]}, applied by the batch norm layer before it"


def dropped(model: nn.Module) -> dict[str, str]:
    """Activations that no module of the model applies any more: the path of a module, and the activation's name.

    A module is listed in two cases. It has the tensors of a layer of ours that applied an activation and is not part of
    the model; or it is the placeholder of an activation whose layer is not part of the model. The model's first module
    without children is not listed as a placeholder: the model may be a part of the original that begins behind the
    layer.
    """
    parts = dict(model.named_modules())
    ids_in_use = {id(t) for part in parts.values() if applied_by(part) for t in _tensors(part)}
    active = [part for part in parts.values() if isinstance(part, Absorbed) and not part.is_idle()]
    elsewhere = {id(part.stand_in()) for part in active}
    for part in parts.values():
        if isinstance(part, Rewritten):
            elsewhere |= {id(_at(part, path)) for path, act in part._fused if not is_applied(part, path, act)}
    lost_track = {part._place[1] for part in active if part.stand_in() is None and part._place}
    lost = {}
    for path, part in parts.items():
        act = None if applied_by(part) or id(part) in elsewhere else carried_from(part)
        if act is not None and act not in lost_track and not any(id(t) in ids_in_use for t in _tensors(part)):
            lost[path] = act
    leaves = [(path, part) for path, part in parts.items() if not part._modules]
    for path, part in leaves[1:]:
        if isinstance(part, Absorbed) and part._place and part.is_stray(parts.values()):
            lost[path] = part._place[1]
    return lost


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
    """The source code of a forward, with the modules and objects that its names refer to; it can be pickled."""

    source: str
    modules: tuple[tuple[str, str], ...]
    objects: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, graph: Graph) -> Code:
        """The code of a graph, as a method for the traced module."""
        code = graph.python_code("self")
        names = sorted(code.globals.items())
        modules = tuple((name, value.__name__) for name, value in names if ismodule(value))
        return cls(code.src, modules, tuple((name, value) for name, value in names if not ismodule(value)))

    def compiled(self) -> Any:
        """The forward as a function that is called with the module and its inputs."""
        names = {name: import_module(path) for name, path in self.modules} | dict(self.objects)
        exec(compile(self.source, "<forward fused by batchnorm>", "exec", dont_inherit=True), names)  # noqa: S102 - as torch.fx runs its traced code
        return names["forward"]


class Rewritten(nn.Module):
    """A base class of modules with a rewritten forward: one code for train mode, one for eval mode."""

    _codes: tuple[Code, Code]
    _fused: Fused

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so pickle and deepcopy store the arguments that made it
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_module, (_written_class(type(self)), *self._codes, self._fused), *state


def rewrite(module: nn.Module, train: Graph, evaluate: Graph, fused: Fused) -> None:
    """Give the module a forward that runs these graphs, in train and in eval mode, in place.

    ``fused`` has the paths of the layers that now apply an activation, and the activation's name.
    """
    kind = type(module)
    if isinstance(module, Rewritten):
        kind, fused = _written_class(kind), (*module._fused, *fused)
    module.__class__ = _rewritten_class(kind, Code.of(train), Code.of(evaluate), fused)


def restore(module: nn.Module) -> None:
    """Give a rewritten module its original class and forward back, in place."""
    if isinstance(module, Rewritten):
        module.__class__ = _written_class(type(module))


@cache
def _rewritten_class(kind: type, train: Code, evaluate: Code, fused: Fused = ()) -> Any:
    namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_codes": (train, evaluate), "_fused": fused}
    forward = _forward(kind, train, evaluate, fused)
    return type(f"Fused{kind.__name__}", (Rewritten, kind), namespace | {"forward": forward})


def _forward(kind: Any, train: Code, evaluate: Code, fused: Fused) -> object:
    in_train = train.compiled()
    in_eval = in_train if train == evaluate else evaluate.compiled()

    @wraps(in_train)  # for its signature
    def forward(self: nn.Module, *args: object, **kwargs: object) -> Any:
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
        f"{type(module).__name__} needs all its fused layers or none, got other layers in the place of "
        f"{', '.join(others)}, which do not apply the activation. Replace layers before convert(fuse=True), or call "
        "revert first."
    )


def _written_class(kind: type) -> type:
    return kind.__bases__[1]


def _empty_module(kind: type, train: Code, evaluate: Code, fused: Fused = ()) -> object:
    rewritten = _rewritten_class(kind, train, evaluate, fused)
    return rewritten.__new__(rewritten)
