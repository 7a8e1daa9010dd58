"""Results as files, and as lines on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.bench import write
from batchnorm.paired_timing import BUSY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDER = Path(__file__).parent / "results"


def save(name: str, data: Mapping[str, Any]) -> None:
    """Write benchmarks/results/NAME.json, whole or not at all."""
    FOLDER.mkdir(exist_ok=True)
    write(data, FOLDER / f"{name}.json")
    print(f"wrote benchmarks/results/{name}.json", flush=True)


def tell_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Print a row: the times, what a contestant takes relative to ours, and multiples of the limit."""
    layout = " channels_last" if row["channels_last"] else ""
    head = f"{'x'.join(map(str, row['shape']))} {row['dtype']}{layout}, {row['words']}, {row['rounds']} rounds"
    if row.get("others", 0) > BUSY:
        head += f" (other programs used {row['others']:.0%} of the machine)"
    limits = [f"{name} {row[name]['ms']:.3f} ms = {row[name]['is']}" for name in ("limit", "floor") if name in row]
    print("; ".join([head, *limits]))
    for name, times in row["contestants"].items():
        print(f"    {name:<16} {told(times)}", flush=True)
    return row


def told(times: Mapping[str, Any]) -> str:
    """The numbers of one contestant on a line."""
    if "not measured" in times:
        return f"not measured: {times['not measured']}"
    parts = [f"{times['ms']['median']:9.3f} ms"]
    if "ratio" in times:
        parts.append(f"{spread(times['ratio'])} x ours")
    parts += [f"{spread(times[f'to_{name}'])} x {name}" for name in ("limit", "floor") if f"to_{name}" in times]
    return "  ".join(parts)


def spread(values: Mapping[str, float]) -> str:
    """Median and quartiles."""
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def tell_goals(goals: Sequence[Mapping[str, Any]]) -> None:
    """Print the goal table: the worst of the values measured for each goal beside its bound."""
    print("\ngoals: the worst case of each")
    for goal in goals:
        print(
            f"    {VERDICTS[goal['reached']]:<12} {goal['goal']:<56} {goal_in_words(goal):<28} {worst_in_words(goal)}"
        )


def tell_load(rows: Sequence[Mapping[str, Any]]) -> None:
    """Say how many rows are less sure because the machine was not ours alone."""
    if disturbed := sum(row.get("others", 0) > BUSY for row in rows):
        print(f"{disturbed} of {len(rows)} rows were measured while other programs used over {BUSY:.0%} of the machine")


VERDICTS = {True: "reached", False: "NOT reached", None: "not measured"}


def goal_in_words(goal: Mapping[str, Any]) -> str:
    """Such as: at least 3.0 x torch."""
    if goal["at_most"]:
        return f"at most {goal['bound']:g} x {goal['against']}"
    return f"at least {goal['bound']:g} x as fast as {goal['against']}"


def worst_in_words(goal: Mapping[str, Any]) -> str:
    """The worst value and where it was measured, and the best one."""
    if not goal["values"]:
        return "-"
    ordered = sorted(goal["values"], key=lambda value: value["median"], reverse=goal["at_most"])
    worst, best = ordered[0], ordered[-1]
    where = "x".join(map(str, worst["shape"])) + (" channels_last" if worst["channels_last"] else "")
    rest = f", up to {best['median']:.2f}" if not goal["at_most"] else f", down to {best['median']:.2f}"
    return f"{spread(worst)} at {where}" + (rest if len(ordered) > 1 else "")
