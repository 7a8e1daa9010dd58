"""Keras' files: read as data, with the numbers of Keras; hostile ones are refused, and lead to no other file."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from batchnorm.other_frameworks import load, read, states_of
from batchnorm.other_frameworks.keras_files import FilePart

# written by Keras 3.15 (model.save, save_weights): a convolution, then four layers, of which one is in an inner model
FILES = Path(__file__).parent / "keras_files"
NAMES = ["first_bn", "nocenter", "noscale", "inner"]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_what_keras_saved_gives_keras_outputs(name):
    states = read(FILES / name)
    assert list(states) == NAMES
    assert [(s.eps, round(s.momentum, 6), s.axis) for s in states.values()] == [
        (1e-3, 0.01, -1), (2e-3, 0.1, -1), (1e-3, 0.01, -1), (1e-3, 0.01, -1),
    ]  # fmt: skip
    assert [(s.weight is None, s.bias is None) for s in states.values()] == [
        (False, False), (False, True), (True, False), (False, False),
    ]  # fmt: skip
    with np.load(FILES / "outputs.npz") as stored:
        x, expected = (torch.from_numpy(stored[key]).permute(0, 3, 1, 2).double() for key in "xy")
        kernel, bias = (torch.from_numpy(stored[f"sequential__c1__{key}"]).double() for key in ("kernel", "bias"))
        variance = stored["sequential__first_bn__moving_variance"]
    layers = [state.layer(2).double() for state in states.values()]
    y = torch.nn.Sequential(*layers)(torch.nn.functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias))
    # Keras computed in float32: 27 products and four layers, of values of the size of the largest
    line = 64 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(y, expected, rtol=0, atol=line)
    assert np.array_equal(states["first_bn"].running_var, variance)


def test_weights_alone_need_the_configuration_of_layers_without_gamma_or_beta():
    with pytest.raises(
        ValueError, match=r"model.weights.h5: layer 'nocenter' needs 4 weights .*, got 3. Pass its conf"
    ):
        read(FILES / "model.weights.h5")


def write_weights(path: str, groups: dict[str, tuple[str, list[np.ndarray]]]) -> str:
    """As save_weights of Keras 3 lays them out."""
    with h5py.File(path, "w") as file:
        for group, (name, arrays) in groups.items():
            made = file.create_group(f"layers/{group}/vars")
            made.attrs["name"] = name
            for i, array in enumerate(arrays):
                made[str(i)] = array
    return path


def arrays(channels: int = 3) -> list[np.ndarray]:
    return [np.arange(1, channels + 1, dtype=np.float32) + i for i in range(4)]


def test_weights_alone_are_read_with_the_settings_that_are_given():
    path = write_weights("w.weights.h5", {"batch_normalization": ("bn", arrays()), "dense": ("d", arrays()[:2])})
    (state,) = read(path, eps=1e-3, momentum=0.99).values()
    assert (state.name, state.eps, round(state.momentum, 6)) == ("bn", 1e-3, 0.01)
    assert [state.weight.tolist(), state.bias.tolist()] == [[1, 2, 3], [2, 3, 4]]
    assert [state.running_mean.tolist(), state.running_var.tolist()] == [[3, 4, 5], [4, 5, 6]]
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    load(model, {"0": state})
    assert states_of(model)["0"].running_var.tolist() == [4, 5, 6]


def test_layers_of_the_same_name_are_told_by_their_places():
    path = write_weights(
        "w.weights.h5", {f"block/layers/batch_normalization{i}": ("bn", arrays(2)) for i in ("", "_1")}
    )
    assert set(read(path, eps=1e-3)) == {f"layers/block/layers/batch_normalization{i}" for i in ("", "_1")}


def test_the_names_of_keras_2_have_numbers_behind_them():
    with h5py.File("old.h5", "w") as file:
        for name, array in zip(("gamma", "beta", "moving_mean", "moving_variance"), arrays(), strict=True):
            file[f"model_weights/bn/bn/{name}:0"] = array
        config = {"name": "bn", "epsilon": 1e-3, "momentum": 0.99, "axis": [3], "center": True, "scale": True}
        file.attrs["model_config"] = json.dumps(
            {"config": {"layers": [{"class_name": "BatchNormalization", "config": config}]}}
        )
    (state,) = read("old.h5").values()
    assert (state.name, state.axis, state.eps) == ("bn", 3, 1e-3)
    assert state.running_var.tolist() == [4, 5, 6]


SECRET = [7.5, 7.25, 7.125]


def hostile(kind: str) -> str:
    """A file that leads to secret.h5 or secret.bin, or does harm in another way."""
    Path("secret.bin").write_bytes(np.array(SECRET, np.float32).tobytes())
    with h5py.File("secret.h5", "w") as file:
        file["v"] = np.array(SECRET, np.float32)
        file["model_weights/bn/moving_mean"] = file["model_weights/bn/moving_variance"] = np.array(SECRET, np.float32)
    with h5py.File("bad.h5", "w") as file:
        group = file.create_group("model_weights/bn")
        group["moving_variance"] = arrays()[3]
        HOSTILE[kind](file, group)
    return "bad.h5"


def _virtual(_: h5py.File, group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "v", (3,))
    group.create_virtual_dataset("moving_mean", layout)


def _circle(file: h5py.File, group: h5py.Group) -> None:
    group["moving_mean"] = arrays()[2]
    group["again"] = file["/"]
    group["soft"] = h5py.SoftLink("/model_weights")


HOSTILE = {
    "external link": lambda file, group: group.__setitem__("moving_mean", h5py.ExternalLink("secret.h5", "/v")),
    "external link to a group": lambda file, group: file.__setitem__("more", h5py.ExternalLink("secret.h5", "/")),
    "external storage": lambda file, group: group.create_dataset(
        "moving_mean", (3,), "f4", external=[("secret.bin", 0, 12)]
    ),
    "virtual": _virtual,
    "gzip": lambda file, group: group.create_dataset("moving_mean", data=arrays()[2], compression="gzip"),
    "lzf": lambda file, group: group.create_dataset("moving_mean", data=arrays()[2], compression="lzf"),
    "chunks": lambda file, group: group.create_dataset("moving_mean", data=arrays()[2], chunks=(1,)),
    "plugin": lambda file, group: group.create_dataset(
        "moving_mean", (3,), "f4", chunks=(3,), compression=32015, allow_unknown_filter=True
    ),
    "huge": lambda file, group: group.create_dataset("moving_mean", (1 << 40,), "f4"),
    "two axes": lambda file, group: group.__setitem__("moving_mean", np.ones((3, 3), np.float32)),
    "objects": lambda file, group: group.create_dataset("moving_mean", data=["a", "b"], dtype=h5py.string_dtype()),
    "a group in its place": lambda file, group: group.create_group("moving_mean"),
    "soft link": lambda file, group: group.__setitem__("moving_mean", h5py.SoftLink("/nowhere")),
    "no mean": lambda file, group: None,
    "deep configuration": lambda file, group: (
        group.__setitem__("moving_mean", arrays()[2]), file.attrs.__setitem__("model_config", "[" * 30_000),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_lead_to_no_other_file(kind, monkeypatch):
    path = hostile(kind)
    opened: list[str] = []
    real = io.open

    def noted(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", noted)
    monkeypatch.setattr(io, "open", noted)
    with pytest.raises(ValueError, match=r"^bad.h5: .*, got .+\. [A-Z]"):
        read(path, eps=1e-3)
    assert not [name for name in opened if "secret" in name]


def test_circles_of_links_end():
    with h5py.File("circle.h5", "w") as file:
        group = file.create_group("model_weights/bn")
        group["moving_variance"] = arrays()[3]
        _circle(file, group)
    assert list(read("circle.h5", eps=1e-3)) == ["bn"]


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_damaged_files_are_refused_with_one_kind_of_error(name):
    data = (FILES / name).read_bytes()
    g = np.random.default_rng(0)
    for stop in [*range(0, len(data), len(data) // 20), len(data) - 1]:
        Path(name).write_bytes(data[:stop])
        try:
            read(name)
        except ValueError as error:
            assert str(error).startswith(f"{name}: ")  # noqa: PT017 - damage behind the last array may be harmless
    for _ in range(60):
        changed = bytearray(data)
        for place in g.integers(0, len(data), 8):
            changed[place] ^= int(g.integers(1, 256))
        Path(name).write_bytes(changed)
        try:
            read(name)
        except ValueError as error:
            assert str(error).startswith(f"{name}: ")  # noqa: PT017


def zipped(compression: int = zipfile.ZIP_STORED, **members: bytes) -> str:
    with zipfile.ZipFile("bad.keras", "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return "bad.keras"


def test_zip_files_of_other_contents_are_refused():
    weights = Path(write_weights("w.h5", {"batch_normalization": ("bn", arrays())})).read_bytes()
    assert list(read(zipped(model_weights_h5=weights), eps=1e-3)) == ["bn"]
    for made, text in (
        (lambda: zipped(config_json=b"{}"), r"without model.weights.h5. Save"),
        (lambda: zipped(zipfile.ZIP_DEFLATED, model_weights_h5=weights), r"got compressed ones. Unpack"),
        (lambda: zipped(model_weights_h5=weights, config_json=b"{"), r"got JSONDecodeError"),
        (lambda: zipped(model_weights_h5=b"no"), r"expected a whole Keras file, got"),
    ):
        with pytest.raises(ValueError, match=text):
            read(made(), eps=1e-3)


def test_places_that_are_no_file_of_keras_are_refused(tmp_path):
    Path("text.h5").write_text("weights")
    with pytest.raises(FileNotFoundError, match=r"no such path. Check"):
        read("zzz.keras")
    with pytest.raises(ValueError, match=r"got a folder or device. Give"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"text.h5: expected a .keras.*, got a file of another format. Save"):
        read("text.h5")
    with h5py.File("empty.h5", "w"):
        pass
    with pytest.raises(ValueError, match=r"needs batch norm layers, got none in empty.h5"):
        read("empty.h5")


def test_without_pyfive_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyfive", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyfive, which is not installed. Run: pip install 'batchnorm"):
        read(FILES / "model.keras")


def test_a_part_of_a_file_ends_where_it_ends():
    part = FilePart(io.BytesIO(b"0123456789"), 2, 5)
    assert (part.read(3), part.tell(), part.read(), part.read(1)) == (b"234", 3, b"56", b"")
    assert (part.seek(-2, 2), part.read(9), part.seek(9), part.read()) == (3, b"56", 9, b"")
    with pytest.raises(ValueError, match="inside of the file"):
        part.seek(-1)
