"""The fingerprint of a measurement: the model and the settings on which measured statistics depend, thing by thing."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from batchnorm.population.sharded_models import is_sharded
from batchnorm.population.stored_statistics import buffers
from batchnorm.population.tensor_memory import digest_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchnorm.population.stored_statistics import Layers

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object in memory
_COUNTER = "num_batches_tracked"  # no output depends on it


def fingerprint(model: nn.Module, layers: Layers, settings: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """A description and a digest of each thing on which the measured statistics depend, by its name in messages.

    These are the settings, the measured layers, all parameters and buffers, and the class and settings of all other
    modules, so that another activation is another model. The stored statistics of measured layers do not count, since
    they are replaced, and neither do counters of batches. If the model is sharded, parameters count by name only and
    modules by class only, because every rank has other parts of them.
    """
    replaced = {id(tensor) for layer in layers.values() for tensor in buffers(layer)}
    sharded = {name for name, _ in model.named_parameters()} if is_sharded(model) else set()
    tensors = {
        name: tensor
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
        if id(tensor) not in replaced and name.rpartition(".")[2] != _COUNTER
    }
    return {
        **{name: (repr(value), "") for name, value in settings.items()},
        **{f"layer {path!r}": (_layer_in_words(layer), "") for path, layer in layers.items()},
        **{repr(n): ("", "") if n in sharded else (_in_words(t), digest_of({n: t})) for n, t in tensors.items()},
        **{
            f"module {path!r}": (_module_in_words(module, has_settings=not sharded), "")
            for path, module in model.named_modules()
            if path not in layers
        },
    }


def _module_in_words(module: nn.Module, *, has_settings: bool) -> str:
    """The class and settings of a module; a sharded module's settings may be those of a shard."""
    settings = _ADDRESS.sub("", module.extra_repr()) if has_settings else ""
    return f"{type(module).__name__}({settings})"


def _layer_in_words(layer: nn.Module) -> str:
    mean = buffers(layer)[0]  # type: ignore[arg-type]
    return f"{type(layer).__name__} of {_in_words(mean)}, eps={getattr(layer, 'eps', None)}"


def _in_words(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
