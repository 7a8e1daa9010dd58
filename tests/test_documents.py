"""Documents that name what the source has: all public names, settings of layers, quantities of a log."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from house.surface import MODULES, public_names
from torch import nn

from batchnorm.layers import SETTINGS, BatchNorm1d
from batchnorm.record import QUANTITIES, Quantity

DOCS = Path(__file__).parents[1] / "docs"


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def in_reference() -> dict[str, list[str]]:
    """Names by module; under ``batchnorm`` those that are loaded when asked for, which Sphinx does not find."""
    found = re.findall(r"automodule:: (\S+)\n   :members: (.*)", text_of("api.md"))
    lazy = re.findall(r"autofunction:: batchnorm\.(\w+)\n", text_of("api.md"))
    return {"batchnorm": lazy, **{module: members.split(", ") for module, members in found}}


def documented(module: str) -> list[str]:
    """Public classes and functions of a module; numbers, tables and operators have no docstring of their own."""
    values = {name: getattr(import_module(module), name) for name in public_names(module)}
    return sorted(name for name, value in values.items() if inspect.isclass(value) or inspect.isfunction(value))


# the kernels' functions are for who writes kernels: CONTRIBUTING.md and their own docstrings
REFERENCE = sorted(name for name in set(MODULES) - {"batchnorm", "batchnorm.kernels"} if ".integrations." not in name)


@pytest.mark.parametrize("module", REFERENCE)
def test_the_reference_has_every_public_class_and_function(module):
    found = in_reference()
    lazy = [name for name in found["batchnorm"] if name in public_names(module)]
    assert sorted([*found.get(module, []), *lazy]) == documented(module)


def test_what_the_package_itself_exports_is_in_the_reference_under_its_module():
    named = {name for members in in_reference().values() for name in members}
    assert set(documented("batchnorm")) <= named


@pytest.mark.parametrize("module", [name for name in MODULES if ".integrations." in name])
def test_a_page_shows_how_each_adapter_is_used(module):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")))
    for name in MODULES[module]:
        assert re.search(rf"import .*\b{name}\b|\b{name}\(", pages), name


def cells(name: str, quantity: Quantity) -> tuple[str, ...]:
    return f"`{name}`", quantity.title, quantity.unit or "ratio", quantity.reads, quantity.floor


@pytest.mark.parametrize("tier", ["free", "probe", "lab"])
def test_the_page_about_watching_has_a_row_for_each_quantity_with_the_words_of_the_log(tier):
    rows = [line for line in text_of("instruments.md").splitlines() if re.match(r"\| `\w+` \|", line)]
    expected = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in cells(name, each)) + " |"
        for name, each in QUANTITIES.items()
        if each.tier == tier
    ]
    assert expected
    assert [row for row in rows if QUANTITIES[row.split("`")[1]].tier == tier] == expected


def own_settings() -> set[str]:
    """Arguments of a layer that torch.nn's does not have."""
    return set(inspect.signature(BatchNorm1d).parameters) - set(inspect.signature(nn.BatchNorm1d).parameters)


def test_the_page_about_layers_and_their_docstring_have_every_setting():
    assert set(SETTINGS) <= own_settings()
    for name in own_settings():
        assert re.search(rf"`{name}\b", text_of("layers.md")), name
        assert re.search(rf"^ +{name}: ", BatchNorm1d.__doc__, re.MULTILINE), name
