"""Statistics at test time on changed digits: python benchmarks/shift/bench_adaptation.py [--quick] [--only WORDS].

Three networks, twelve changes, streams of 1,000 digits in four orders and several sizes of batches. Every stream
begins with the change, so that what an adapter answers before its alarm is in its errors. One stream goes through all
changes one after another, and one has them all mixed. On a clock (Alfarra et al. 2024) a rule that takes k times a
forward pass sees every k-th batch; the others are answered by the statistics at hand. Written to
benchmarks/results/shift_adaptation.json, with --only the settings whose names begin with the words alone.
"""

from __future__ import annotations

import copy
import json
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
from report import FOLDER, save
from rules import RULES

from batchnorm.experiment.environment import environment

SEEDS = (0, 1, 2)
# sizes of batches in each order; None is 1 to 200
SIZES: dict[str, tuple[int | None, ...]] = {
    "i.i.d.": (1, 8, 32, 200, None),
    "by class": (1, 8, 32, 200, None),
    "Dirichlet": (8, 32, 200, None),
    "imbalanced": (8, 32, 200, None),
}
EACH = 250  # digits of each change where one follows the other, or all are mixed
MISSED = "batches missed"
MEDIAN_OF = 9  # times, since others interrupt a pass now and then


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("batchnorm").setLevel("CRITICAL")
    quick = "--quick" in sys.argv
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    errors: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        data, start = digits(seed), time.perf_counter()
        model = trained(*data["train"], seed)
        for setting, rows in of_network(model, data, seed, quick=quick, only=only):
            for name, row in rows.items():
                errors.setdefault(setting, {}).setdefault(name, []).append(row)
        print(f"network {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    tell(errors)
    name = "shift_adaptation" + ("-quick" if quick else "")
    if only:
        errors = json.loads((FOLDER / f"{name}.json").read_text())["errors"] | errors
    about = {"environment": environment(), "changes": list(CHANGES), "seeds": len(SEEDS[:1] if quick else SEEDS)}
    save(name, {**about, "errors": errors})


def of_network(
    model: nn.Module, data: Any, seed: int, *, quick: bool, only: str = ""
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Errors of every rule in every setting: order and size of batches, and one change after another."""
    x, y = data["stream"]
    clean = data["calibration"][0]
    changes = dict(list(CHANGES.items())[:: 4 if quick else 1])
    changed = {"clean": x} | {name: change(x, generator(seed, name)) for name, change in changes.items()}
    for order, sizes in SIZES.items():
        for size in sizes[1:3] if quick else sizes:
            setting = f"{order}, {f'n = {size}' if size else 'n from 1 to 200'}"
            if not setting.startswith(only):
                continue
            picked = ORDERS[order](y, generator(seed, order))
            found = {
                rule: {name: error(model, rule, z[picked], y[picked], clean, size, seed) for name, z in changed.items()}
                for rule in RULES
            }
            yield setting, found
    picks = [iid(y, generator(seed, name))[:EACH] for name in changed]
    stream = torch.cat([z[picked] for z, picked in zip(changed.values(), picks, strict=True)])
    labels = torch.cat([y[picked] for picked in picks])
    parts = torch.arange(len(changed)).repeat_interleave(EACH)
    mixed = torch.randperm(len(parts), generator=generator(seed, "mixed"))
    for setting, order in {"one after another": torch.arange(len(parts)), "mixed": mixed}.items():
        for size in (8, 32):
            if f"{setting}, n = {size}".startswith(only):
                given = stream[order], labels[order], clean, [size] * (len(labels) // size)
                wrong = {rule: mistakes(model, rule, *given).double() for rule in RULES}
                found = {rule: by_part(w, parts[order], list(changed)) for rule, w in wrong.items()}
                yield f"{setting}, n = {size}", found
    for size in (8, 32):
        if f"clock, n = {size}".startswith(only):
            yield f"clock, n = {size}", on_clock(model, changed, y, clean, size, seed)


def by_part(wrong: Tensor, parts: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Errors on the examples of each change, %."""
    return {name: 100 * float(wrong[parts == part].mean()) for part, name in enumerate(names)}


def on_clock(
    model: nn.Module, changed: dict[str, Tensor], y: Tensor, clean: Tensor, size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Errors where rules that are slow miss batches, and how many they miss, %; the order is random."""
    picked = iid(y, generator(seed, "clock"))
    found: dict[str, dict[str, float]] = {rule: {} for rule in RULES}
    for rule, row in found.items():
        missed = []
        for name, x in changed.items():
            wrong, share = late(model, rule, x[picked], y[picked], clean, size)
            row[name] = 100 * float(wrong.double().mean())
            missed.append(100 * share)
        row[MISSED] = statistics.mean(missed)
    return found


@torch.no_grad()
def late(model: nn.Module, rule: str, x: Tensor, y: Tensor, clean: Tensor, size: int) -> tuple[Tensor, float]:
    """Which answers are wrong, and the share of batches that came while the rule was busy.

    A batch comes each time that a plain forward pass would be done. Each batch that the rule takes is timed beside a
    plain pass of the same batch; the median ratio of the last ones, of an adapter those in the same state, tells for
    how many further batches the rule is busy.
    """
    twin = copy.deepcopy(model)
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(own, nn.modules.batchnorm._BatchNorm):
            other.running_mean, other.running_var = own.running_mean, own.running_var  # rules write them in place
    answers, busy, missed = [], 0.0, 0
    ratios: dict[str, list[float]] = {}
    with RULES[rule](model, clean) as made:
        for part in x.split(size):
            if busy >= 1:
                answers.append(twin(part).argmax(1))
                busy, missed = busy - 1, missed + 1
                continue
            plain = min(timed(twin, part)[1] for _ in range(2))
            answer, took = timed(model, part)
            answers.append(answer.argmax(1))
            of_state = ratios.setdefault(getattr(made, "state", ""), [])
            of_state.append(took / plain)
            busy += max(0.0, statistics.median(of_state[-MEDIAN_OF:]) - 1)
    return torch.cat(answers) != y, missed / len(answers)


def timed(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """An answer and the seconds of this process that it took."""
    start = time.process_time()
    answer = model(x)
    return answer, time.process_time() - start


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
            changed = statistics.mean(v for row in rows for name, v in row.items() if name in CHANGES)
            missed = "".join(f"   missed {row[MISSED]:.0f} %" for row in rows if MISSED in row)
            print(f"    {rule:<26}clean {clean:5.1f}   changed {changed:5.1f}{missed}", flush=True)


if __name__ == "__main__":
    main()
