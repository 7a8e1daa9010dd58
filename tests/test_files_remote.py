"""Files at local paths, patterns and addresses of fsspec."""

from __future__ import annotations

import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from batchnorm.files.remote import is_remote, listed, opened

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    for name in ("a[1].csv", ".hidden", "below/b.csv", "below/.part"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    for name in ("/looks/a/record.jsonl", "/looks/b/record.jsonl", "/looks/b/.part"):
        system.pipe(name, name.encode())
    yield "memory://looks"
    system.rm("/looks", recursive=True)


@pytest.mark.parametrize(
    ("pattern", "files"),
    [
        ("", ["a[1].csv", "below/b.csv"]),
        ("a[1].csv", ["a[1].csv"]),
        ("*.csv", ["a[1].csv"]),
        ("*", ["a[1].csv", "below/b.csv"]),
        ("**/*.csv", ["a[1].csv", "below/b.csv"]),
    ],
)
def test_local_files_are_listed_by_path_folder_and_pattern(folder: Path, pattern: str, files: list[str]) -> None:
    assert listed(str(folder / pattern)) == [str(folder / name) for name in files]
    with opened(listed(folder / pattern)[0]) as file:
        assert file.read() == b"a[1].csv"


def test_addresses_are_listed_by_file_folder_and_pattern(memory: str) -> None:
    both = ["memory:///looks/a/record.jsonl", "memory:///looks/b/record.jsonl"]
    for address in (memory, f"{memory}/", f"{memory}/*", f"{memory}/*/record.jsonl"):
        assert listed(address) == both
    assert listed(f"{memory}/a/record.jsonl") == both[:1]
    file = opened(both[1])
    assert file.seek(7) == 7
    assert file.read() == b"b/record.jsonl"


def test_members_of_an_archive_stay_open_without_the_file_system(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("k.csv", "1")
        archive.writestr("q/l.csv", "2")
    found = listed(f"zip://**/*.csv::{tmp_path}/z.zip")
    assert found == [f"zip://{name}::{tmp_path}/z.zip" for name in ("k.csv", "q/l.csv")]
    assert [opened(each).read() for each in found] == [b"1", b"2"]


def test_a_cache_before_an_address_stays_before_its_files(memory: str) -> None:
    found = listed(f"simplecache::{memory}/a/*")
    assert found == ["simplecache::memory:///looks/a/record.jsonl"]
    with opened(found[0]) as file:
        assert file.read() == b"/looks/a/record.jsonl"


@pytest.mark.parametrize("address", ["none", "no*ne", "memory://none", "memory://none/*"])
def test_nothing_there_is_an_error_with_the_address(address: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a file.* got .*none|expected a file.* got no\*ne"):
        listed(address)
    with pytest.raises(FileNotFoundError, match=r"none|no\*ne"):
        opened(address)


def test_an_unknown_protocol_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"such as s3://.* got foo://a: Protocol not known: foo"):
        listed("foo://a")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs fsspec.*pip install 'batchnorm\[data\]'"):
        listed("memory://a")


def test_a_missing_package_of_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"class": "no_such_package.System", "err": "Install no_such_package to read nosuch"}
    monkeypatch.setitem(import_module("fsspec.registry").known_implementations, "nosuch", needs)
    with pytest.raises(ModuleNotFoundError, match=r"needs another package: Install no_such_package"):
        opened("nosuch://a")


def test_an_unreachable_server_is_not_a_missing_file() -> None:
    pytest.importorskip("aiohttp")
    for call in (listed, opened):
        with pytest.raises(
            OSError, match=r"cannot be read: ClientConnectorError.* Check the address, the network"
        ) as e:
            call("http://127.0.0.1:9/a.csv")  # the port of the service discard, which nobody runs
        assert not isinstance(e.value, FileNotFoundError)


def test_paths_of_windows_are_local() -> None:
    assert not is_remote(r"C:\runs\a")
    assert not is_remote("C://runs/a")
    assert not is_remote(Path("runs::a"))
    assert is_remote("s3://bucket/runs")
    assert is_remote("simplecache::s3://bucket/runs")
