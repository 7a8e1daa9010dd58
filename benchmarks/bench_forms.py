"""What batch renorm, ghost batches and an example's own weight cost: python benchmarks/bench_forms.py [--quick].

The plain layer and a layer with one setting run on the same tensor, in the same rounds: forward and training step for
the settings of train mode, eval mode for the own weight. Ghost batches are also compared with the usual code, a Python
loop that calls the plain layer for each chunk, and with a batch in layout channels_last, which is copied. Written to
benchmarks/results/forms.json. "copies" is the memory of new tensors of the batch's size in one forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_overhead import spread_of
from report import save, spread, tell_load
from torch import Tensor, nn

from batchnorm import Renorm, bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment
from batchnorm.layers import LAYERS

# sizes of inputs: rows, sequences, images
SHAPES = ((8192, 256), (64, 256, 300), (64, 64, 56, 56))
GHOSTS = (8, 32)  # examples of a ghost batch, of batches that have so many sizes of it
Step = Callable[[], object]


def main() -> None:
    is_quick = "--quick" in sys.argv
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes, rounds = (SHAPES[1:2], 3) if is_quick else (SHAPES, 15)
    rows = [row for shape in shapes for row in _rows(shape, rounds)]
    tell_load(rows)
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rows": rows}
    save("forms-quick" if is_quick else "forms", data)


def _rows(shape: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    kind = LAYERS[max(len(shape) - 3, 0)]
    x = torch.randn(shape)
    size = GHOSTS[1] if len(shape) == 2 else GHOSTS[0]
    ghosts, plain = kind(shape[1], ghost_batch_size=size), kind(shape[1])
    cases = {
        "renorm": (kind(shape[1], renorm=Renorm(3, 5)), plain, x),
        f"ghost batches of {size}": (ghosts, plain, x),
        f"ghost batches of {size}, one example left over": (ghosts, plain, x[1:]),
        f"loop over chunks of {size}": (Chunks(plain, size), plain, x),
        f"ghost batches of {size} against the loop": (ghosts, Chunks(plain, size), x),
    }
    if len(shape) > 2:
        cases[f"ghost batches of {size}, channels_last"] = (ghosts, plain, _channels_last(x))
    found = [
        row for name, (layer, other, batch) in cases.items() for row in _trained(name, layer, other, batch, rounds)
    ]
    own = kind(shape[1], own_weight=0.1).eval()
    return [*found, _row("own weight", "eval", _forward(own, x), _forward(kind(shape[1]).eval(), x), x, rounds)]


class Chunks(nn.Module):
    """The usual code: a plain layer for each chunk of neighbours."""

    def __init__(self, layer: nn.Module, size: int) -> None:
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x: Tensor) -> Tensor:
        """The chunks' results, joined."""
        return torch.cat([self.layer(chunk) for chunk in x.split(self.size)])


def _trained(name: str, layer: nn.Module, other: nn.Module, x: Tensor, rounds: int) -> list[dict[str, Any]]:
    return [
        _row(name, case, make(layer, x), make(other, x), x, rounds)
        for case, make in (("forward", _forward), ("step", _step))
    ]


def _forward(layer: nn.Module, x: Tensor) -> Step:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def _step(layer: nn.Module, x: Tensor) -> Step:
    given, grad = x.detach().requires_grad_(), torch.randn_like(x)

    def run() -> None:
        given.grad = None
        layer(given).backward(grad)

    return run


def _row(name: str, case: str, step: Step, plain: Step, x: Tensor, rounds: int) -> dict[str, Any]:
    sides = {"form": timing.timed(step), "plain": timing.timed(plain)}
    with timing.others() as busy:
        run = timing.race(sides, rounds=rounds)
    ratio = spread_of(run.ratio({"form": 1}, {"plain": 1}))
    milliseconds = {f"{side}_ms": 1e3 * spread_of(run.time({side: 1}))["median"] for side in sides}
    copies = _allocated(step) / (x.numel() * x.element_size())
    print(f"{'x'.join(map(str, x.shape)):<14} {name:<44} {case:<8} {spread(ratio)} x, copies {copies:.2f}", flush=True)
    return {
        "shape": tuple(x.shape),
        "form": name,
        "case": case,
        "ratio": ratio,
        "copies": copies,
        **milliseconds,
        **busy,
    }


def _allocated(step: Step) -> float:
    """Bytes of the new tensors of one call, without those of less than a percent of all."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return float(sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()))


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


if __name__ == "__main__":
    main()
