"""docs/speed.md and docs/speed.svg from benchmarks/results/*.json, so that no number in them can drift.

The page is written by hand but for what stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_accuracy import as_text
from report import FOLDER, VERDICTS, goal_in_words, spread, worst_in_words
from speed_chart import chart

from batchnorm.paired_timing import BUSY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = ("torch", "torch in place", "torch.compile", "JAX", "TensorFlow", "ONNX Runtime", "oneDNN")


def main() -> None:
    speed, accuracy, overhead, memory = (_read(name) for name in ("speed", "accuracy", "overhead", "memory"))
    parts = {
        "machine": _machine(speed),
        "goals": _goals(speed["goals"], accuracy),
        "times": _times(speed["rows"]),
        "networks": _networks(speed["rows"]),
        "allocator": _allocator(speed["allocator"]),
        "accuracy": _accuracy(accuracy["rows"]),
        "overhead": _overhead(overhead["rows"]),
        "memory": _memory(memory["rows"]),
        "missing": _missing(speed, accuracy),
    }
    page = DOCS / "speed.md"
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        text, count = re.subn(
            rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)",
            lambda m, p=part: f"{m[1]}\n{p}\n\n{m[2]}",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"{page.name} needs one pair of markers {name}:begin and {name}:end, got {count}. Add it.")
    _replace(page, text)
    _replace(DOCS / "speed.svg", chart(speed["rows"]))
    print("wrote docs/speed.md and docs/speed.svg")


def _read(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise ValueError(f"the page needs benchmarks/results/{name}.json, which is not there. Run: make bench")
    return json.loads(path.read_text(encoding="utf-8"))


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _machine(speed: Mapping[str, Any]) -> str:
    around, peers = speed["environment"], speed["peers"]
    others = [f"{name} {found['version']}" for name, found in peers.items() if "version" in found]
    disturbed = sum(row.get("others", 0) > BUSY for row in speed["rows"])
    sentence = (
        f"Measured on {around['processor']}, {around['cores']} cores, {speed['threads']} threads, with Python "
        f"{around['python']}, torch {around['torch']}, {', '.join(others) or 'no other library'}; kernels: "
        f"{around['kernels']}."
    )
    if not speed["tuned"]:
        sentence += f" The allocator was left as it is: tuning {speed['not_tuned']}."
    if disturbed:
        sentence += (
            f" During {disturbed} of {len(speed['rows'])} cases other programs used more than {BUSY:.0%} of the "
            "machine; their quartiles are wide."
        )
    return sentence


def _goals(goals: Sequence[Mapping[str, Any]], accuracy: Mapping[str, Any]) -> str:
    rows = [[g["goal"], goal_in_words(g), worst_in_words(g), VERDICTS[g["reached"]]] for g in goals]
    worst = max(row["sides"]["ours"]["y"] for row in accuracy["rows"] if row["goal"])
    bound = f"errors at most {accuracy['bound']:g} of the largest value"
    rows.append(["accuracy, any layout, mean/sd up to 1e5", bound, f"{worst:.1e}", VERDICTS[accuracy["reached"]]])
    return table(["case", "goal", "worst case measured (quartiles)", "verdict"], rows)


def _times(rows: Sequence[Mapping[str, Any]]) -> str:
    measured = [row for row in rows if "limit" in row]
    cells = ([_case(row), *_own(row), *(_ratio(row, name) for name in COLUMNS)] for row in measured)
    return table(["case", "ours, ms", "ours / limit", "ours / floor", *COLUMNS], cells)


def _case(row: Mapping[str, Any]) -> str:
    shape = " × ".join(map(str, row["shape"]))
    half = "" if row["dtype"] == "float32" else f" {row['dtype']}"
    return f"{row['words']}, {shape}{half}{' channels_last' if row['channels_last'] else ''}"


def _own(row: Mapping[str, Any]) -> list[str]:
    ours = row["contestants"]["ours"]
    return [f"{ours['ms']['median']:.3g}", *(f"{ours[k]['median']:.2f}" if k in ours else "" for k in _LIMITS)]


_LIMITS = ("to_limit", "to_floor")


def _ratio(row: Mapping[str, Any], name: str) -> str:
    ratio = row["contestants"].get(name, {}).get("ratio")
    return f"{ratio['median']:.2f}" if ratio else ""


def _networks(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for row in (row for row in rows if "limit" not in row):
        sides = row["contestants"]
        own = f"{sides['ours']['ms']['median']:.0f} ms"
        cells.append(
            [_case(row), own, *(spread(sides[s]["ratio"]) for s in ("torch", "ours, memory saved", "no norm"))]
        )
    return table(["step", "ours", "torch.nn / ours", "ours with memory saved / ours", "without norms / ours"], cells)


def _allocator(effect: Mapping[str, Any]) -> str:
    cells = [
        [name, f"{found['ms']['median']:.1f} ms", spread(found["ratio"]) if "ratio" in found else "1"]
        for name, found in effect["contestants"].items()
    ]
    return table(["layer, allocator", "time", "relative to ours, tuned"], cells)


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> str:
    sides = ("ours", "torch", "torch.compile")
    cells = [
        [f"{row['data']}, {row['layout']}"]
        + [_errors(row["sides"][side]) if side in row["sides"] else "" for side in sides]
        for row in rows
    ]
    return table(["values", *sides], cells)


def _errors(found: Mapping[str, Any]) -> str:
    return f"{as_text(found, 'y')}, {as_text(found, 'running_var')}"


def _overhead(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [f"{row['words']}, {' × '.join(map(str, row['shape']))}"]
        + [f"{row[f'{side}_us']['median']:.1f} µs" for side in ("ours", "torch")]
        + [spread(row["ratio"])]
        for row in rows
    ]
    return table(["call", "ours", "torch.nn", "torch.nn / ours"], cells)


def _memory(rows: Sequence[Mapping[str, Any]]) -> str:
    def megabytes(row: Mapping[str, Any], key: str) -> str:
        return f"{row[key]:.0f} MB" if key in row else ""

    names = {"step": "BN + ReLU step on 51 MB"}
    cells = [
        [
            names.get(row["what"], f"{row['what']} step"),
            row["side"],
            megabytes(row, "kept_mb"),
            megabytes(row, "peak_mb"),
        ]
        for row in rows
    ]
    return table(["what", "layers", "kept for backward", "peak"], cells)


def _missing(speed: Mapping[str, Any], accuracy: Mapping[str, Any]) -> str:
    """Every reason for a missing number, and which cases it concerns."""
    reasons: dict[tuple[str, str], int] = {}
    for row in speed["rows"]:
        for name, found in row["contestants"].items():
            if why := found.get("not measured"):
                reasons[name, why] = reasons.get((name, why), 0) + 1
    lines = [f"- {name}: {why} ({count} case{'s' * (count > 1)})" for (name, why), count in reasons.items()]
    return "\n".join(lines + [f"- {reason}" for reason in accuracy["not_measured"]])


if __name__ == "__main__":
    main()
