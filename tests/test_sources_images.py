"""Images in folders and tar shards: pixels, modes, groups, and files that are no images."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from test_sources import blocks, read

from batchnorm.datasets.blocks import Selection
from batchnorm.datasets.sources import Options, pieces

Image = pytest.importorskip("PIL.Image")


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (5, 4)) -> Image.Image:
    channels = {"L": (), "I;16": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    kind, top = (np.uint16, 65536) if mode == "I;16" else (np.uint8, 256)
    array = np.random.default_rng(seed).integers(0, top, (size[1], size[0], *channels)).astype(kind)
    return Image.fromarray(array, mode) if mode in {"CMYK", "LA"} else Image.fromarray(array)


def encoded(image: Image.Image, suffix: str = "png") -> bytes:
    data = io.BytesIO()
    image.save(data, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    return data.getvalue()


def shown(path: Path, mode: str, channels: int) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image if image.mode == mode else image.convert(mode)).reshape(-1, channels)


def folder(where: Path, suffix: str = "png", mode: str = "RGB", count: int = 7) -> list[Path]:
    files = [where / "ab"[i % 2] / f"{i}.{suffix}" for i in range(count)]
    for i, path in enumerate(files):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(i, mode, (5 + i, 4)), suffix))
    return sorted(files)


def tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return path


def array(values: object) -> bytes:
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_image_folder(tmp_path: Path, suffix: str, mode: str) -> None:
    """torchvision opens each file and calls convert("RGB")."""
    files = folder(tmp_path, suffix, mode)
    want = np.concatenate([shown(path, "RGB", 3) for path in files])
    found = pieces(tmp_path, options=Options(piece_images=3))
    assert [(piece.file, len(piece.files)) for piece in found] == [
        (str(tmp_path / "a"), 3), (str(tmp_path / "a"), 1), (str(tmp_path / "b"), 3),
    ]  # fmt: skip
    np.testing.assert_array_equal(read(found)["image"], want)
    assert sum(block.rows for block in blocks(found)) == 7
    assert {block.columns["image"].unit for block in blocks(found)} == {255.0}
    assert sum(piece.size for piece in found) == sum(path.stat().st_size for path in files)
    assert len({piece.key for piece in found}) == 3
    assert len({piece.fingerprint for piece in found}) == 2


@pytest.mark.parametrize(("mode", "unit"), [("L", 255), ("RGBA", 255), ("CMYK", 255), ("I;16", 65535), ("LA", 255)])
def test_modes_are_kept_or_converted(tmp_path: Path, mode: str, unit: int) -> None:
    files = folder(tmp_path, "tif", mode)
    for option in (mode, ""):
        found = blocks(pieces(tmp_path, options=Options(mode=option)))
        assert {block.columns["image"].unit for block in found} == {unit}
        want = np.concatenate([shown(path, mode, len(mode) if unit == 255 else 1) for path in files])
        values = np.concatenate([block.columns["image"].values for block in found])
        np.testing.assert_array_equal(values, want)
    if unit == 255 and mode != "L":
        values = read(pieces(tmp_path))["image"]
        np.testing.assert_array_equal(values, np.concatenate([shown(path, "RGB", 3) for path in files]))


def test_sixteen_bits_are_not_cut_to_eight(tmp_path: Path) -> None:
    folder(tmp_path, "png", "I;16")
    with pytest.raises(
        ValueError, match=r"expected an image that can be converted to mode RGB without loss.* mode='I;16'"
    ):
        read(pieces(tmp_path))


def test_palettes_with_transparency_have_their_colours(tmp_path: Path) -> None:
    image = picture(1).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(200)))
    want = np.asarray(picture(1).convert("P").convert("RGB")).reshape(-1, 3)
    np.testing.assert_array_equal(read(pieces(tmp_path))["image"], want)


@pytest.mark.parametrize("most", [7, 60, 1 << 22])
def test_large_images_are_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("batchnorm.datasets.sources.gathering.MOST_VALUES", most)
    files = folder(tmp_path)
    found = blocks(pieces(tmp_path))
    assert sum(block.rows for block in found) == 7
    assert all(block.columns["image"].values.size <= most for block in found)
    want = np.concatenate([shown(path, "RGB", 3) for path in files])
    np.testing.assert_array_equal(np.concatenate([block.columns["image"].values for block in found]), want)


def test_a_folder_with_another_image_is_another_folder(tmp_path: Path) -> None:
    folder(tmp_path)
    before = {piece.file: piece.fingerprint for piece in pieces(tmp_path)}
    (tmp_path / "b" / "new.png").write_bytes(encoded(picture(9)))
    after = {piece.file: piece.fingerprint for piece in pieces(tmp_path)}
    assert {name: before[name] == after[name] for name in before} == {
        str(tmp_path / "a"): True, str(tmp_path / "b"): False,
    }  # fmt: skip


def test_groups_are_folders(tmp_path: Path) -> None:
    folder(tmp_path)
    selection = Selection(by="folder")
    found = blocks(pieces(tmp_path, selection), selection)
    assert {(block.group, block.rows) for block in found} == {("a", 4), ("b", 3)}


@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = folder(tmp_path, "jpg")[3]
    path.write_bytes(encoded(picture(0, size=(300, 300)), "jpg")[:-3000] if damage is None else damage)
    with pytest.raises(
        ValueError, match=rf"(expected an image, got|got) {path}.* (Mend it|Write it again), or leave it out"
    ):
        read(pieces(tmp_path))


def test_the_limit_of_pillow_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    for limit in (18, 5):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=f"at most {limit} pixels, which is Pillow's limit"):
            read(pieces(tmp_path))


def test_unknown_modes_are_refused(tmp_path: Path) -> None:
    folder(tmp_path)
    for mode in ("rgb", "P", "1"):
        with pytest.raises(ValueError, match=f"expected a mode of Pillow such as RGB, .* got '{mode}'"):
            pieces(tmp_path, options=Options(mode=mode))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_shards_have_images_arrays_and_groups(tmp_path: Path, mode: str) -> None:
    members = [
        each
        for i in range(6)
        for each in (
            (f"d/{i}.cls", str(i % 2).encode()),
            (f"d/{i}.emb.npy", array(np.arange(4.0) + i)),
            (f"d/{i}.json", b"{}"),
            (f"d/{i}.png", encoded(picture(i))),
        )
    ]
    suffix = {"w": "tar", "w:gz": "tar.gz"}[mode]
    tar(tmp_path / f"a.{suffix}", members[:12], mode)
    tar(tmp_path / f"b.{suffix}", members[12:], mode)
    found = pieces(tmp_path)
    assert len(found) == 2
    values = read(found)
    np.testing.assert_array_equal(values["emb.npy"], np.arange(4.0) + np.arange(6)[:, None])
    np.testing.assert_array_equal(
        values["image"], np.concatenate([np.asarray(picture(i)).reshape(-1, 3) for i in range(6)])
    )
    assert sum(block.rows for block in blocks(found)) == 6
    selection = Selection(columns=("image",), by="cls")
    grouped = blocks(pieces(tmp_path, selection), selection)
    assert sorted((block.group, block.rows) for block in grouped) == [("0", 1)] * 3 + [("1", 1)] * 3


def test_several_images_of_an_example_are_columns_of_their_own(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("0.jpg", encoded(picture(0), "jpg")), ("0.mask.png", encoded(picture(1, "L")))])
    assert list(read(pieces(tmp_path, options=Options(mode="L")))) == ["jpg", "mask.png"]


def test_arrays_in_shards_have_their_features_on_the_channel_axis(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tar(tmp_path / "a.tar", [(f"{i}.npy", array(each)) for i, each in enumerate(images)])
    np.testing.assert_array_equal(read(pieces(tmp_path))["npy"], images.transpose(0, 2, 3, 1).reshape(-1, 3))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            [("0.npy", array(np.zeros(3))), ("1.npy", array(np.zeros(4)))],
            r"expected shape \(3,\) .* got \(4,\) in .*1.npy",
        ),
        ([("0.npy", array(np.zeros(3))), ("1.cls", b"1")], r"expected npy in every example, got .*1.cls without"),
        ([("0.npy", array(np.array([{}], dtype=object)))], "pickled objects, which are not loaded"),
        ([("0.npy", array(np.zeros(3))[:-5])], "0.npy, which is damaged"),
        ([("0.jpg", b"x")], r"expected an image, got .*a.tar: 0.jpg"),
        ([("0.cls", b"1")], r"expected a column of numbers, got .*a.tar with the columns cls"),
        ([], r"expected a column of numbers, got .*a.tar with no columns"),
    ],
)
def test_shards_that_cannot_be_measured_are_refused(tmp_path: Path, members, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(pieces(tar(tmp_path / "a.tar", members)))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_that_was_cut_off_is_refused(tmp_path: Path, mode: str) -> None:
    noise = np.random.default_rng(0).normal(size=(20, 1000))
    path = tar(tmp_path / "a.tar", [(f"{i}.npy", array(noise[i])) for i in range(20)], mode)
    path.write_bytes(path.read_bytes()[:100000])
    with pytest.raises(ValueError, match=r"expected a tar file, got .*a.tar, which is damaged"):
        read(pieces(path))
    path.write_bytes(b"no tar file")
    with pytest.raises(ValueError, match=r"expected a tar file, got .*a.tar, which is damaged or no tar file"):
        read(pieces(path))
