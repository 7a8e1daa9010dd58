"""Judges of findings on networks: the network is run, with hooks and copies, and torch's own tools.

As in ``judges``: a judge takes a ``Live`` and gives a verdict and what was computed.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from independent import Layer
from judges import Case, dead_channel, denormal_variance
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ROUNDING = 1e-4  # of the largest output, for float32 sums of some thousand terms in another order
SURE = 5.0  # standard errors
WHITE = 2.3  # of images whose mean is 0 and whose sd is 1


@dataclass
class Live:
    """A network, its data, and what went into its batch norm layers in eval mode, measured once."""

    model: nn.Module
    batches: list[tuple[Any, ...]]
    finding: Any = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    readers: dict[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, batches: list[tuple[Any, ...]]) -> Live:
        return cls(model, batches, seen=_inputs(model, batches), readers=_readers(model))

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.finding.layer)

    @property
    def layer(self) -> Layer:
        """The named layer as the judges of files take it."""
        return _stored(self.finding.layer, self.module, self.readers)

    def before(self, name: str) -> str:
        """The layer that ran before one and has as many channels, as before a depthwise convolution; else ""."""
        order = list(self.seen)
        earlier = order[order.index(name) - 1] if name in order[1:] else ""
        return earlier if earlier and len(self.seen[earlier]) == len(self.seen[name]) else ""


def stored(model: nn.Module) -> list[Layer]:
    """Every layer as the judges of files take it."""
    readers = _readers(model)
    return [_stored(name, module, readers) for name, module in norms(model).items()]


def _stored(name: str, module: nn.Module, readers: dict[str, frozenset[str]]) -> Layer:
    values = (module.weight, module.bias, module.running_mean, module.running_var)
    tensors = [None if value is None else value.detach().double().numpy() for value in values]
    dtype = str(module.running_var.dtype).removeprefix("torch.")
    return Layer((name,), *tensors, dtype=dtype, eps=module.eps, readers=readers.get(name, frozenset()))


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}


def _inputs(model: nn.Module, batches: list[tuple[Any, ...]]) -> dict[str, torch.Tensor]:
    """Inputs of every batch norm layer in eval mode: channels first, then example, then position."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name: str):
        return lambda _, inputs: seen.setdefault(name, []).append(_by_channel(inputs[0]))

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in norms(model).items()]
    with torch.no_grad():
        for batch in batches:
            model.eval()(*batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts, 1) for name, parts in seen.items()}


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    return x.detach().transpose(0, 1).reshape(x.shape[1], len(x), -1)


def _readers(model: nn.Module) -> dict[str, frozenset[str]]:
    """What reads each layer's result, as ONNX calls it, by torch.fx; nothing where torch.fx cannot follow."""
    try:
        traced = torch.fx.symbolic_trace(model)
    except Exception:  # noqa: BLE001 - whatever a foreign forward raises
        return {}
    known = {nn.ReLU: "Relu", nn.ReLU6: "Relu", nn.Hardswish: "HardSwish"}
    modules = dict(traced.named_modules())

    def word(user: Any) -> str:
        if user.op == "call_module":
            return known.get(type(modules[user.target]), type(modules[user.target]).__name__)
        return "Relu" if "relu" in str(user.target).lower() and "leaky" not in str(user.target) else str(user.target)

    return {
        str(node.target): frozenset(map(word, node.users))
        for node in traced.graph.nodes
        if node.op == "call_module" and isinstance(modules[node.target], NORMS)
    }


def results(model: nn.Module, batch: tuple[Any, ...], *, train: bool = False) -> torch.Tensor:
    """The first output, with the same dropout every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        y = model.train(train)(*batch)
    return y[0] if isinstance(y, (tuple, list)) else y


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def bias_before(live: Live) -> tuple[str, str]:
    """Claimed: the bias is subtracted again. Tried: other biases, in train mode."""
    producer = re.findall(r"'([^']+)'", live.finding.measured)[0]
    changed = copy.deepcopy(live.model)
    with torch.no_grad():
        changed.get_submodule(producer).bias.add_(1.0)
    gap = _difference(results(copy.deepcopy(live.model), live.batches[0], train=True),
                      results(changed, live.batches[0], train=True))  # fmt: skip
    return ("true" if gap < ROUNDING else "false"), f"1 added to every bias moves outputs in train mode by {gap:.2g}"


def not_folded(live: Live) -> tuple[str, str]:
    """Claimed: these layers can be folded. Tried with torch's fuse_conv_bn_eval on the pairs that are named."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    pairs = re.findall(r"(\S+) into ([^\s,]+)", live.finding.measured)
    smaller = copy.deepcopy(live.model).eval()
    for norm, producer in pairs:
        first, second = smaller.get_submodule(producer), smaller.get_submodule(norm)
        fuse = fuse_linear_bn_eval if isinstance(first, nn.Linear) else fuse_conv_bn_eval
        smaller.set_submodule(producer, fuse(first, second))
        smaller.set_submodule(norm, nn.Identity())
    gap = _difference(results(live.model, live.batches[0]), results(smaller, live.batches[0]))
    return ("true" if gap < ROUNDING else "false"), f"{len(pairs)} folded by torch move outputs by {gap:.2g}"


def zero_momentum(live: Live) -> tuple[str, str]:
    """Claimed: training leaves the statistics behind. Tried: one pass in train mode."""
    trained = copy.deepcopy(live.model)
    results(trained, live.batches[0], train=True)
    module = trained.get_submodule(live.finding.layer)
    moved = float((module.running_mean - live.module.running_mean).abs().max())
    return ("true" if moved == 0 else "false"), f"a pass in train mode moves running_mean by {moved:.2g}"


def shifted(live: Live) -> tuple[str, str]:
    """Claimed: so many channels of these data are not as stored. Measured: means in standard errors, variances."""
    x, module = live.seen[live.finding.layer].double(), live.module
    count = x.shape[1]
    sd = (module.running_var + module.eps).sqrt()
    of_each = x.mean(-1)
    error = of_each.std(1) / count**0.5 + 1e-12
    far = ((of_each.mean(1) - module.running_mean).abs() > SURE * error) | _other_variance(x, sd)
    told = int(re.search(r"(\d+) of", live.finding.measured)[1])
    words = f"{int(far.sum())} of {len(far)} channels lie {SURE:g} standard errors off or have a variance 2 times other"
    return ("true" if int(far.sum()) * 2 >= told else "false"), f"{words}; told are {told}"


def _other_variance(x: torch.Tensor, sd: torch.Tensor) -> torch.Tensor:
    ratio = x.flatten(1).var(1) / sd.square()
    return (ratio > 2) | (ratio < 0.5)


def constant_on_data(live: Live) -> tuple[str, str]:
    """Claimed: channels do not vary on these data."""
    x, channels = live.seen[live.finding.layer], list(live.finding.channels)
    spread = (x.amax((1, 2)) - x.amin((1, 2)))[channels]
    size = x.abs().amax((1, 2))[channels]
    varies = int((spread > size * 1e-5).sum())
    return ("false" if varies else "true"), f"{varies} of {len(channels)} vary by more than 1e-5 of their size"


def constant_channel(live: Live) -> tuple[str, str]:
    """Claimed: a small change is magnified above everything else. Tried: the data, and patterns of black and white."""
    module, channels = live.module, list(live.finding.channels)
    drawn = _inputs(live.model, patterns(live.batches[0]))
    inputs = [seen[live.finding.layer] for seen in (live.seen, drawn) if live.finding.layer in seen]
    gain = module.weight.detach().abs() / (module.running_var + module.eps).sqrt()
    moved = torch.stack([x.amax((1, 2)) - x.amin((1, 2)) for x in inputs]).amax(0) * gain
    others = np.delete(moved.numpy(), channels)
    told, most = float(moved[channels].max()), float(others.max(initial=0))
    words = (
        f"on noise and patterns they move by up to {told:.2g}, others by {np.median(others):.2g}, at most {most:.2g}"
    )
    return ("true" if told > most else "false"), words


def patterns(batch: tuple[Any, ...]) -> list[tuple[torch.Tensor]]:
    """Squares and stripes at the ends of a normalized image's range, from pixels to half the image; none but images."""
    if len(batch) > 1 or batch[0].dim() != len("NCHW"):
        return []
    torch.manual_seed(1)
    found = []
    for size in (1, 2, 4, 8, 16, 32):
        for rows in (batch[0].shape[2] // size + 1, 1):
            coarse = torch.randn(*batch[0].shape[:2], rows, batch[0].shape[3] // size + 1).sign() * WHITE
            found.append((nn.functional.interpolate(coarse, size=batch[0].shape[2:]),))
    return found


def of_file(judge: Any):
    """A judge of files, on what the live layer stores."""
    return lambda live: judge(Case(live.finding, live.layer, None))


CODES = {
    "BN007": zero_momentum,
    "BN104": of_file(denormal_variance),
    "BN105": constant_channel,
    "BN106": of_file(dead_channel),
    "BN211": constant_on_data,
    "BN301": bias_before,
    "BN401": shifted,
    "BN501": not_folded,
}


def impossible(finding: Any) -> str:
    """Why the remedy cannot be carried out on a live model, or ""."""
    command = re.match(r"batchnorm fix (\S+)", finding.remedy)
    return f"{command[1]} is no file and no address" if command and ":" not in command[1] else ""
