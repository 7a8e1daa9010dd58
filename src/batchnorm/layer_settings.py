"""Settings of a layer beyond torch.nn's arguments: a table of their defaults and checks, and the attributes of a layer.

A subclass can use the names of settings for attributes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

from torch import Tensor, nn

from batchnorm.kernels import activations
from batchnorm.layer_checks import STATISTICS, check_axis, check_memory, check_padding, check_single_element, check_sync
from batchnorm.ownership import claim
from batchnorm.processes import NamedGroup, check_process_group, ranks_in_words
from batchnorm.variants.ghost_batches import check_ghost_batch_size
from batchnorm.variants.own_weight import check_own_weight
from batchnorm.variants.renorm import Renorm, check_renorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# where our own classes are; all others with these settings are subclasses
_MODULES = {"batchnorm.layers", "batchnorm.lazy_layers"}


@final
class SettingRule(NamedTuple):
    """What is allowed as a setting.

    Attributes:
        default: ``repr`` omits it.
        check: Raises for a value that does not exist.
        is_composed: Whether another value than the default changes which values a batch is normalized by, or when they
            are stored: see ``batch_statistics``.
        effect: In which mode a layer of torch.nn, which lacks the setting, gives other results: "eval" includes train
            mode, "train" is train mode only, "" is neither.
        show: How ``repr`` writes a value.
    """

    default: object
    check: Callable[[object], None]
    is_composed: bool = False
    effect: Literal["", "train", "eval"] = ""
    show: Callable[[object], str] = repr


# act and act_param are checked together, by ``activations``; all others are independent
RULES = {
    "memory": SettingRule(None, check_memory),
    "padding": SettingRule("zero", check_padding),
    "single_element": SettingRule("error", check_single_element),
    "axis": SettingRule(1, check_axis, effect="eval"),
    "renorm": SettingRule(False, check_renorm, is_composed=True, effect="train"),
    "ghost_batch_size": SettingRule(None, check_ghost_batch_size, is_composed=True, effect="train"),
    "own_weight": SettingRule(0.0, check_own_weight, effect="eval"),
    # not composed: in one process, the usual case, such a layer does what all others do
    "sync": SettingRule(False, check_sync),
    "process_group": SettingRule(None, check_process_group, show=ranks_in_words),
}
COMPLEX = "a complex dtype"  # in lists of settings that torch.nn's layers lack
SETTINGS = {"act", "act_param", *RULES}


class Setting:
    """A setting of a layer; if a subclass uses the same name for a parameter, buffer or child, it is that."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: object, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.name not in vars(layer).get("_given_up", ()):
            return getattr(layer, f"_{self.name}")
        for table in ("_parameters", "_buffers", "_modules"):
            if self.name in vars(layer)[table]:
                return vars(layer)[table][self.name]
        raise AttributeError(f"{type(layer).__name__!r} object has no attribute {self.name!r}")


def _setting() -> Any:
    """A ``Setting`` that a type checker knows by the type of its values."""
    return Setting()


class LayerSettings(nn.Module):
    """The settings of a layer: forward reads ``_NAME``, users read and set ``NAME``.

    The class attributes ``_NAME`` serve a layer whose ``__init__`` did not run: its ``__class__`` was assigned, or its
    subclass did not call ``__init__``.
    """

    _act: str | None = None
    _act_param: float = 0.0
    _memory: Literal["save"] | None = None
    _padding: Literal["zero", "keep"] = "zero"
    _single_element: Literal["error", "population"] = "error"
    _axis: Literal[1, -1] = 1
    _renorm: bool | Renorm = False
    _ghost_batch_size: int | None = None
    _own_weight: float = 0.0
    _sync: bool = False
    _process_group: ProcessGroup | NamedGroup | None = None
    _is_composed: bool = False

    act: str | None = _setting()
    act_param: float = _setting()
    memory: Literal["save"] | None = _setting()
    padding: Literal["zero", "keep"] = _setting()
    single_element: Literal["error", "population"] = _setting()
    axis: Literal[1, -1] = _setting()
    renorm: bool | Renorm = _setting()
    ghost_batch_size: int | None = _setting()
    own_weight: float = _setting()
    sync: bool = _setting()
    process_group: ProcessGroup | NamedGroup | None = _setting()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. A setting of the layer is checked as in ``__init__``; in a subclass its name is free."""
        if name not in SETTINGS:
            super().__setattr__(name, value)
        elif is_subclass(self):
            give_up(self, name)
            super().__setattr__(name, value)
        elif name == "act":
            self._activate(value, self._act_param if value == self._act else activations.parameter(value, None))
        elif name == "act_param":
            number = value if activations.has_parameter(self._act) else value or None
            self._activate(self._act, activations.parameter(self._act, number))
        else:
            self._set(**{name: value})

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter; in a subclass its name may be that of one of the layer's settings."""
        give_up(self, name)
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer; in a subclass its name may be that of one of the layer's settings."""
        give_up(self, name)
        super().register_buffer(name, tensor, persistent)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; in a subclass its name may be that of one of the layer's settings."""
        give_up(self, name)
        super().add_module(name, module)

    def _set(self, **settings: object) -> None:
        """Check settings of ``RULES``, and set all of them or none."""
        for name, value in settings.items():
            RULES[name].check(value)
        if settings.get("process_group") is not None:
            settings["sync"] = True
        elif settings.get("sync") is not None and not settings["sync"]:
            settings["process_group"] = None
        vars(self).update({f"_{name}": value for name, value in settings.items()})
        self._compose()

    def _compose(self) -> None:
        """Note whether batches need the path of ``batch_statistics``: by a setting, or because they are complex."""
        composing = (name for name, rule in RULES.items() if rule.is_composed)
        is_set = any(getattr(self, f"_{name}") != RULES[name].default for name in composing)
        if self._is_composed != (is_composed := is_set or is_complex(self)):
            vars(self)["_is_composed"] = is_composed

    def __getstate__(self) -> dict[str, Any]:
        """The attributes for a copy or a pickle, in which a process group is stored by its name."""
        state: Any = super().__getstate__()
        group = self._process_group
        return state if group is None else state | {"_process_group": NamedGroup.of(group)}

    def _activate(self, act: str | None, param: float) -> None:
        """Apply this activation from now on, and record it with the layer's tensors."""
        before = self._act
        vars(self).update(_act=act, _act_param=param)
        if before is not None:
            claim(self, self._own_tensors(), None)
        self._claim()

    def _claim(self) -> None:
        if self._act is not None:
            claim(self, self._own_tensors(), self._act)

    def _own_tensors(self) -> list[Tensor | None]:
        tables = self._parameters | self._buffers
        return [tables.get(name) for name in ("weight", "bias", *STATISTICS)]

    def _settings_repr(self) -> list[str]:
        """The settings that differ from their defaults, as arguments of the class."""
        parts = [] if self._act is None else [f"act={self._act!r}"]
        if activations.has_parameter(self._act):
            parts.append(f"act_param={self._act_param}")
        return parts + settings_in_use(self, RULES)


def settings_in_use(layer: nn.Module, names: Iterable[str]) -> list[str]:
    """Those settings of a layer that differ from their defaults, as arguments of its class; [] for other layers."""
    if not isinstance(layer, LayerSettings):
        return []
    values = {name: getattr(layer, f"_{name}") for name in names}
    return [f"{name}={RULES[name].show(value)}" for name, value in values.items() if value != RULES[name].default]


def is_complex(layer: LayerSettings) -> bool:
    """Whether a layer has complex parameters or statistics."""
    return any(t is not None and t.is_complex() for t in layer._own_tensors())


def lost_in_torch(layer: nn.Module, effect: Literal["train", "eval"]) -> list[str]:
    """The settings in use without which a layer gives other results in a mode, as arguments of its class."""
    found = settings_in_use(layer, [name for name, rule in RULES.items() if rule.effect == effect])
    has_complex = effect == "eval" and isinstance(layer, LayerSettings) and is_complex(layer)
    return [*found, COMPLEX] if has_complex else found


def give_up(layer: nn.Module, name: str) -> None:
    """Let a subclass use a setting's name for an attribute of its own; nothing if it is no setting or no subclass."""
    if name in SETTINGS and is_subclass(layer):
        vars(layer)["_given_up"] = vars(layer).get("_given_up", frozenset()) | {name}


def is_subclass(layer: nn.Module) -> bool:
    """Whether a layer of ours is of a class that somebody else wrote."""
    return type(layer).__module__ not in _MODULES
