"""``python -m house.record``: what differs from what is recorded; with an option, the record is written anew.

``--words`` accepts a record in which nothing but wording differs, as commits about words need it; ``--all`` accepts
everything, and prints it, for the message of the commit.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import click

from house.comparing import ANY, FLOAT32, Difference, Tolerance, differences
from house.outputs import CASES, outputs
from house.surface import surface

_HERE = Path(__file__).parent
_EXACT = Tolerance(0.0, 0.0)


def recorded(name: str) -> Any:
    """ "surface" or "outputs", as it was recorded."""
    path = _HERE / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"arithmetic": "", "cases": {}}


def write(name: str, value: Any) -> None:
    """Record it anew."""
    text = json.dumps(value, indent=0, ensure_ascii=False, allow_nan=False)
    (_HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def of_case(name: str, before: Any, now: Any, *, same: bool) -> list[Difference]:
    """Differences of a case. Numbers that no other arithmetic gives are compared only where it is the ``same``."""
    tolerance = CASES[name].tolerance if name in CASES else FLOAT32
    if tolerance is not ANY:
        return list(differences(before, now, tolerance, name))
    return [d for d in differences(before, now, FLOAT32, name) if same or d.kind != "number"]


def _of_surface() -> tuple[Any, list[Difference]]:
    now = surface()
    return now, list(differences(recorded("surface"), now))


def _of_outputs() -> tuple[Any, list[Difference]]:
    now, before = outputs(), recorded("outputs")
    same = before["arithmetic"] == now["arithmetic"]
    gone = [
        Difference(name, "shape", *there)
        for name in before["cases"].keys() ^ now["cases"].keys()
        for there in [(name in before["cases"], name in now["cases"])]
    ]
    common = [name for name in now["cases"] if name in before["cases"]]
    cases = [of_case(name, before["cases"][name], now["cases"][name], same=same) for name in common]
    return now, [*gone, *chain(*cases)]


@click.command()
@click.option("--words", is_flag=True, help="Write the record if nothing but wording differs.")
@click.option("--all", "everything", is_flag=True, help="Write the record whatever differs.")
def main(words: bool, everything: bool) -> None:
    """Show what differs from the record of the surface and of outputs."""
    left = 0
    for name, (now, found) in (("surface", _of_surface()), ("outputs", _of_outputs())):
        for difference in found:
            click.echo(difference)
        kinds = Counter(d.kind for d in found)
        bits = sum(d.kind == "number" for d in differences(recorded(name), now, _EXACT))
        click.echo(f"{name}: {dict(kinds) or 'nothing differs'}; numbers with other bits: {bits}")
        if everything or (words and set(kinds) <= {"words"}):
            write(name, now)
        else:
            left += len(found)
    raise SystemExit(1 if left else 0)


if __name__ == "__main__":
    main()
