"""Evidence for the doctor's rules from a model, its optimizer and its loader."""

from __future__ import annotations

import inspect
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.argument_types import kind_of
from batchnorm.call_types import Batch
from batchnorm.doctor.measuring.live_layers import layers_of, momentum_of, stored_of
from batchnorm.doctor.measuring.measurement import loop_of, measure
from batchnorm.doctor.measuring.neighbours_in_code import graph_of
from batchnorm.doctor.measuring.other_version import reference_of
from batchnorm.layers import LAYERS
from batchnorm.population.freezing import Frozen
from batchnorm.processes import is_synchronized
from batchnorm.processes.wrappers import unsynchronized
from batchnorm.rules.codes import codes
from batchnorm.rules.rule_evidence import Evidence, Graph, Module, Optimizer, Structure
from batchnorm.surgery.rewriting import dropped

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "AveragedModel", "FullyShardedDataParallel", "OptimizedModule")


def of_model(
    model: nn.Module, data: Iterable[Batch] | None, *, example: Batch, optimizer: object, batch_size: int | None,
    accumulation: int, world_size: int, reference: Any, max_examples: int, name: str,
) -> tuple[Evidence, str]:  # fmt: skip
    """Evidence about a model; and a description of the data such as "512 examples in 8 batches", "" without data."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"examine needs a path or an nn.Module, got {kind_of(model)}. Pass the model itself.")
    if not hasattr(model, "training"):
        raise TypeError(
            "examine needs a model made of modules, got a model from torch.jit.freeze. Examine it before torch.jit."
        )
    measured, run, words, first = None, None, "", None
    with unsynchronized(model):
        if data is not None:
            measured, run, words, first = measure(model, data, max_examples=max_examples)
        if example is None:
            example = first
        graph, why_not = _graph_of(model, example)
        other = None if reference is None else reference_of(model, reference, example)
    return Evidence(
        name or type(model).__name__,
        stored={path: stored_of(path, layer) for path, layer in layers_of(model).items()},
        modules=modules_of(model),
        structure=structure_of(model),
        graph=graph,
        measured=measured,
        run=run,
        loop=loop_of(data, batch_size=batch_size, accumulation=accumulation, world_size=world_size),
        optimizer=None if optimizer is None else optimizer_of(model, optimizer),
        reference=other,
        unknown={"graph": why_not} if why_not else {},
    ), words


def _graph_of(model: nn.Module, example: Batch) -> tuple[Graph | None, str]:
    """The graph of the layers' neighbours, and ""; or None, and the reason why it is not known."""
    try:
        return graph_of(model, example), ""
    except ValueError as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 - a model may raise anything, and most rules do not need its graph
        return None, f"its code cannot be traced: {type(error).__name__}: {error}"


def modules_of(model: nn.Module) -> dict[str, Module]:
    """The settings of every layer."""
    layers, modules = layers_of(model), dict(model.named_modules(remove_duplicate=False))
    return {path: _settings(modules, path, layer) for path, layer in layers.items()}


def _settings(known: Mapping[str, nn.Module], path: str, layer: Any) -> Module:
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    affine = list(layer.parameters())  # also those of submodules: torch's parametrizations move gamma into one
    ignored = getattr(layer, "batchnorm_ignore", None) or ()
    # a layer of another library without this flag always uses its stored statistics
    fixed = not isinstance(layer, nn.modules.batchnorm._NormBase) and not hasattr(layer, "track_running_stats")
    return Module(
        kind=type(layer).__name__,
        eps=float(getattr(layer, "eps", 1e-5)),
        momentum=momentum_of(layer),
        tracks=bool(getattr(layer, "track_running_stats", True)),
        training=layer.training,
        frozen=isinstance(layer, Frozen) or fixed,
        trainable=any(parameter.requires_grad for parameter in affine),
        affine=bool(affine),
        device=str(tensors[0].device.type) if tensors else "",
        is_lazy=any(is_lazy(tensor) for tensor in tensors),
        is_sync=is_synchronized(layer),
        syncs_on_cpu=isinstance(layer, LAYERS),
        joined=_joined(layer),
        skipped_updates=int(getattr(layer, "skipped_updates", 0)) if not any(t.is_meta for t in tensors) else 0,
        held=isinstance(layer, Frozen),
        tells=isinstance(layer, nn.modules.batchnorm._NormBase) or hasattr(layer, "eps"),
        act=act if isinstance(act := getattr(layer, "act", None), str) else "",
        where=_where(known, path),
        ignored=_codes(path, ignored),
    )


def _joined(layer: Any) -> int:
    """Micro-batches that the layer's latest step normalized together; 1 after batches outside of ``step_backward``."""
    count, then = vars(layer).get("_joined", (1, None))
    now: Any = getattr(layer, "num_batches_tracked", None)
    return count if then is None or now is None or (not now.is_meta and int(now) == int(then)) else 1


def _codes(path: str, ignored: Any) -> frozenset[str]:
    """The codes in a layer's ``batchnorm_ignore``."""
    try:
        return frozenset(codes(ignored))
    except (TypeError, AttributeError):
        raise TypeError(
            f"batchnorm_ignore of layer {path!r} must be codes of rules, got {ignored!r}. Write for example ('BN103',)."
        ) from None
    except ValueError as error:
        raise ValueError(f"batchnorm_ignore of layer {path!r}: {error}") from None


def _where(known: Mapping[str, nn.Module], path: str) -> str:
    """file:line of the innermost user class around a layer; "" if there is none or its file is not known."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        kind = type(known[".".join(parts[:end])])
        if kind.__module__.partition(".")[0] in {"torch", "batchnorm"}:
            continue
        try:
            return f"{os.path.relpath(inspect.getsourcefile(kind) or '')}:{inspect.getsourcelines(kind)[1]}"
        except (OSError, TypeError, ValueError):
            return ""
    return ""


def structure_of(model: nn.Module) -> Structure:
    """Modes, wrappers and names of the layers in the model."""
    around = [module for module in model.modules() if _wrapper(module)]
    parallel = next((module for module in around if _wrapper(module) == "DistributedDataParallel"), None)
    averaged = next((module for module in around if _wrapper(module) == "AveragedModel"), None)
    names = defaultdict(list)
    layers = {layer: path for path, layer in layers_of(model).items()}
    for path, module in model.named_modules(remove_duplicate=False):
        if module in layers:
            names[layers[module]].append(path)
    return Structure(
        training=model.training,
        wrappers=tuple(dict.fromkeys(_wrapper(module) for module in around)),
        broadcasts_buffers=getattr(parallel, "broadcast_buffers", None),
        averages_buffers=getattr(averaged, "use_buffers", None),
        names={path: tuple(paths) for path, paths in names.items() if len(paths) > 1},
        dropped=dropped(model),
    )


def _wrapper(module: nn.Module) -> str:
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), "")


def optimizer_of(model: nn.Module, optimizer: object) -> Optimizer:
    """The weight decay of an optimizer on gamma and beta, and the layers whose parameters it lacks."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(
            f"examine needs a torch optimizer, got {type(optimizer).__name__}. Pass torch.optim's, or leave it out."
        )
    decay = {id(parameter): group.get("weight_decay", 0.0) for group in groups for parameter in group["params"]}
    affine = {path: [p for p in layer.parameters(recurse=False) if p.requires_grad]
              for path, layer in layers_of(model).items()}  # fmt: skip
    strongest = {path: max((decay.get(id(p), 0.0) for p in own), default=0.0) for path, own in affine.items()}
    return Optimizer(
        type(optimizer).__name__,
        {path: value for path, value in strongest.items() if value},
        tuple(path for path, own in affine.items() if any(id(p) not in decay for p in own)),
        any("train_mode" in group for group in groups) or "ScheduleFree" in type(optimizer).__name__,
    )
