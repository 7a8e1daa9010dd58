"""What a mask costs: python benchmarks/bench_padding.py [--quick].

The same layer with and without ``mask=`` on the same tensor, in the same rounds: train forward, forward + backward, and
eval. With a mask the padding is skipped, and its results are set to 0. Written to benchmarks/results/padding.json.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from bench_overhead import spread_of
from report import save, spread, tell_load
from torch import Tensor

from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment
from batchnorm.layers import LAYERS

# sizes of inputs: sequences as speech has them, long ones, rows, images
SHAPES = ((32, 256, 300), (16, 64, 1600), (8192, 256), (16, 64, 56, 56))
SHARES = (0.0, 0.1, 0.44)  # of positions that are padding, on average


def main() -> None:
    is_quick = "--quick" in sys.argv
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rounds = 3 if is_quick else 21
    shapes = SHAPES[:1] if is_quick else SHAPES
    rows = [row for shape in shapes for share in SHARES for row in _rows(shape, share, rounds)]
    tell_load(rows)
    data = {"schema_version": bench.SCHEMA_VERSION, "environment": environment(), "rows": rows}
    save("padding-quick" if is_quick else "padding", data)


def _rows(shape: tuple[int, ...], share: float, rounds: int) -> list[dict[str, Any]]:
    kind = LAYERS[max(len(shape) - 3, 0)]
    layer, x, valid = kind(shape[1]), torch.randn(shape, requires_grad=True), _valid(shape, share)
    grad = torch.randn(shape)

    def forward(mask: Tensor | None) -> None:
        with torch.no_grad():
            layer(x, mask=mask)

    def both(mask: Tensor | None) -> None:
        x.grad = None
        layer(x, mask=mask).backward(grad)

    found = []
    for case, step, training in (("forward", forward, True), ("step", both, True), ("eval", forward, False)):
        layer.train(training)
        sides = {
            "plain": timing.timed(lambda step=step: step(None)),
            "mask": timing.timed(lambda step=step: step(valid)),
        }
        with timing.others() as busy:
            run = timing.race(sides, rounds=rounds)
        ratio = spread_of(run.ratio({"mask": 1}, {"plain": 1}))
        milliseconds = {f"{side}_ms": 1e3 * spread_of(run.time({side: 1}))["median"] for side in sides}
        found.append({"shape": shape, "padding": share, "case": case, "ratio": ratio, **milliseconds, **busy})
        sizes = "x".join(map(str, shape))
        print(f"{sizes:<14} {share:.0%} padding, {case:<8} {spread(ratio)} x without a mask", flush=True)
    return found


def _valid(shape: tuple[int, ...], share: float) -> Tensor:
    """Valid positions (N, ...): lengths spread evenly around the mean share; of rows, the last ones are padding."""
    if len(shape) == 2:
        return torch.arange(shape[0]) < (1 - share) * shape[0]
    lengths = ((1 - share + share * torch.linspace(-1, 1, shape[0])) * shape[2]).round()
    valid = torch.arange(shape[2]) < lengths.unsqueeze(1)
    return valid.reshape(*valid.shape, *[1] * (len(shape) - 3)).expand(shape[0], *shape[2:])


if __name__ == "__main__":
    main()
