"""How many of the doctor's findings are so: every finding on other people's files, judged by arithmetic of its own.

    python acceptance/precision.py COLUMN FOLDER...     COLUMN: before, after

A folder holds one folder for each package. The findings of the installed batchnorm go to COLUMN of precision.json
beside this file, and both columns as a table to precision.md. Packages of held_out.txt are refused.

A finding is *false* if what it claims is not so, *useless* if it is so but its remedy cannot be carried out on that
file, or another finding of the layer names the cause, *unjudged* where the file does not hold what the claim needs.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path

import judges
import running
from halved import halved
from independent import Layer, layers
from networks import networks

import batchnorm
from batchnorm.doctor import examine

HERE = Path(__file__).parent
_TORCH = (".pt", ".pth", ".tar", ".ckpt", ".bin", ".safetensors", ".pkl", ".pickle")
FORMATS = frozenset((*_TORCH, ".onnx", ".h5", ".hdf5", ".tflite", ".pb", ".mlmodel", ".npz"))
SMALLEST = 10_000  # bytes: a network with batch norm has more
WORDS = (b"running_var", b"moving_variance", b"BatchNorm")  # that tell of batch norm in a file that is not read
NETWORK = "(network)"  # in place of a file
VERDICTS = ("true", "false", "useless", "unjudged")


@dataclass(frozen=True)
class Judged:
    """One finding, and what came of it."""

    package: str
    file: str
    code: str
    severity: str
    layer: str
    measured: str
    remedy: str
    row: str  # the consequence: findings of one code and consequence are one row of the printed page
    verdict: str
    because: str


def main(column: str, folders: list[Path]) -> None:
    rows, read, refused = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for package, path in [*files(folders), *copies(folders, Path(scratch))]:
            rows += of_file(package, path, read, refused)
    for package, model, batches in (found for folder in folders for found in networks(folder)):
        rows += of_network(package, model, batches, read, refused)
    write(column, rows, read, refused)


def of_file(package: str, path: Path, read: dict, refused: dict) -> list[Judged]:
    name = f"{package}/{path.name}"
    try:
        diagnosis = examine(path)
    except (ValueError, OSError, ImportError) as error:
        if norms := mentions(path):
            refused[name] = f"{norms}; {str(error).removeprefix(f'{path}: ')}"
        return []
    found = layers(path) if diagnosis.layers else []
    if found:
        read[name] = {"layers": len(diagnosis.layers), **named_dead(diagnosis.findings, found)}
    elif norms := mentions(path):
        refused[name] = f"{norms}; read, and no layer found"
    return list(judge(diagnosis.findings, found, path, package))


def of_network(package: str, model, batches, read: dict, refused: dict) -> list[Judged]:
    name = f"{package}/{NETWORK}"
    try:
        diagnosis = examine(model, batches)
    except (ValueError, TypeError, RuntimeError) as error:
        refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        diagnosis = examine(model, example=batches[0])
    read[name] = {"layers": len(diagnosis.layers), **named_dead(diagnosis.findings, running.stored(model))}
    return list(judge_network(diagnosis.findings, model, batches, package))


def copies(folders: list[Path], scratch: Path):
    """One file of each package in half precision, which no package of the list has."""
    done = set()
    for package, path in files(folders):
        if package not in done and path.suffix in {".pt", ".pth", ".tar", ".onnx"} and has_layers(path):
            (scratch / package).mkdir(exist_ok=True)
            if copy := halved(path, scratch / package):
                done.add(package)
                yield f"{package}, halved", copy


def has_layers(path: Path) -> bool:
    try:
        return bool(layers(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        return False


def files(folders: list[Path]):
    """Every file that may hold a model, with its package; none of a package that is held out."""
    held_out = {line.split()[-1].lower() for line in lines(HERE / "held_out.txt")}
    for folder in folders:
        for package in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
            if package.name.lower().replace("_", "-") in held_out:
                raise SystemExit(f"{package.name} is held out: expected packages of tuning.txt. Remove {package}.")
            for path in sorted(package.rglob("*")):
                if path.is_file() and path.suffix in FORMATS and path.stat().st_size > SMALLEST:
                    yield package.name, path


def lines(path: Path) -> list[str]:
    """A list's lines without its words at the top."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]


def is_held_out(name: str) -> bool:
    """The rule of the split."""
    return int(hashlib.sha256(name.lower().encode()).hexdigest(), 16) % 3 == 0


def mentions(path: Path) -> str:
    """Which words in a file's bytes tell of batch norm."""
    content = path.read_bytes()
    return ", ".join(f"{word.decode()} {number} times" for word in WORDS if (number := content.count(word)))


def named_dead(findings, found: list[Layer]) -> dict[str, int]:
    """Channels that are active in less than 1 % by a ReLU that is known to follow, and how many of them are named."""
    named = {
        (finding.layer, channel) for finding in findings if finding.code == "BN106" for channel in finding.channels
    }
    dead = [(layer, channel) for layer in found for channel in judges.rarely_active(layer)]
    told = sum(any((name, channel) in named for name in layer.names) for layer, channel in dead)
    return {"dead channels": len(dead), "named": told}


def judge(findings, found: list[Layer], path: Path, package: str):
    """Every finding with its verdict."""
    elsewhere = defaultdict(set)  # channels that more telling findings of a layer name
    for finding in findings:
        if finding.code in {"BN105", "BN106"}:
            elsewhere[finding.layer].update(finding.channels)
    for finding in findings:
        verdict, why = verdict_of(finding, found, layer_of(finding.layer, found), path)
        if verdict == "true" and (reason := judges.impossible(finding, path)):
            verdict, why = "useless", f"{why}; {reason}"
        if verdict == "true" and finding.code == "BN104" and set(finding.channels) <= elsewhere[finding.layer]:
            verdict, why = "useless", f"{why}; another finding names these channels"
        yield Judged(
            package, path.name, finding.code, str(finding.severity), finding.layer, finding.measured,
            finding.remedy.replace(str(path), path.name), finding.consequence, verdict, why,
        )  # fmt: skip


def judge_network(findings, model, batches, package: str):
    """Every finding on a network with its verdict."""
    live = running.Live.of(model, [batch if isinstance(batch, tuple) else (batch,) for batch in batches])
    named = defaultdict(set)  # channels that other findings of a layer name
    for finding in findings:
        if finding.code in {"BN105", "BN106"}:
            named[finding.layer].update(finding.channels)
    for finding in findings:
        live.finding = finding
        known = running.CODES.get(finding.code)
        verdict, why = known(live) if known else ("unjudged", "no judge for this code")
        if verdict == "true" and (reason := running.impossible(finding)):
            verdict, why = "useless", f"{why}; {reason}"
        before = live.before(finding.layer)
        if (
            verdict == "true"
            and finding.code == "BN211"
            and set(finding.channels) <= named[finding.layer] | named[before]
        ):
            verdict, why = "useless", f"{why}; other findings name these channels of {finding.layer} or {before}"
        yield Judged(
            package, NETWORK, finding.code, str(finding.severity), finding.layer, finding.measured,
            finding.remedy, finding.consequence, verdict, why,
        )  # fmt: skip


def layer_of(name: str, found: list[Layer]) -> Layer | None:
    """The layer that a finding names, "name (2)" the second of that name; or the only one whose name ends so."""
    repeated = re.fullmatch(r"(.+) \((\d+)\)", name)
    base, number = (repeated[1], int(repeated[2])) if repeated else (name, 1)
    exact = [layer for layer in found if base in layer.names]
    if len(exact) >= number:
        return exact[number - 1]
    ends = [layer for layer in found if any(o.endswith(f".{name}") or name.endswith(f".{o}") for o in layer.names)]
    return ends[0] if len(ends) == 1 else None


def verdict_of(finding, found: list[Layer], layer: Layer | None, path: Path) -> tuple[str, str]:
    if finding.code in judges.WHOLE:
        return judges.WHOLE[finding.code](finding, found)
    if finding.code not in judges.CODES:
        return "unjudged", "no judge for this code"
    if layer is None:
        return "unjudged", f"no layer of the name {finding.layer!r} was found by the second reading"
    return judges.CODES[finding.code](judges.Case(finding, layer, path))


def write(column: str, rows: list[Judged], read: dict, refused: dict) -> None:
    path = HERE / "precision.json"
    columns = unpacked(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    columns[column] = {
        "commit": product_commit(),
        "read": read,
        "refused or without layers": refused,
        "findings": [asdict(row) for row in rows],
    }
    replaced(path, packed(columns))
    replaced(HERE / "precision.md", page(columns))
    print((HERE / "precision.md").read_text(encoding="utf-8"))


def product_commit() -> str:
    """Of the batchnorm that was asked; "" where it is no checkout."""
    command = ["git", "-C", str(Path(batchnorm.__file__).parent), "log", "-1", "--format=%h", "--", "."]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def replaced(path: Path, text: str) -> None:
    fresh = path.with_suffix(f"{path.suffix}.new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


REPEATED = ("remedy", "row")  # the same words in many findings: stored once, and by their number


def packed(columns: dict) -> str:
    """JSON with one finding a line, a list in the order of ``Judged``, so that a diff shows which ones changed."""
    words: dict[str, int] = {}
    parts = []
    for column, content in columns.items():
        found = [[words.setdefault(v, len(words)) if k in REPEATED else v for k, v in row.items()]
                 for row in content["findings"]]  # fmt: skip
        head = json.dumps({key: value for key, value in content.items() if key != "findings"}, indent=1)[:-2]
        parts.append(f'"{column}": {head},\n "findings": [\n' + ",\n".join(map(json.dumps, found)) + "\n ]\n}")
    fields = json.dumps([field.name for field in dataclass_fields(Judged)])
    return f'{{\n"fields": {fields},\n"words": {json.dumps(list(words), indent=1)},\n' + ",\n".join(parts) + "\n}\n"


def unpacked(stored: dict) -> dict:
    fields, words = stored.pop("fields"), stored.pop("words")
    for content in stored.values():
        rows = (dict(zip(fields, row, strict=True)) for row in content["findings"])
        content["findings"] = [{k: words[v] if k in REPEATED else v for k, v in row.items()} for row in rows]
    return stored


def page(columns: dict) -> str:
    names = [name for name in ("before", "after") if name in columns]
    out = [
        "# Precision of the doctor on other people's files",
        "",
        "Written by `make acceptance` (precision.py); each finding and its judgement are in precision.json.",
        "A cell is findings / false / useless / unjudged.",
        "",
    ]
    for title, key in (("By code", lambda row: row["code"]), ("By package", lambda row: row["package"])):
        out += [f"## {title}", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
        tables = {name: tallied(columns[name]["findings"], key) for name in names}
        for entry in sorted({entry for table in tables.values() for entry in table}):
            out.append(f"| {entry} | {' | '.join(cell(tables[name].get(entry, Counter())) for name in names)} |")
        out += [f"| **all** | {' | '.join(cell(total(tables[name])) for name in names)} |", ""]
    out += ["## Printed rows", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    out += [f"| rows | {' | '.join(cell(printed(columns[name]['findings'])) for name in names)} |"]
    dead = [
        [sum(entry[key] for entry in columns[name]["read"].values()) for key in ("named", "dead channels")]
        for name in names
    ]
    out += [f"| dead channels named, of those behind a known ReLU | {' | '.join(f'{a} of {b}' for a, b in dead)} |", ""]
    out += ["A row is what one page shows of one code and consequence; it is as true as its best finding.", ""]
    for name in names:
        out += [f"## Why, {name}", "", "One of each kind:", "", *reasons(columns[name]["findings"]), ""]
    for name in names:
        content = columns[name]
        left = unread(content["refused or without layers"])
        out += [f"## {name}: {len(content['read'])} files and networks read", "", "Not read, and why:", "", *left, ""]
    return "\n".join(out)


def unread(refused: dict[str, str]) -> list[str]:
    """One line for the files of one package and reason."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for file, why in refused.items():
        package, _, name = file.partition("/")
        words, _, reason = why.partition("; ")
        groups[package, reason or words].append(f"{name} ({words})" if reason else name)
    return [f"- {package}, {len(names)}: `{names[0]}`: {reason}" for (package, reason), names in groups.items()]


def reasons(findings: list[dict]) -> list[str]:
    """The first finding of each code and verdict, with what was computed."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in findings:
        groups[row["code"], row["verdict"]].append(row)
    return [
        f"- {code} {verdict}, {len(group)} times: `{group[0]['package']}/{group[0]['file']}` {group[0]['layer']}, "
        f'"{group[0]["measured"]}": {group[0]["because"]}.'
        for (code, verdict), group in sorted(groups.items())
    ]


def tallied(findings: list[dict], key) -> dict[str, Counter]:
    table: dict[str, Counter] = defaultdict(Counter)
    for row in findings:
        table[key(row)][row["verdict"]] += 1
    return table


def total(table: dict[str, Counter]) -> Counter:
    return sum(table.values(), Counter())


def cell(counts: Counter) -> str:
    return " / ".join(str(number) for number in (counts.total(), *(counts[verdict] for verdict in VERDICTS[1:])))


def printed(findings: list[dict]) -> Counter:
    groups: dict[tuple, set[str]] = defaultdict(set)
    for row in findings:
        groups[row["package"], row["file"], row["code"], row["row"]].add(row["verdict"])
    order = ("true", "unjudged", "useless", "false")
    return Counter(next(verdict for verdict in order if verdict in verdicts) for verdicts in groups.values())


if __name__ == "__main__":
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
