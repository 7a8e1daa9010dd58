"""Every cell of the conformance table: a tick is checked, and an exception is seen to fail."""

from __future__ import annotations

import re
from pathlib import Path

import conformance
import pytest
from conformance import EXCEPTIONS, OPTIONS, PROPERTIES
from test_layers_tools import OTHERS_WARNINGS

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}") for warning in (*OTHERS_WARNINGS, "Complex modules:UserWarning")
]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("property_", PROPERTIES)
def test_a_cell_of_the_table(property_, option):
    check = PROPERTIES[property_]
    if (property_, option) not in EXCEPTIONS:
        check(OPTIONS[option])
        return
    exempt = EXCEPTIONS[property_, option]
    with pytest.raises(exempt.error, match=exempt.match):
        check(OPTIONS[option])


def test_the_page_has_the_table():
    """After a change: `python -m conformance` in the folder tests."""
    assert conformance.PAGE.read_text() == conformance.page()


def test_an_exception_names_a_cell():
    assert set(EXCEPTIONS) <= {(name, option) for name in PROPERTIES for option in OPTIONS}


@pytest.mark.parametrize("row", conformance.capabilities(), ids=lambda row: row["name"])
def test_a_capability_is_shown_by_tests_that_exist(row):
    assert row["tests"] or row["ours"].startswith("no")
    for name in row["tests"]:
        file, function = name.split("::")
        assert re.search(rf"^def {function}\(", (Path(__file__).parent / f"{file}.py").read_text(), re.MULTILINE), name
