"""Statistics at test time on changed digits: python benchmarks/shift/bench_adaptation.py [--quick].

Three networks, twelve changes, streams of 1,000 digits in four orders and several sizes of batches. Every stream
begins with the change, so that what an adapter answers before its alarm is in its errors. One stream goes through all
changes one after another. Written to benchmarks/results/shift_adaptation.json.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from digits import CHANGES, ORDERS, digits, iid, ragged, trained
from report import save
from rules import RULES

from batchnorm.lecture.verdicts import environment

SEEDS = (0, 1, 2)
# sizes of batches in each order; None is 1 to 200
SIZES: dict[str, tuple[int | None, ...]] = {
    "i.i.d.": (1, 8, 32, 200, None),
    "by class": (1, 8, 32, 200, None),
    "Dirichlet": (8, 32, 200, None),
    "imbalanced": (8, 32, 200, None),
}
EACH = 250  # digits of each change where one follows the other


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("batchnorm").setLevel("CRITICAL")
    quick = "--quick" in sys.argv
    errors: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        data, start = digits(seed), time.perf_counter()
        model = trained(*data["train"], seed)
        for setting, rows in of_network(model, data, seed, quick=quick):
            for name, row in rows.items():
                errors.setdefault(setting, {}).setdefault(name, []).append(row)
        print(f"network {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    tell(errors)
    about = {"environment": environment(), "changes": list(CHANGES), "seeds": len(SEEDS[:1] if quick else SEEDS)}
    save("shift_adaptation" + ("-quick" if quick else ""), {**about, "errors": errors})


def of_network(
    model: nn.Module, data: Any, seed: int, *, quick: bool
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Errors of every rule in every setting: order and size of batches, and one change after another."""
    x, y = data["stream"]
    clean = data["calibration"][0]
    changes = dict(list(CHANGES.items())[:: 4 if quick else 1])
    changed = {"clean": x} | {name: change(x, generator(seed, name)) for name, change in changes.items()}
    for order, sizes in SIZES.items():
        for size in sizes[1:3] if quick else sizes:
            picked = ORDERS[order](y, generator(seed, order))
            found = {
                rule: {name: error(model, rule, z[picked], y[picked], clean, size, seed) for name, z in changed.items()}
                for rule in RULES
            }
            yield f"{order}, {f'n = {size}' if size else 'n from 1 to 200'}", found
    picks = [iid(y, generator(seed, name))[:EACH] for name in changed]
    stream = torch.cat([z[picked] for z, picked in zip(changed.values(), picks, strict=True)])
    labels = torch.cat([y[picked] for picked in picks])
    for size in (8, 32):
        wrong = {rule: mistakes(model, rule, stream, labels, clean, [size] * (len(labels) // size)) for rule in RULES}
        found = {
            rule: {name: 100 * float(part.double().mean()) for name, part in zip(changed, w.split(EACH), strict=True)}
            for rule, w in wrong.items()
        }
        yield f"one after another, n = {size}", found


def error(model: nn.Module, rule: str, x: Tensor, y: Tensor, clean: Tensor, size: int | None, seed: int) -> float:
    """Errors on a stream, %."""
    sizes = ragged(len(x), generator(seed, "sizes")) if size is None else [size] * (len(x) // size)
    return 100 * float(mistakes(model, rule, x, y, clean, sizes).double().mean())


@torch.no_grad()
def mistakes(model: nn.Module, rule: str, x: Tensor, y: Tensor, clean: Tensor, sizes: Sequence[int]) -> Tensor:
    """Which answers are wrong, (N,); examples that fill no batch make one more."""
    rest = len(x) - sum(sizes)
    with RULES[rule](model, clean):
        answers = [model(part).argmax(1) for part in x.split([*sizes, *([rest] if rest else [])])]
    return torch.cat(answers) != y


def generator(seed: int, about: str) -> torch.Generator:
    """The same for the same words."""
    return torch.Generator().manual_seed(1000 * seed + sum(map(ord, about)))


def tell(errors: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Print each setting: clean, and the mean over changes, over networks."""
    for setting, rules in errors.items():
        print(f"\n{setting}")
        for rule, rows in rules.items():
            clean = statistics.mean(row["clean"] for row in rows)
            changed = statistics.mean(v for row in rows for name, v in row.items() if name != "clean")
            print(f"    {rule:<26}clean {clean:5.1f}   changed {changed:5.1f}", flush=True)


if __name__ == "__main__":
    main()
