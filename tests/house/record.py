"""``python -m house.record``: what differs from what is recorded; with an option, the record is written anew.

``--words`` accepts a record in which nothing but wording differs, as commits about words need it; ``--all`` accepts
everything, and prints it, for the message of the commit.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from house.comparing import ANY, FLOAT32, Difference, Tolerance, differences
from house.outputs import CASES, LONG, NAMES, arithmetic, output
from house.surface import surface

_HERE = Path(__file__).parent
_EXACT = Tolerance(0.0, 0.0)

# name, as recorded, as it is now, what differs by more than the tolerance
Compared = tuple[str, Any, Any, list[Difference]]


def recorded(name: str) -> Any:
    """The surface or the outputs, as they were recorded."""
    path = _HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"arithmetic": "", "cases": {}}


def write(name: str, value: Any) -> None:
    """Record it anew."""
    text = json.dumps(value, indent=0, ensure_ascii=False, allow_nan=False)
    (_HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def of_case(name: str, before: Any, now: Any, *, same: bool) -> list[Difference]:
    """Differences of a case. Numbers that no other arithmetic gives are compared only where it is the ``same``."""
    case = (CASES | LONG).get(name)
    tolerance = FLOAT32 if case is None else case.tolerance
    if tolerance is not ANY:
        return list(differences(before, now, tolerance, name))
    return [d for d in differences(before, now, FLOAT32, name) if same or d.kind != "number"]


def _of_surface() -> Compared:
    before, now = recorded("surface"), surface()
    return "surface", before, now, list(differences(before, now))


def _of_outputs(*, long: bool) -> Compared:
    """All cases, of the long ones what is recorded unless they are asked for."""
    before = recorded("outputs")
    same = before["arithmetic"] == arithmetic()
    kept = before["cases"] if same and not long else {}
    cases = {name: output(name) for name in NAMES}
    cases |= {name: kept[name] if name in kept else output(name) for name in LONG}
    now = {"arithmetic": arithmetic(), "cases": cases}
    names = [name for name in before["cases"] if name in cases]
    found = [d for name in names for d in of_case(name, before["cases"][name], cases[name], same=same)]
    found += [
        Difference(name, "shape", name in before["cases"], name in cases)
        for name in before["cases"].keys() ^ cases.keys()
    ]
    return "outputs", before, now, found


@click.command()
@click.option("--words", is_flag=True, help="Write the record if nothing but wording differs.")
@click.option("--all", "everything", is_flag=True, help="Write the record whatever differs.")
@click.option("--long", is_flag=True, help="Also run every claim of the lecture; it takes two minutes more.")
def main(words: bool, everything: bool, long: bool) -> None:
    """Show what differs from the record of the surface and of outputs."""
    left = 0
    for name, before, now, found in (_of_surface(), _of_outputs(long=long)):
        for difference in found:
            click.echo(difference)
        kinds = Counter(d.kind for d in found)
        bits = sum(d.kind == "number" for d in differences(before, now, _EXACT))
        click.echo(f"{name}: {dict(kinds) or 'nothing differs'}; numbers with other bits: {bits}")
        if everything or (words and set(kinds) <= {"words"}):
            write(name, now)
        else:
            left += len(found)
    raise SystemExit(1 if left else 0)


if __name__ == "__main__":
    main()
