"""Cells of CSV files in Python: the header, safe places to cut a file, and the first cell that cannot be read."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import IO

# cells that are null; nan and inf are numbers
NULLS = ("", "#N/A", "#N/A N/A", "#NA", "N/A", "NA", "NULL", "n/a", "null")
_READ = 1 << 20


def header_end(beginning: bytes, start: int) -> int:
    """Place after the first line that is not empty; a line end between quotes does not end a line."""
    place, quotes = start, 0
    for line in beginning[start:].splitlines(keepends=True):  # of bytes: at \\n, \\r and \\r\\n only
        place += len(line)
        quotes += line.count(b'"')
        if line.strip() and quotes % 2 == 0:
            return place
    return len(beginning)


def cells(line: bytes, delimiter: str) -> list[str]:
    """The cells of a line.

    Raises:
        UnicodeDecodeError: If the line is not UTF-8.
    """
    return next(csv.reader(io.StringIO(line.decode(), newline=""), delimiter=delimiter), [])


def cuts(file: IO[bytes], places: Sequence[int], end: int, is_line: Callable[[bytes], bool]) -> list[int]:
    """For each place that of the next line; [] if the file cannot be cut safely.

    A line end between quotes is part of a cell. If there are quotes near the places, all quotes of the file are
    counted: after an even number of them a line end ends a line. Where the quotes are no pairs, or what follows a cut
    is no line of the table, there are no cuts.
    """
    heads = [_at(file, place) for place in places]
    if not any(b'"' in head for head in (_at(file, 0), *heads)):
        found = [place + head.find(b"\n") + 1 for place, head in zip(places, heads, strict=True) if b"\n" in head]
    else:
        found = _between_quotes(file, places, end)
    found = sorted({place for place in found if place < end})
    return found if all(is_line(_at(file, place)) for place in found) else []


def _at(file: IO[bytes], place: int) -> bytes:
    file.seek(place)
    return file.read(_READ)


def _between_quotes(file: IO[bytes], places: Sequence[int], end: int) -> list[int]:
    waiting, found = list(places), []
    place = quotes = 0
    file.seek(0)
    while place < end and (data := file.read(_READ)):
        while waiting and waiting[0] < place + len(data):
            cut = _line_end(data, max(0, waiting[0] - place), quotes)
            if cut is None:
                break
            found.append(place + cut)
            waiting = [each for each in waiting if each >= place + cut]
        quotes += data.count(b'"')
        place += len(data)
    return [] if quotes % 2 else found


def _line_end(data: bytes, start: int, quotes: int) -> int | None:
    """Place after the first line end at ``start`` or later that follows an even number of quotes."""
    counted, place = 0, start
    quotes += data[:start].count(b'"')
    while (place := data.find(b"\n", place)) >= 0:
        place += 1
        quotes += data[start + counted : place].count(b'"')
        counted = place - start
        if quotes % 2 == 0:
            return place
    return None


def fault(
    lines: IO[bytes] | io.RawIOBase, first_line: int, names: Sequence[str], numbers: Sequence[str], delimiter: str
) -> str:
    """What is wrong with the first faulty line, as "<expected>, got <cell>. <remedy>"; "" if no fault is found."""
    text = io.TextIOWrapper(
        io.BufferedReader(lines) if isinstance(lines, io.RawIOBase) else lines,
        "utf-8",
        errors="surrogateescape",
        newline="",
    )
    reader = csv.reader(text, delimiter=delimiter)
    chosen = [(name, list(names).index(name)) for name in numbers]
    while True:
        line = first_line + reader.line_num
        try:
            row = next(reader, None)
        except csv.Error as error:
            return f"expected a table, got line {line} ({error}). Mend this line."
        if row is None:
            return ""
        if row and (what := _fault(row, line, names, chosen)):
            return what


def _fault(row: list[str], line: int, names: Sequence[str], numbers: Sequence[tuple[str, int]]) -> str:
    if len(row) != len(names):
        return f"expected {len(names)} cells, as the header has, got {len(row)} in line {line}. Mend this line."
    if any("\udc80" <= letter <= "\udcff" for cell in row for letter in cell):
        return f"expected UTF-8, got another encoding in line {line}. Convert it: iconv -f latin1 -t utf-8 OLD > NEW."
    for name, place in numbers:
        if not is_number(row[place]):
            where = f"{row[place][:40]!r} in line {line}"
            return f"expected a number in column {name!r}, got {where}. Mend it, or leave it empty for null."
    return ""


def is_number(cell: str) -> bool:
    """Whether a cell is a number, true, false or null."""
    text = cell.strip()
    if cell in NULLS or text.lower() in {"true", "false"}:
        return True
    try:
        float(text.replace("_", "x"))  # Python reads 1_000, but it is no number in a file
    except ValueError:
        return False
    return True
