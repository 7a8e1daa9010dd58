"""What users see, read and have written stays as it is recorded in ``house/``, however the source is arranged."""

from __future__ import annotations

import ast
import importlib
from importlib.util import find_spec

import pytest
from house import bugs, criteria, files, outputs, record, sizes, surface
from house.comparing import differences


def told(found):
    return "\n".join(map(str, found))


@pytest.mark.parametrize("part", surface.PARTS)
def test_the_surface_is_as_recorded(part):
    if part == "names":
        pytest.importorskip("lightning")  # adapters name what they adapt
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


@pytest.mark.parametrize("bug", bugs.bugs(), ids=lambda bug: bug.breaks)
def test_a_bug_can_be_planted(bug):
    assert bug.place(surface.ROOT / "src").suffix == ".py"
    assert bug.instead != bug.text


@pytest.mark.parametrize("room", ["lecture", "ablation"])
def test_criteria_that_change_raise_their_version(room):
    version, digest = criteria.version_and_digest(room)
    known = criteria.DIGESTS[room]
    assert known.get(version) == digest, (
        f"criteria.toml of {room} is not its version {version} any more. Raise the version, and record it: {digest}"
    )
    assert list(known) == [str(number + 1) for number in range(len(known))]
    assert version == list(known)[-1]


@pytest.mark.slow
def test_no_modules_need_each_other_not_even_for_types():
    source = surface.ROOT / "src"
    every = [sizes.File(path, source) for path in sorted(source.rglob("*.py"))]
    found = sizes.circles(every, types=True)
    assert found == []


BEFORE = {"code": "BN101", "count": 3, "rows": [1.0, 200.0], "words": "a mean of 0.123 in 4 channels", "none": None}


@pytest.mark.parametrize(
    ("now", "kinds"),
    [
        ({}, []),
        ({"rows": [1.0 + 2**-9, 200.0]}, []),  # half of the digits of the largest in the list
        ({"rows": [1.0 + 2**-3, 200.0]}, ["number"]),
        ({"rows": [1.0]}, ["shape"]),
        ({"rows": [200.0, 1.0]}, ["number", "number"]),
        ({"code": "BN102"}, ["shape"]),
        ({"count": 4}, ["shape"]),
        ({"none": 0}, ["shape"]),
        ({"more": 1}, ["shape"]),
        ({"words": "a mean of 0.124 in 4 channels"}, []),  # its last digit was rounded
        ({"words": "a mean of 0.126 in 4 channels"}, ["number"]),
        ({"words": "a mean of 0.123 in 5 channels"}, ["number"]),
        ({"words": "the mean is 0.123 in 4 channels"}, ["words"]),
    ],
)
def test_a_difference_is_one_of_shape_number_or_words(now, kinds):
    assert [each.kind for each in differences(BEFORE, BEFORE | now)] == kinds


def test_a_value_that_is_gone_differs():
    assert [each.place for each in differences(BEFORE, {**BEFORE, "inner": {}} | {"inner": {}})] == ["/inner"]
    assert [each.place for each in differences({"a": {"b": 1}}, {"a": {}})] == ["/a/b"]


def names_taken_from_the_package() -> list[tuple[str, str, str]]:
    """File, module and name of each import in the programs beside the package, which the suite does not run."""
    paths = [
        path for folder in ("benchmarks", "acceptance", "scripts") for path in (surface.ROOT / folder).rglob("*.py")
    ]
    nodes = [(path, node) for path in sorted(paths) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [
        (path.name, node.module, alias.name)
        for path, node in nodes
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("batchnorm")
        for alias in node.names
    ]


def test_benchmarks_and_scripts_import_names_that_exist():
    for file, module, name in names_taken_from_the_package():
        found = hasattr(importlib.import_module(module), name) or find_spec(f"{module}.{name}") is not None
        assert found, f"{file} imports {name} from {module}"
