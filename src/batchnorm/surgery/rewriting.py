"""What a fused model holds in place of what was fused, each with its way back.

Where an activation was a module of its own, ``Absorbed`` stands in its place and hands its input on. Where it was
an operation inside of a module's forward, the module is made an instance of a subclass of its class whose forward
is written anew; its attributes, children, hooks and methods stay, and going back is giving it its class again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from inspect import ismodule
from typing import TYPE_CHECKING, Any, final

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.fx import Graph


@final
class Absorbed(nn.Identity):
    """Stands where an activation was that the batch norm layer before it now applies."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._kept = (activation,)  # in a tuple, so that it is no child
        self.training = activation.training

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn's name, which callers may use
        """The input itself."""
        return input

    def restored(self) -> nn.Module:
        """The activation, in the mode that was asked of its place."""
        return self._kept[0].train(self.training)

    def extra_repr(self) -> str:
        """The activation and who applies it."""
        return f"{self._kept[0]}, applied by the batch norm layer before it"


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

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the class is made at run time, so pickle and deepcopy get what it was made from
        _, _, *state = super().__reduce_ex__(max(protocol, 2))
        return _empty_module, (_written_class(type(self)), *self._codes), *state


def rewrite(module: nn.Module, train: Graph, evaluate: Graph) -> None:
    """Change the module in place: its forward does what the graphs say, in train and in eval mode."""
    kind = _written_class(type(module)) if isinstance(module, Rewritten) else type(module)
    module.__class__ = _rewritten_class(kind, Code.of(train), Code.of(evaluate))


def restore(module: nn.Module) -> None:
    """Change the module in place: its forward is the written one again."""
    if isinstance(module, Rewritten):
        module.__class__ = _written_class(type(module))


@cache
def _rewritten_class(kind: type, train: Code, evaluate: Code) -> Any:
    namespace = {"__module__": kind.__module__, "__doc__": kind.__doc__, "_codes": (train, evaluate)}
    return type(f"Fused{kind.__name__}", (Rewritten, kind), namespace | {"forward": _forward(train, evaluate)})


def _forward(train: Code, evaluate: Code) -> Any:
    in_train = train.compiled()
    if train == evaluate:
        return in_train
    in_eval = evaluate.compiled()

    @wraps(in_train)  # for its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (in_train if self.training else in_eval)(self, *args, **kwargs)

    return forward


def _written_class(kind: type) -> type:
    return kind.__bases__[1]


def _empty_module(kind: type, train: Code, evaluate: Code) -> object:
    rewritten = _rewritten_class(kind, train, evaluate)
    return rewritten.__new__(rewritten)
