"""Cells of CSV files in Python: the header, safe places to cut a file, and the first cell that cannot be read."""

from __future__ import annotations

import csv
import io
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from copy import copy
from typing import IO, final

import numpy as np

# cells that are null; nan and inf are numbers
NULLS = ("", "#N/A", "#N/A N/A", "#NA", "N/A", "NA", "NULL", "n/a", "null")
_READ = 1 << 20
_QUOTE = ord('"')


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


def cuts(
    file: IO[bytes], places: Sequence[int], end: int, delimiter: str, is_line: Callable[[bytes], bool]
) -> list[int]:
    """For each place that of the next line; [] if the file cannot be cut safely.

    A line end between quotes is part of a cell. If there are quotes near the places, all quotes of the file are read.
    Where the last cell has no closing quote, or what follows a cut is no line of the table, there are no cuts.
    """
    heads = [_at(file, place) for place in places]
    if not any(b'"' in head for head in (_at(file, 0), *heads)):
        found = [place + head.find(b"\n") + 1 for place, head in zip(places, heads, strict=True) if b"\n" in head]
    else:
        found = _between_quotes(file, places, end, delimiter)
    found = sorted({place for place in found if place < end})
    return found if all(is_line(_at(file, place)) for place in found) else []


def _at(file: IO[bytes], place: int) -> bytes:
    file.seek(place)
    return file.read(_READ)


@final
class Quotes:
    """Whether the bytes that were read so far end in a cell between quotes.

    A quote opens such a cell only where a cell begins; in another place, as in ``5" pipe``, it is a letter.
    """

    def __init__(self, delimiter: str) -> None:
        self.is_open = False
        self._last = b"\n"  # the last byte; the first byte of a file begins a cell
        self._closed = -1  # place of the last closing quote from the next byte on
        self._before_cells = np.frombuffer(delimiter.encode()[-1:] + b"\r\n", np.uint8)

    def read(self, data: bytes) -> Quotes:
        """Read the next bytes."""
        known = np.frombuffer(self._last + data, np.uint8)
        places = np.flatnonzero(known[1:] == _QUOTE)
        begins = np.isin(known[places], self._before_cells)
        opening = places[int(self.is_open) :: 2]
        if (begins[int(self.is_open) :: 2] | (known[opening] == _QUOTE)).all() and self._is_plain(opening):
            self.is_open ^= bool(len(places) % 2)
            self._closed = int(places[-1]) if len(places) and not self.is_open else self._closed
        else:
            self._read_each(places.tolist(), begins.tolist())
        self._closed -= len(data)
        self._last = (self._last + data)[-1:]
        return self

    def _is_plain(self, opening: np.ndarray) -> bool:
        """Whether a quote at the very beginning, after another one, follows one that closed a cell."""
        return not (len(opening) and opening[0] == 0 and self._last == b'"') or self._closed == -1

    def _read_each(self, places: Sequence[int], begins: Sequence[bool]) -> None:
        for place, is_first in zip(places, begins, strict=True):
            if self.is_open:
                self.is_open, self._closed = False, place
            else:
                self.is_open = is_first or place == self._closed + 1


def _between_quotes(file: IO[bytes], places: Sequence[int], end: int, delimiter: str) -> list[int]:
    waiting, found = list(places), []
    place = len(BOM_UTF8) if _at(file, 0).startswith(BOM_UTF8) else 0
    quotes = Quotes(delimiter)
    file.seek(place)
    while place < end and (data := file.read(_READ)):
        while waiting and waiting[0] < place + len(data):
            cut = _line_end(data, max(0, waiting[0] - place), copy(quotes))
            if cut is None:
                break
            found.append(place + cut)
            waiting = [each for each in waiting if each >= place + cut]
        quotes.read(data)
        place += len(data)
    return [] if quotes.is_open else found


def _line_end(data: bytes, start: int, quotes: Quotes) -> int | None:
    """Place after the first line end at ``start`` or later that is not between quotes."""
    quotes.read(data[:start])
    counted = place = start
    while (place := data.find(b"\n", place)) >= 0:
        place += 1
        if not quotes.read(data[counted:place]).is_open:
            return place
        counted = place
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
