"""CSV files: cuts at the ends of lines, types, nulls, and lines that are refused with their number."""

from __future__ import annotations

import bz2
import csv
import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sources import blocks, groups, read

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.sources import Options, pieces
from batchnorm.datasets.sources.csv_cells import Quotes

pa = pytest.importorskip("pyarrow")


def write(where: Path, text: str | bytes, name: str = "t.csv") -> Path:
    (where / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return where / name


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    texts=st.lists(st.text(alphabet='ab"\n, ;é', max_size=8), min_size=1, max_size=30),
    size=st.integers(1, 120),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_pieces_of_csv_neither_lose_nor_double_rows(tmp_path: Path, texts: list[str], size: int, end: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=end)
    writer.writerows([["x", "text", "y"], *([i, each, i / 2] for i, each in enumerate(texts))])
    path = write(tmp_path, text.getvalue())
    found = pieces(path, options=Options(piece_bytes=size))
    assert read(found)["x"].tolist() == list(range(len(texts)))
    assert read(found)["y"].tolist() == [i / 2 for i in range(len(texts))]
    assert sum(piece.size for piece in found) == path.stat().st_size - len(f"x,text,y{end}")


def test_a_file_is_cut_into_pieces_of_the_size(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + "".join(f"{i:04},{i:04}\n" for i in range(1000)))
    found = pieces(path, options=Options(piece_bytes=1000))
    assert [piece.size for piece in found] == [1010, *[1000] * 8, 990]
    quoted = write(tmp_path, "a,b\n" + "".join(f'{i:04},"{i}\n"\n' for i in range(1000)), "quoted.csv")
    found = pieces(quoted, options=Options(piece_bytes=1000))
    assert 9 <= len(found) <= 14
    assert read(found)["a"].tolist() == list(range(1000))


def test_quotes_in_the_middle_of_a_cell_are_letters_where_the_file_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + '1,5" pipe\n2,"6\n3,4"\n' * 33)
    for size in (1, 5, 10, 50):
        found = pieces(path, options=Options(piece_bytes=size))
        assert len(found) > 3
        assert read(found)["a"].tolist() == [1, 2] * 33


def test_a_quote_that_no_sample_has_in_the_middle_of_a_cell_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.csv_cells._READ", 16)
    lines = ["1,a\n"] * 100
    lines[40] = '1,5" pipe\n'
    path = write(tmp_path, "a,b\n" + "".join(lines))
    found = pieces(path, options=Options(piece_bytes=len("a,b\n") + 4 * 50))
    assert len(found) == 2
    assert read(found)["a"].tolist() == [1] * 100


def test_a_last_cell_without_a_closing_quote_leaves_one_piece(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n" + "1,c\n" * 33 + '1,"c\n')
    assert len(pieces(path, options=Options(piece_bytes=50))) == 1


def _is_open(text: str) -> bool:
    """Whether a text ends between quotes, letter by letter."""
    state = "first"
    for letter in text:
        if letter == '"':
            state = {"first": "open", "open": "closed", "closed": "open"}.get(state, state)
        elif state != "open":
            state = "first" if letter in ",\r\n" else "letters"
    return state == "open"


def test_quotes_of_any_text_in_blocks_of_any_size() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choice('"",\na5') for _ in range(chance.randint(0, 14)))
        quotes, size = Quotes(","), chance.randint(1, 6)
        for start in range(0, len(text), size):
            quotes.read(text[start : start + size].encode())
        assert quotes.is_open == _is_open(text), text


def test_quotes_that_no_sample_has_are_seen_when_the_piece_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.csv_cells._READ", 16)
    lines = ["1,a\n"] * 100
    lines[40] = '1,"' + "\n2,b" * 30 + '"\n'
    path = write(tmp_path, "a,b\n" + "".join(lines))
    found = pieces(path, options=Options(piece_bytes=len("a,b\n") + 4 * 50))
    with pytest.raises(ValueError, match=r"t.csv.* expected quotes in pairs between two cuts.* piece_bytes="):
        read(found)
    assert read(pieces(path))["a"].tolist() == [1] * 100


def test_whole_numbers_may_have_fractions_later(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n" + "1\n" * 50000 + "2.5\n1e3\n")
    assert read(pieces(path))["a"][-2:].tolist() == [2.5, 1000]


def test_what_is_null_and_what_is_a_number(tmp_path: Path) -> None:
    cells = ["", "NA", "null", "nan", "NaN", "inf", "-Infinity", "+1", " 2 ", '"3"', "1e400", "9007199254740993"]
    path = write(tmp_path, "a,b\n" + "".join(f"{cell},1\n" for cell in cells))
    want = [-999, -999, -999, np.nan, np.nan, np.inf, -np.inf, 1, 2, 3, np.inf, 9007199254740992]
    np.testing.assert_array_equal(read(pieces(path))["a"], want)


def test_a_column_of_one_has_nulls_in_empty_lines(tmp_path: Path) -> None:
    assert read(pieces(write(tmp_path, "a\n1\n\n3\n")))["a"].tolist() == [1, -999, 3]
    assert read(pieces(write(tmp_path, "a,b\n1,2\n\n3,4\n")))["a"].tolist() == [1, 3]


def test_a_header_without_lines_has_no_rows(tmp_path: Path) -> None:
    for text in ("a,b\n", "a,b"):
        (block,) = blocks(pieces(write(tmp_path, text)))
        assert (block.rows, list(block.columns)) == (0, ["a", "b"])
    write(tmp_path, "a,b\n1,x\n", "u.csv")
    assert read(pieces(tmp_path))["a"].tolist() == [1]


def test_a_column_without_values_in_one_file_is_null_there(tmp_path: Path) -> None:
    write(tmp_path, "a,b\n1,\n", "a.csv")
    write(tmp_path, "a,b\n2,3\n", "b.csv")
    assert read(pieces(tmp_path))["b"].tolist() == [-999, 3]


def test_delimiter_and_header_are_options(tmp_path: Path) -> None:
    path = write(tmp_path, "1;2\n3;4\n")
    found = pieces(path, options=Options(delimiter=";", header=False, piece_bytes=3))
    assert {name: each.tolist() for name, each in read(found).items()} == {"f0": [1, 3], "f1": [2, 4]}
    with pytest.raises(
        ValueError, match=r"expected names of columns .* got the numbers 1;?.*header=False, --no-header"
    ):
        pieces(path, options=Options(delimiter=";"))
    with pytest.raises(ValueError, match="expected a single character as delimiter, got 'ab'"):
        pieces(path, options=Options(delimiter="ab"))


def test_compressed_files_are_one_piece(tmp_path: Path) -> None:
    text = b"a,b\n" + b"1,2\n" * 1000
    for name, data in (
        ("t.csv.bz2", bz2.compress(text[:2000]) + bz2.compress(text[2000:])),
        ("t.csv.zst", bytes(pa.compress(text, codec="zstd", asbytes=True))),
    ):
        found = pieces(write(tmp_path, data, name), options=Options(piece_bytes=10))
        assert len(found) == 1
        assert read(found)["b"].tolist() == [2] * 1000
    with pytest.raises(ValueError, match=r"expected a CSV file, got .*t.csv.bz2, which is damaged"):
        read(pieces(write(tmp_path, bz2.compress(text + b"1,2\n" * 900000)[:-20], "t.csv.bz2")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,a\n1,2\n", "got 'a' twice. Rename one of them"),
        ("a,b\n1,2\n3\n", r"t.csv: expected 2 cells, as the header has, got 1 in line 3"),
        ("a,b\n1,2\n3,4,5\n", r"expected 2 cells, as the header has, got 3 in line 3"),
        ("\n\n\n", "with empty lines only"),
        ("a,b\n1,2\n".encode("utf-16"), "with NUL bytes: a binary file, or text in UTF-16"),
        (b"a,b\n1,2\n\0\0,3\n", "with NUL bytes"),
        ("é,b\n1,2\n".encode("latin-1"), r"another encoding in its first line.* iconv"),
        ("a,b\nx,y\n", r"expected a column of numbers, got .*t.csv with the columns a, b"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path: Path, text, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pieces(write(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"x,2,c\n", "expected a number in column 'a', got 'x' in line 30002. Mend it, or leave it empty for null"),
        (b"1_0,2,c\n", "expected a number in column 'a', got '1_0' in line 30002"),
        (b"1\0,2,c\n", r"NUL|expected a number in column 'a', got '1.x00' in line 30002"),
        (b"1,2\n", "expected 3 cells, as the header has, got 2 in line 30002. Mend this line"),
        ("1,2,é\n".encode("latin-1"), "expected UTF-8, got another encoding in line 30002"),
    ],
)
@pytest.mark.parametrize("size", [1 << 26, 50000])
def test_a_faulty_line_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, words: str, size: int
) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.csv_files._SAMPLE", 64)
    path = write(tmp_path, b"a,b,c\n" + b"1,2,z\n" * 30000 + line + b"1,2,z\n" * 30000)
    selection = Selection(by="c")
    with pytest.raises(ValueError, match=words) as error:
        read(pieces(path, selection, Options(piece_bytes=size)), selection)
    assert str(path) in str(error.value)


def test_text_in_another_encoding_does_not_matter_where_it_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n1,é\n".encode("latin-1"))
    assert read(pieces(path))["a"].tolist() == [1]


def test_a_column_of_text_that_is_named_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected numbers in column 'b', got text such as 'x' in .*t.csv"):
        pieces(write(tmp_path, "a,b\n1,x\n"), Selection(columns=("b",)))


def test_a_column_of_numbers_with_some_text_is_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n1,2\n?,3\ntrue,4\n")
    assert list(read(pieces(path))) == ["b"]
    with pytest.raises(
        TypeError, match=r"numbers in column 'a', got text such as '\?' in .*t.csv. Name columns of numbers"
    ):
        pieces(path, Selection(columns=("a",)))
    mixed = write(tmp_path, "a,b\n2,2\ntrue,3\n")
    with pytest.raises(TypeError, match="numbers in column 'a', got text such as '2'"):
        pieces(mixed, Selection(columns=("a",)))


def test_another_delimiter_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"with ',' between them, got 'a;b' .*t.csv. Say .* delimiter=';' \(--delimiter\)"
    ):
        pieces(write(tmp_path, "a;b\n1;2\n"))


def test_a_column_is_measured_and_has_the_groups(tmp_path: Path) -> None:
    selection = Selection(columns=("i", "x"), by="i")
    found = pieces(write(tmp_path, "i,x\n1,2\n,3\n"), selection)
    assert {name: each.tolist() for name, each in read(found, selection).items()} == {"i": [1, -999], "x": [2, 3]}
    assert groups(found, selection) == ["1", "(null)"]


def test_groups_of_csv_have_nulls_in_a_group_of_their_own(tmp_path: Path) -> None:
    selection = Selection(by="g")
    path = write(tmp_path, "a,g\n1,007\n2,\n3,b\n")
    assert groups(pieces(path, selection), selection) == ["007", "(null)", "b"]
