"""Schemas: which columns each file has, and whether all files agree in those that are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from batchnorm.datasets.blocks import Selection

Shape = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Feature:
    """A column of a file.

    Args:
        kind: "number"; "null" if it has no value in this file; "other" for text, times and all else.
        shape: Shape of its features; () for a column of numbers, None if the file does not say it.
        type: Its type in the words of the format, for errors.
        groups: Whether its values can be the names of groups.
    """

    kind: Literal["number", "null", "other"]
    shape: Shape | None
    type: str
    groups: bool = True


@final
@dataclass(frozen=True, slots=True)
class FileSchema:
    """The columns of a file, in its order, and the columns that its path names, which can only be groups."""

    file: str
    features: Mapping[str, Feature]
    partitions: Iterable[str] = ()


def measured(schemas: Sequence[FileSchema], selection: Selection) -> dict[str, Shape]:
    """The columns that are measured, with the shape of each, in the order of the selection or of the first file.

    Raises:
        ValueError: If a file lacks a column that is measured or that names the groups; if the shapes of a column
            differ between files; or if there is no column of numbers.
        TypeError: If a measured column has no numbers, in one file or in all.
    """
    _check_groups(schemas, selection.by)
    names = selection.columns or _numbers(schemas, selection.by)
    for name in names:
        _check_present(schemas, name, "Name" if selection.columns else "The files differ in their columns: name")
        _check_type(schemas, name)
    if not names:
        raise ValueError(
            f"expected a column of numbers, got {schemas[0].file} with {_listed(schemas[0])}. Statistics need numbers."
        )
    return {name: _shape(schemas, name) for name in names}


def resolved(features: Mapping[str, Feature], shapes: Mapping[str, Shape]) -> dict[str, Feature]:
    """Features whose file alone does not say what they are, as all files together say it."""
    known = {name: replace(features[name], kind="number", shape=shape) for name, shape in shapes.items()}
    unknown = {name: replace(f, kind="null", shape=()) for name, f in features.items() if f.shape is None}
    return {**features, **unknown, **known}


def unsaid(features: Mapping[str, Feature], shapes: Mapping[str, Shape]) -> tuple[tuple[str, Shape], ...]:
    """The columns of ``shapes`` that a file alone does not say: lists of unknown lengths, columns of nulls."""
    return tuple((n, s) for n, s in shapes.items() if features[n].kind != "number" or features[n].shape != s)


def names_of(selection: Selection, features: Mapping[str, Feature]) -> list[str]:
    """The columns of one file that are measured."""
    if selection.columns:
        return list(selection.columns)
    return [name for name, each in features.items() if each.kind == "number" and name != selection.by]


def _numbers(schemas: Sequence[FileSchema], by: str) -> list[str]:
    """Columns that have numbers in a file, without the column of groups, in the order of their first appearance.

    If there are none: the columns without any value.
    """
    kinds: dict[str, set[str]] = {}
    for each in schemas:
        for name, feature in each.features.items():
            kinds.setdefault(name, set()).add(feature.kind)
    numbers = [name for name, found in kinds.items() if "number" in found and name != by]
    return numbers or [name for name, found in kinds.items() if found == {"null"} and name != by]


def _check_present(schemas: Sequence[FileSchema], name: str, remedy: str) -> None:
    for each in schemas:
        if name not in each.features:
            raise ValueError(
                f"expected a column {name!r} in every file, got {each.file} with {_listed(each)}. "
                f"{remedy} columns that every file has."
            )


def _check_type(schemas: Sequence[FileSchema], name: str) -> None:
    kinds = {each.features[name].kind: each for each in reversed(schemas)}
    if "other" in kinds:
        other = kinds["other"]
        text = f"got {other.features[name].type} in {other.file}"
        number = kinds.get("number")
        text += f" and {number.features[name].type} in {number.file}" if number else ""
        raise TypeError(f"expected numbers in column {name!r}, {text}. Name columns of numbers, or convert it.")


def _shape(schemas: Sequence[FileSchema], name: str) -> Shape:
    first: FileSchema | None = None
    for each in schemas:
        shape = each.features[name].shape
        if shape is None or each.features[name].kind == "null":
            continue
        if first is not None and first.features[name].shape != shape:
            raise ValueError(
                f"expected the same shape of column {name!r} in all files, got {_size(first, name)} in {first.file} "
                f"and {_size(each, name)} in {each.file}. Leave out the files that differ."
            )
        first = first or each
    return (first.features[name].shape if first else None) or ()


def _size(schema: FileSchema, name: str) -> str:
    shape = schema.features[name].shape
    return (
        f"vectors of {shape[0]} numbers"
        if shape and len(shape) == 1
        else f"shape {shape}"
        if shape
        else "single numbers"
    )


def _check_groups(schemas: Sequence[FileSchema], by: str) -> None:
    for each in schemas if by else ():
        feature = each.features.get(by)
        if by in each.partitions:
            continue
        if feature is None:
            known = [name for name, f in each.features.items() if f.groups] + list(each.partitions)
            raise ValueError(
                f"expected a column {by!r} with the groups in every file, got {each.file}, which has "
                f"{_some(known) if known else 'no such columns'}. Name one of them."
            )
        if not feature.groups:
            raise TypeError(
                f"expected text, whole numbers, booleans or dates as groups, got column {by!r} of type {feature.type} "
                f"in {each.file}. Group by another column."
            )


def _listed(schema: FileSchema) -> str:
    return "the columns " + _some(list(schema.features)) if schema.features else "no columns"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
