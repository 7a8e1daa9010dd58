"""What watching a training costs: python benchmarks/bench_watch.py [--quick].

ResNet-18 on (16, 3, 64, 64), one step of every arm in each round: not watched, ours with the free tier, ours as it
comes, and two peers that log histograms at the same interval: wandb.watch (offline, log="all") and TensorBoard. Two
ratios to the training that is not watched: of a step's time (median over rounds) and of the processor time of all steps
together, which holds the rare look and not what other programs do. Written to benchmarks/results/watch.json.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from networks import resnet18
from report import save, spread, tell_load

import batchnorm as bn
from batchnorm import bench
from batchnorm import paired_timing as timing
from batchnorm.experiment.environment import environment
from batchnorm.instruments.look_schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE, CLASSES, EVERY, BUDGET = (16, 3, 64, 64), 1000, 100, 0.02


class OwnTime:
    """Seconds in which one arm was at work: a budget is a share of its own time, not of everybody's."""

    def __init__(self) -> None:
        self.before, self.since = 0.0, 0.0

    def __call__(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since else 0.0)

    def run(self, step: Callable[[], None]) -> float:
        start = self.since = time.perf_counter()
        step()
        self.before += time.perf_counter() - start
        self.since = 0.0
        return time.perf_counter() - start


def main() -> None:
    rounds = 30 if "--quick" in sys.argv else 200
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: make(folder) for name, make in ARMS.items() if _is_there(name)}
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        processor = dict.fromkeys(arms, 0.0)
        with timing.others() as busy:
            for turn in range(-2, rounds):
                for name in _order(list(arms), turn):
                    used = time.process_time()
                    taken = arms[name].turn()
                    if turn >= 0:
                        seconds[name].append(taken)
                        processor[name] += time.process_time() - used
    rows = [_row(name, seconds, processor, arms[name]) | busy for name in arms]
    for row in rows:
        print(f"{row['arm']:<24} step {spread(row['step'])}   processor {row['processor']:.3f}")
    tell_load(rows)
    peers = {name: version(name) for name in ("wandb", "tensorboard") if find_spec(name)}
    data = {
        "schema_version": bench.SCHEMA_VERSION,
        "environment": environment() | peers,
        "rounds": rounds,
        "network": "ResNet-18",
        "shape": list(SHAPE),
        "every": EVERY,
        "budget": BUDGET,
        "rows": rows,
    }
    save("watch-quick" if "--quick" in sys.argv else "watch", data)


def _row(name: str, seconds: dict[str, list[float]], processor: dict[str, float], arm: Arm) -> dict[str, Any]:
    base, own = seconds["not watched"], seconds[name]
    found = timing.Spread.of([a / b for a, b in zip(own, base, strict=True)])
    return {
        "arm": name,
        "step": {"median": found.median, "low": found.low, "high": found.high},
        "step_ms": 1e3 * statistics.median(own),
        "processor": processor[name] / processor["not watched"],
        "measured_cost": arm.cost(),
        "looks": arm.looks(),
    }


def _order(names: list[str], turn: int) -> list[str]:
    """Everybody comes first equally often."""
    at = turn % len(names)
    return names[at:] + names[:at]


class Arm:
    """A network in training, and what is done at each step besides."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = resnet18()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.clock, self.steps = OwnTime(), 0
        self.x, self.y = torch.randn(SHAPE), torch.arange(SHAPE[0]) % CLASSES

    def turn(self) -> float:
        return self.clock.run(self._step)

    def _step(self) -> None:
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.more(loss)

    def more(self, loss: torch.Tensor) -> None:
        """What a training without a logger does with the loss: nothing."""

    def cost(self) -> float | None:
        return None

    def looks(self) -> int | None:
        return None


class Watched(Arm):
    def __init__(self, folder: str, probe: bool | None) -> None:
        super().__init__()
        self.run = bn.watch(self.model, log=f"{folder}/{probe}", every=EVERY, budget=BUDGET, probe=probe)
        self.run._schedule = Schedule(EVERY, BUDGET, self.clock)
        # the hook sees every optimizer of the process, as it does in any training
        self.run.start()

    def more(self, loss: torch.Tensor) -> None:
        self.run.log(loss=loss)

    def cost(self) -> float:
        return self.run.cost

    def looks(self) -> int:
        return len(self.run.records)


class TensorBoard(Arm):
    def __init__(self, folder: str) -> None:
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(f"{folder}/tensorboard")

    def more(self, loss: torch.Tensor) -> None:
        self.writer.add_scalar("loss", loss.detach(), self.steps)
        if self.steps % EVERY == 0:
            for name, parameter in self.model.named_parameters():
                self.writer.add_histogram(name, parameter, self.steps)
                self.writer.add_histogram(f"{name}.grad", parameter.grad, self.steps)


class Wandb(Arm):
    def __init__(self, folder: str) -> None:
        super().__init__()
        os.environ["WANDB_MODE"], os.environ["WANDB_SILENT"] = "offline", "true"
        import wandb

        self.run = wandb.init(dir=folder, project="watch")
        self.run.watch(self.model, log="all", log_freq=EVERY)

    def more(self, loss: torch.Tensor) -> None:
        self.run.log({"loss": loss.item()})


ARMS: dict[str, Callable[[str], Arm]] = {
    "not watched": lambda _: Arm(),
    "ours, free tier": lambda folder: Watched(folder, probe=False),
    "ours": lambda folder: Watched(folder, probe=None),
    "wandb.watch": Wandb,
    "TensorBoard histograms": TensorBoard,
}
_NEEDS = {"wandb.watch": "wandb", "TensorBoard histograms": "tensorboard"}


def _is_there(name: str) -> bool:
    there = name not in _NEEDS or find_spec(_NEEDS[name]) is not None
    if not there:
        print(f"{name}: not installed")
    return there


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    main()
