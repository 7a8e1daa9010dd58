"""What users see, read and have written stays as it is recorded in ``house/``, however the source is arranged."""

from __future__ import annotations

import pytest
from house import files, outputs, record, surface
from house.comparing import differences


def told(found):
    return "\n".join(map(str, found))


@pytest.mark.parametrize("part", surface.PARTS)
def test_the_surface_is_as_recorded(part):
    found = list(differences(record.recorded("surface")[part], surface.PARTS[part](), place=part))
    assert not found, told(found)


@pytest.fixture(scope="module")
def before():
    return record.recorded("outputs")


@pytest.mark.parametrize("case", outputs.NAMES)
def test_an_output_is_as_recorded(case, before):
    same = before["arithmetic"] == outputs.arithmetic()
    found = record.of_case(case, before["cases"][case], outputs.output(case), same=same)
    assert not found, told(found)


@pytest.mark.parametrize("name", files.KINDS)
def test_a_file_of_before_is_read_as_it_was_written(name):
    found = list(differences(files.expected()[name], files.read(name), files.KINDS[name].tolerance, name))
    assert not found, told(found)
