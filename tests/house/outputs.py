"""What the commands say of fixed inputs: exit code, JSON or text, and the files that they write.

Each case runs in a folder of its own that has ``networks.py`` and its files. Of the output everything is kept that does
not depend on the time, the machine, the place and the version.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from planted import FAULTS

from batchnorm.doctor import examine
from batchnorm.reporting.formats import FORMATS
from house import comparing, networks

_VOLATILE = {"seconds", "time", "timestamp"}
_MACHINE = {"environment", "versions"}  # what stands there is not compared, but which keys there are
_SECONDS = re.compile(r"\b\d+(?:\.\d+)? (s|ms|min)\b")
_TIME = re.compile(r'time="[\d.]+"')
_RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_VERSION = re.compile(r"\b\d+\.\d+\.\d+(?:\+\w+)?\b")


@dataclass(frozen=True)
class Case:
    """A command line, how its output is read, and how far its numbers may be apart on another processor."""

    command: str
    tolerance: comparing.Tolerance = comparing.FLOAT32
    read: Callable[[str], Any] = json.loads
    files: tuple[str, ...] = ()


def lines(text: str) -> list[str]:
    """Lines that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def wrapped(text: str) -> list[str]:
    """Items of a text that was broken at the width of a terminal: what is not indented begins one."""
    return [" ".join(part.split()) for part in re.split(r"\n(?=\S)", text) if part.strip()]


def paragraphs(text: str) -> list[str]:
    """The same, where an item ends with an empty line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


class _Words(HTMLParser):
    """The text of a page, without styles, scripts and drawings."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._inside += tag in {"style", "script", "svg"}

    def handle_endtag(self, tag: str) -> None:
        self._inside -= tag in {"style", "script", "svg"}

    def handle_data(self, data: str) -> None:
        if not self._inside and data.strip():
            self.words.append(" ".join(data.split()))


def page(text: str) -> list[str]:
    """The words of an HTML page."""
    parser = _Words()
    parser.feed(text)
    return parser.words


def condensed(text: str) -> Any:
    """A report of ``why`` with the rows of each chart added up, by field."""
    told = json.loads(text)
    for claim in told["claims"].values():
        for chart in claim["charts"]:
            rows = chart.pop("rows")
            numbers = [(k, float(v)) for row in rows for k, v in row.items() if isinstance(v, (int, float))]
            chart["sums"] = {key: sum(v for k, v in numbers if k == key) for key in sorted({k for k, _ in numbers})}
            chart["count"] = len(rows)
    return told


_FAULTY = "doctor networks.py:faulty --data networks.py:uneven --output-format json"
_BRIGHT = "networks.py:net --data networks.py:bright --alpha 0.001"
_WHY = "why networks.py:rows --data networks.py:classes --seeds 2 -q -o why.json --output-format json"

# how each format is read; json and jsonl have cases of their own
_READ = {name: lines for name in FORMATS if name not in {"json", "jsonl"}}
_READ |= {"full": wrapped, "sarif": json.loads, "html": page}
CASES: dict[str, Case] = {
    "doctor broken file": Case("doctor broken.pt --output-format json"),
    "doctor half precision": Case("doctor half.safetensors --output-format json"),
    "doctor legacy file": Case("doctor legacy.pt --output-format json"),
    "doctor whole object": Case("doctor object.pt --output-format json"),
    "doctor faulty model": Case(f"{_FAULTY} --accumulation 4 --ignore BN4"),
    "doctor shifted data": Case(f"{_FAULTY} --select BN4", comparing.EVIDENCE),
    "doctor healthy model": Case(
        "doctor networks.py:net --data networks.py:clean --weights net.pt --reference net.pt --output-format json"
    ),
    "doctor another state": Case("doctor networks.py:net --weights broken.pt --state ema --output-format json"),
    "doctor selected": Case(
        "doctor broken.pt --select BN1 --ignore BN104 --fail-on never --output-format jsonl --write-baseline base.json",
        read=lambda text: [json.loads(line) for line in text.splitlines()],
        files=("base.json",),
    ),
    **{
        f"doctor as {name}": Case(f"doctor broken.pt --output-format {name}", read=read)
        for name, read in _READ.items()
    },
    "doctor missing file": Case("doctor none.pt", read=lines),
    "doctor code": Case("doctor networks.py", read=lines),
    "fix broken file": Case("fix broken.pt", read=wrapped, files=("broken.fixed.pt",)),
    "fix broken file unsafe": Case("fix broken.pt --unsafe-fixes", read=wrapped, files=("broken.fixed.pt",)),
    "fix half precision": Case("fix half.safetensors", read=wrapped, files=("half.fixed.safetensors",)),
    "fix by data": Case(
        "fix networks.py:net --weights broken.pt --state ema --data networks.py:clean", read=wrapped,
        files=("broken.fixed.pt",),
    ),
    "fix only shown": Case("fix broken.pt --diff", read=wrapped),
    "fix healthy file": Case("fix net.pt", read=wrapped),
    "shift bright": Case(f"shift {_BRIGHT} --output-format json", comparing.EVIDENCE),
    "shift clean calibrated": Case(
        "shift networks.py:net --data networks.py:clean --calibrate networks.py:reference --output-format json",
        comparing.EVIDENCE,
    ),
    "shift assumptions": Case(
        "shift networks.py:net --check-assumptions networks.py:clean --output-format json", comparing.EVIDENCE
    ),
    **{
        f"shift as {name}": Case(f"shift {_BRIGHT} --output-format {name}", comparing.EVIDENCE, read)
        for name, read in _READ.items()
    },
    "shift without data": Case("shift networks.py:net", read=lines),
    "why model": Case(f"{_WHY} --steps 10 --rates 0.01,0.1"),
    "why model looked at": Case(f"{_WHY} --no-train"),
    "why scale": Case("why --claim scale --seeds 2 -q -o why.json --output-format json", comparing.ANY),
    "why as text": Case(
        "why networks.py:rows --data networks.py:classes --no-train --seeds 2 -q --output-format md", read=lines,
        files=("why.html",),
    ),
    "explain": Case("explain BN101", read=wrapped),
    "rules": Case("rules --output-format json"),
}  # fmt: skip


@cache
def _inputs() -> Path:
    """A folder with the files that the cases start from, made once."""
    folder = Path(tempfile.mkdtemp(prefix="house"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(networks.__file__, folder / "networks.py")
    # what the doctor says of this installation is no matter of the inputs
    (folder / "pyproject.toml").write_text('[tool.batchnorm]\nignore = ["BN9"]\n', encoding="utf-8")
    networks.write(folder)
    return folder


# claims of the lecture that train for minutes: compared by hand, not in the tests
LONG: dict[str, Case] = {
    f"why {claim}": Case(f"why --claim {claim} --seeds 2 -q -o why.json --output-format json", comparing.ANY, condensed)
    for claim in ("hidden", "layer3", "cause", "cats", "noise", "test-time", "smooth")
}
NAMES = (*CASES, *(f"fault {name}" for name in FAULTS))


def output(name: str) -> Any:
    """What a case gives."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = (CASES | LONG).get(name)
        found = _findings(name.removeprefix("fault ")) if case is None else _of_command(case)
    return json.loads(json.dumps(found))


def _findings(fault: str) -> list[Any]:
    """What the doctor finds in a model of ``planted.py``, which has one fault."""
    with tempfile.TemporaryDirectory() as place:
        found = json.loads(examine(**FAULTS[fault](Path(place))).to_json())["findings"]
        return settled([each for each in found if not each["code"].startswith("BN9")], Path(place))


def _of_command(case: Case) -> dict[str, Any]:
    """Exit code, output, errors, files."""
    from batchnorm.cli import main

    with _folder() as folder:
        result = CliRunner().invoke(main, case.command.split(), prog_name="batchnorm", env={"COLUMNS": "100"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        found = {
            "exit": result.exit_code,
            "output": case.read(result.stdout) if result.stdout.strip() else None,
            "errors": paragraphs(result.stderr),
            "files": {file: _file(folder, file) for file in case.files},
            "new": sorted(
                path.name
                for path in folder.iterdir()
                if path.name != "__pycache__" and not (_inputs() / path.name).exists()
            ),
        }
    return settled(found, folder)


@contextmanager
def _folder() -> Iterator[Path]:
    """A copy of the inputs as the current folder; one thread, for sums in one order."""
    before, threads = Path.cwd(), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="house") as place:
        folder = Path(shutil.copytree(_inputs(), Path(place) / "here"))
        os.chdir(folder)
        torch.set_num_threads(1)
        sys.modules.pop("networks", None)  # of another case's folder
        try:
            yield folder
        finally:
            sys.modules.pop("networks", None)
            torch.set_num_threads(threads)
            os.chdir(before)


def _file(folder: Path, name: str) -> Any:
    """What a written file holds; of a state, tensors of batch norm layers in numbers, others by whether they stayed."""
    if name.endswith((".json", ".html")):
        text = (folder / name).read_text(encoding="utf-8")
        return page(text) if name.endswith(".html") else json.loads(text)
    after, before = _tensors(folder / name), _tensors(folder / name.replace(".fixed", ""))
    return {key: _written(value, before.get(key, before.get(f"module.{key}"))) for key, value in after.items()}


def _tensors(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return dict(_leaves(torch.load(path), ""))


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}" if place else key)
    else:
        yield place, value


def _written(value: Any, before: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(before, torch.Tensor) and before.dtype == value.dtype and torch.equal(before, value):
        return "unchanged"
    return {"type": str(value.dtype), "values": [settled(x) for x in value.flatten().tolist()]}


def settled(value: Any, folder: Path | None = None) -> Any:
    """A plain value without what depends on the time, the machine, the place and the version."""
    if isinstance(value, dict):
        return {key: _settled_at(key, item, folder) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [settled(item, folder) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return _settled_text(value, folder) if isinstance(value, str) else value


def _settled_at(key: str, value: Any, folder: Path | None) -> Any:
    if key in _VOLATILE:
        return f"<{key}>"
    if key in _MACHINE and isinstance(value, dict):
        return dict.fromkeys(sorted(value), "<its own>")
    if key == "where" and isinstance(value, str):  # file and line of a class, relative to the current folder
        return re.sub(r"\d+$", "<line>", Path(value).name)
    return settled(value, folder)


def _settled_text(text: str, folder: Path | None) -> str:
    if folder is not None:
        text = text.replace(str(folder), "<folder>")
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda raised: "^" + raised[0].translate(_RAISED), text)
    text = _TIME.sub('time="<time>"', text.replace(" × 10^", "e"))
    return _VERSION.sub("<version>", _SECONDS.sub(r"<time> \1", text))


def arithmetic() -> str:
    """What decides about the last bits: libraries, instruction sets, the processor's maker."""
    from importlib.metadata import version

    import batchnorm._native as native

    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "scikit-learn"))
    names = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    maker = re.search(r"vendor_id\s*:\s*(\w+)", names)
    return f"{libraries} {torch.backends.cpu.get_cpu_capability()} {native.instruction_sets()[0]} {maker and maker[1]}"
