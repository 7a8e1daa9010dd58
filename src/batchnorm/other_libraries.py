"""Batch norm of other libraries: which modules count as batch norm layers although they are not of torch.nn's class.

A module is a layer if it has the four tensors that define batch norm in eval mode (Ioffe and Szegedy 2015, algorithm
2): ``running_mean``, ``running_var``, ``weight`` and ``bias``, with one value per channel; the last two may be None.
What the module computes from them is not assumed: ``response`` measures it. ``out_of_reach`` lists batch norm that is
not a layer.

``MEASURES`` is the table of known classes: it says by which statistics each class normalizes in train mode. A run in a
single process cannot show that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

Measured = Literal["its batch", "the batches of all processes", "nothing"]

MEASURES: dict[tuple[str, str], Measured] = {
    ("timm", "BatchNormAct2d"): "its batch",
    ("timm", "SyncBatchNormAct"): "the batches of all processes",
    ("timm", "FrozenBatchNormAct2d"): "nothing",
    ("torchvision", "FrozenBatchNorm2d"): "nothing",
    ("detectron2", "FrozenBatchNorm2d"): "nothing",
    ("detectron2", "NaiveSyncBatchNorm"): "the batches of all processes",
    ("detectron2", "NaiveSyncBatchNorm1d"): "the batches of all processes",
    ("detectron2", "NaiveSyncBatchNorm3d"): "the batches of all processes",
    ("mmcv", "SyncBatchNorm"): "the batches of all processes",
    ("mmcv", "NaiveSyncBatchNorm1d"): "the batches of all processes",
    ("mmdet3d", "NaiveSyncBatchNorm1d"): "the batches of all processes",
    ("mmdet3d", "NaiveSyncBatchNorm2d"): "the batches of all processes",
    ("mmcv", "_BatchNormXd"): "its batch",
    ("mmengine", "_BatchNormXd"): "its batch",
    ("inplace_abn", "ABN"): "its batch",
    ("inplace_abn", "InPlaceABN"): "its batch",
    ("inplace_abn", "InPlaceABNSync"): "the batches of all processes",
    ("apex", "SyncBatchNorm"): "the batches of all processes",
}
# code with one of these names is assumed to exchange values between processes
_EXCHANGES = {"all_reduce", "all_gather", "AllReduce", "get_world_size", "dist", "distributed"}
_FUNCTIONS = {"batch_norm", "native_batch_norm", "_native_batch_norm_legit"}
_STATISTICS = ("running_mean", "running_var")
_AFFINE = ("weight", "bias")
_USUAL_EPS = 1e-5
_RANKS = (4, 2, 3, 5)
_EXPORTED = "is an operation of an exported program. Use the model as it was before torch.export"


def layers_of_others(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by dotted path that have the four tensors of batch norm, but neither torch.nn's class nor ours."""
    return {name: module for name, module in model.named_modules() if is_of_others(module)}


def is_of_others(module: nn.Module) -> bool:
    """Whether a module has the four tensors of batch norm and a forward, but not torch.nn's class.

    False for modules of TorchScript and of exported programs.
    """
    if isinstance(module, (_BatchNorm, _InstanceNorm, torch.jit.ScriptModule)) or _is_part_of_program(module):
        return False
    own = vars(module).get("_parameters", {}) | vars(module).get("_buffers", {})
    mean, var = (own.get(name) for name in _STATISTICS)
    if not _is_vector(mean) or not _is_vector(var) or mean.shape != var.shape or not _runs(module):
        return False
    affine = [own.get(name, getattr(module, name, False)) for name in _AFFINE]
    return all(t is None or (_is_vector(t) and t.shape == mean.shape) for t in affine)


def live_layers(model: nn.Module) -> dict[str, Any]:
    """Layers of other libraries that normalize by the batch in train mode, by dotted path."""
    return {path: layer for path, layer in layers_of_others(model).items() if measures(layer) != "nothing"}


def out_of_reach(model: nn.Module) -> dict[str, str]:
    """Batch norm that is not a layer: by its dotted path, a text with the reason and a remedy.

    Four kinds are found: an operation of an exported program, an operation of code traced by torch.fx, a module of
    TorchScript, and a call of torch's function in a module's forward. Such a call is found by the names in the
    forward's code; the model is not run.
    """
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            reasons |= _scripted(path, module)
        elif isinstance(module, GraphModule):
            reasons |= _operations(path, module)
        elif _is_part_of_program(module) and set(_STATISTICS) <= module._buffers.keys():
            reasons[path] = _EXPORTED
        elif _calls_torchs_function(module):
            reasons[path] = (
                f"calls torch's batch_norm in its own forward ({type(module).__name__}). Use a layer, such as "
                "nn.BatchNorm2d, and call the layer"
            )
    return reasons


def quantized(model: nn.Module, path: str) -> str | None:
    """Why a layer of torch's quantization is not changed, with a remedy; None for any other layer."""
    layer, parent = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    if type(layer).__module__.startswith("torch.ao.nn.") and ".quantized" in type(layer).__module__:
        return f"it is a quantized {type(layer).__name__}. Do this before quantization"
    if ".qat" in type(parent).__module__ and type(parent).__module__.startswith("torch.ao.nn."):
        return (
            f"it belongs to a {type(parent).__name__} of quantization-aware training, which "
            "torch.ao.quantization.convert folds itself"
        )
    return None


def as_sentence(reasons: dict[str, str]) -> str:
    """One sentence from reasons by path; paths with the same reason are named together."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(repr(path) if path else "the model itself")
    return "; ".join(f"{_some(names)} {reason}" for reason, names in paths.items())


def unreached(model: nn.Module) -> str:
    """Why a model has no layer to measure, as sentences that begin with a space; "" if no reason is known."""
    reasons = {
        path: f"is a {type(layer).__name__}, a frozen layer of another library. Put a live layer in its place: "
        "batchnorm.replace(model, lambda path, layer: batchnorm.BatchNorm2d(len(layer.running_mean)))"
        for path, layer in layers_of_others(model).items()
        if measures(layer) == "nothing"
    }
    reasons |= out_of_reach(model)
    return f" {as_sentence(reasons)}." if reasons else ""


def measures(layer: nn.Module) -> Measured:
    """What a layer normalizes by in train mode: "its batch", "the batches of all processes" or "nothing".

    "nothing" means that it measures nothing and normalizes by its stored statistics.
    """
    for kind in type(layer).__mro__:
        if known := MEASURES.get((kind.__module__.partition(".")[0], kind.__name__)):
            return known
    if isinstance(layer, nn.SyncBatchNorm) or _exchanges(type(layer)):
        return "the batches of all processes"
    learns = isinstance(layer, _BatchNorm) or hasattr(layer, "momentum") or hasattr(layer, "track_running_stats")
    return "its batch" if learns else "nothing"


def channels_of(layer: Any) -> int:
    """Number of channels of a layer."""
    count = getattr(layer, "num_features", None)
    return count if isinstance(count, int) else layer.running_mean.numel()


def eps_of(layer: Any) -> float:
    """A layer's eps: its attribute; without it, computed from the layer's results; if that fails, 1e-5."""
    if isinstance(eps := getattr(layer, "eps", None), (int, float)):
        return float(eps)
    coefficients = response_of(layer)
    if coefficients is None:
        return _USUAL_EPS
    gain = torch.ones_like(coefficients[0]) if layer.weight is None else layer.weight.detach().double().cpu()
    informative = (gain != 0) & (coefficients[0] != 0)
    eps = (gain / coefficients[0]).square() - layer.running_var.detach().double().cpu()
    return max(float(eps[informative].median()), 0.0) if informative.any() else _USUAL_EPS


def response_of(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of each channel of a layer in eval mode, both (C,), in float64 on the CPU.

    A copy of the layer is run. None if it cannot be copied, or if it is no affine map of each channel.
    """
    return next(iter(responses_of(layer).values()), None)


def responses_of(layer: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
    """As ``response_of``, for inputs of 4, 2, 3 or 5 axes: only the first number of axes that the layer accepts."""
    try:
        probe = copy.deepcopy(layer).cpu().double().eval()
    except Exception:  # noqa: BLE001 - a layer that cannot be copied is not run
        return {}
    for name in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        getattr(probe, name).clear()
    for rank in _RANKS:
        if (found := response(probe, layer, rank)) is not None:
            return {rank: found}
    return {}


def response(
    run: Callable[[Tensor], Any], layer: nn.Module, rank: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of each channel of ``run`` on inputs of ``rank`` axes; None if it raises or is not affine.

    ``run`` is tested with inputs of type ``dtype``: 0, 1, and random values of several sizes around the layer's mean. A
    relative difference below sqrt(eps) of ``dtype``, half of its digits, counts as rounding.
    """
    mean, var = (getattr(layer, name).detach().double().cpu() for name in _STATISTICS)
    shape = (2, len(mean), *[2] * (rank - 2))
    spread = [1, -1, *[1] * (rank - 2)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        sizes = var.abs().sqrt().clamp(min=1e-6).reshape(spread) * torch.tensor(
            [1.0, 1e3, 1e6], dtype=torch.float64
        ).reshape(3, *[1] * rank)
        inputs = [mean.reshape(spread) + size * torch.randn(shape, dtype=torch.float64) for size in sizes]

        def results(x: Tensor) -> Tensor:
            return run(x.to(dtype, copy=True)).double()

        line = torch.finfo(dtype).eps ** 0.5
        try:
            shift = _channel_values(results(torch.zeros(shape)))
            scale = _channel_values(results(torch.ones(shape))) - shift
            fits = all(_is_close(results(x), x, scale.reshape(spread), shift.reshape(spread), line) for x in inputs)
        except Exception:  # noqa: BLE001 - it rejects this input, or is no affine map
            return None
    return (scale, shift) if fits else None


def _channel_values(y: Tensor) -> Tensor:
    values = y.transpose(0, 1).flatten(1)  # (N, C, ...) -> (C, N...)
    if not torch.equal(values, values[:, :1].expand_as(values)):
        raise ValueError("expected one value for each channel, got several. The result depends on the position.")
    return values[:, 0].clone()


def _is_close(y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, line: float) -> bool:
    bound = line * ((x * scale).abs() + shift.abs())
    return y.shape == x.shape and bool(((y - (x * scale + shift)).abs() <= bound).all())


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value) and value.ndim == 1 and value.is_floating_point()


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward; the modules with an exported program's tensors have no forward."""
    return "forward" in vars(module) or type(module).forward is not nn.Module.forward


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more, each" if len(names) > 3 else "")


def _is_part_of_program(module: nn.Module) -> bool:
    """Whether ``torch.export.unflatten`` made the module."""
    return type(module).__module__.startswith("torch.export")


def _is_of_aten(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"


def _scripted(path: str, module: Any) -> dict[str, str]:
    why = "is compiled by TorchScript. Use the model as it was before torch.jit"
    names = {name for name, _ in module.named_buffers(recurse=False)}
    if set(_STATISTICS) <= names and "InstanceNorm" not in module.original_name:
        return {path: why}
    is_alone = not path and not any(module.children())  # torch.jit.freeze puts all operations into one graph
    return {path: why} if is_alone and module.inlined_graph.findAllNodes("aten::batch_norm") else {}


def _operations(path: str, module: GraphModule) -> dict[str, str]:
    reasons = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and "batch_norm" in str(getattr(node.target, "__name__", node.target)):
            where = ".".join(filter(None, (path, _holder(node))))
            reasons[where] = (
                _EXPORTED
                if _is_of_aten(node.target)
                else "is a call of torch's function in traced code. Use a layer, such as nn.BatchNorm2d, and call it"
            )
    return reasons


def _holder(node: Any) -> str:
    """The path of the module that had an operation's statistics; if there is none, the operation's own name."""
    stored = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
    holders = [name.removesuffix(".running_mean") for name in stored if name.endswith(".running_mean")]
    return holders[0] if holders else node.name


def _calls_torchs_function(module: nn.Module) -> bool:
    """Whether a module is no layer and its forward uses torch's batch norm function, by the names in its code.

    If the module has an attribute ``batch_norm``, the name is taken for this attribute.
    """
    if type(module).__module__.startswith("torch.") or isinstance(module, (_BatchNorm, _InstanceNorm)):
        return False
    is_named = bool(_FUNCTIONS & set(_names(type(module).forward)))
    return is_named and not hasattr(module, "batch_norm") and not is_of_others(module)


def _exchanges(kind: type) -> bool:
    """Whether the forward of a class or of a base outside torch.nn uses a name in ``_EXCHANGES``."""
    own = (each for each in kind.__mro__ if not each.__module__.startswith("torch.nn") and each is not object)
    return any(_EXCHANGES & set(_names(vars(each)["forward"])) for each in own if "forward" in vars(each))


def _names(function: object) -> Iterator[str]:
    """The names in a function's code; none if it is not written in Python."""
    code = getattr(function, "__code__", None)
    return iter(()) if code is None else iter((*code.co_names, *code.co_varnames))
