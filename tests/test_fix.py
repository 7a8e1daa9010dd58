"""Files that fix writes: both formats, every copy in them, whatever else is in them, and what interrupts a writer."""

import errno
import json
import os
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from planted import bn504, changed, layer_of, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from batchnorm.checkpoint import read
from batchnorm.doctor.examination import Selection, examine
from batchnorm.doctor.mending import mended_checkpoint
from batchnorm.doctor.mending.treatment import differences, treat
from batchnorm.files.whole import replacing

NAN = float("nan")
MODEL = """
import sys
import torch
from planted import Net, batches, changed

def model(track=True):
    made = Net()
    made.stem[1].track_running_stats = track
    return made

def sick():
    return changed(running_var=float("nan"))

def raises():
    made = Net()
    made.forward = lambda x: {}["camera"]
    return made

loader = batches()

def leaves():
    made = Net()
    made.forward = lambda x: sys.exit(0)
    return made

def generator():
    yield from batches()

class Missing:
    def __iter__(self):
        return open("pictures/1.png")

missing = Missing

class Wrong:
    def __iter__(self):
        raise ValueError("\\n".join("line" for _ in range(12)))

many_lines = Wrong

def arrays():
    return [[[0.0]]]
"""


FOLDER = {"nets.py": MODEL}
call = partial(command_line.call, "fix")


def tree(folder):
    """Every path with its bytes, mode and times; the folder's own times too."""
    paths = [folder, *folder.rglob("*")]
    return {p: (p.stat().st_mtime_ns, p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in paths}


def bits(tensor):
    return tensor.detach().clone().contiguous().flatten().view(torch.uint8)


def state(**values):
    return changed(**values).state_dict()


def save(kind, tensors, name="model"):
    path = Path(f"{name}.{'safetensors' if kind == 'safetensors' else 'pt'}")
    if kind == "safetensors":
        save_file(dict(tensors), path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "pt")
    return path


def load(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def half(tensors, dtype):
    return {key: value.to(dtype) if "running" in key else value for key, value in tensors.items()}


REMEDIES = {
    "BN103": (lambda: state(running_var=-1e-14), [], {"stem.1.running_var": 0.0}),
    "BN104": (lambda: state(running_var=1e-40), [], {"stem.1.running_var": 0.0}),
    "BN102": (lambda: state(running_mean=NAN), ["--unsafe-fixes"], {"stem.1.running_mean": None}),
    "BN103 large": (lambda: state(running_var=-0.5), ["--unsafe-fixes"], {"stem.1.running_var": None}),
    "BN107": (lambda: state(weight=NAN, bias=NAN), ["--unsafe-fixes"], {"stem.1.weight": 1.0, "stem.1.bias": 0.0}),
}


@pytest.mark.parametrize("kind", ["pt", "legacy", "safetensors"])
@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_changes_one_number_and_no_other_bit(folder, name, kind):
    make, options, expected = REMEDIES[name]
    path = save(kind, make())
    result = call(path, *options)
    assert result.exit_code == 0, result.output
    before, after = load(path), load(path.with_suffix(f".fixed{path.suffix}"))
    assert list(before) == list(after)
    for key, old in before.items():
        others = torch.ones(old.shape, dtype=torch.bool)
        if key in expected:
            others[3] = False
            value = after[key][3].item()
            assert value == expected[key] if expected[key] is not None else value in old[others].tolist()
        assert torch.equal(bits(after[key][others]), bits(old[others])), key
    assert not {name.split()[0]} & {f.code for f in examine(path.with_suffix(f".fixed{path.suffix}")).findings}


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_become_float32_exactly(folder, kind, dtype):
    path = save(kind, half(trained().state_dict(), dtype))
    assert call(path).exit_code == 0
    before, after = load(path), load(path.with_suffix(f".fixed{path.suffix}"))
    for key, old in before.items():
        assert after[key].dtype == (torch.float32 if "running" in key else old.dtype)
        assert torch.equal(after[key], old.to(after[key].dtype))


def test_numbers_of_bfloat16_are_edited_in_place_if_they_are_not_widened(folder):
    tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state(weight=NAN).items()}
    path = save("safetensors", tensors)
    assert call(path, "--unsafe-fixes", "--ignore", "BN108").exit_code == 0
    before, after = load(path), load(Path("model.fixed.safetensors"))
    assert after["stem.1.weight"][3] == 1
    assert after["stem.1.running_var"].dtype == torch.bfloat16
    assert all(torch.equal(bits(after[key]), bits(before[key])) for key in before if key != "stem.1.weight")
    old, new = Path("model.safetensors").read_bytes(), Path("model.fixed.safetensors").read_bytes()
    assert len(old) == len(new)


def test_a_counter_without_which_a_state_does_not_load_is_put_in_its_place(folder):
    whole, cut = trained().state_dict(), trained().state_dict()
    for name in ("stem.1", "body.1"):
        del cut[f"{name}.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="Missing key"):
        trained().load_state_dict(cut, strict=True)
    path = save("pt", cut)
    assert call(path).exit_code == 0
    after = load(path.with_suffix(".fixed.pt"))
    assert list(after) == list(whole)
    assert after["stem.1.num_batches_tracked"].dtype == torch.long
    trained().load_state_dict(after, strict=True)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_counters_that_torch_fills_in_are_left_out(folder, kind):
    path = save(kind, {key: value for key, value in trained().state_dict().items() if "num_batches" not in key})
    trained().load_state_dict(load(path), strict=True)
    assert "nothing to fix" in call(path).output
    assert not path.with_suffix(f".fixed{path.suffix}").exists()


def test_a_file_of_safetensors_keeps_its_metadata_and_its_alignment(folder):
    tensors = {f"module.{k}": v for k, v in half(state(), torch.float16).items()}
    odd = torch.ones(3, dtype=torch.uint8)  # no counters that load: they are written anew
    tensors |= {key: odd.clone() for key in tensors if "num_b" in key}
    tensors["module.mask"] = torch.ones(3, dtype=torch.uint8)  # behind it, 8-byte counters would stand askew
    save_file(tensors, "model.safetensors", metadata={"format": "pt", "epoch": "3 ∙ µ"})
    assert call("model.safetensors").exit_code == 0
    data = Path("model.fixed.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt", "epoch": "3 ∙ µ"}
    sizes = {"I64": 8, "F32": 4, "U8": 1}
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in header.values())
    with safe_open("model.fixed.safetensors", "pt") as file:
        assert set(file.keys()) == {*trained().state_dict(), "mask"}
        assert torch.equal(file.get_tensor("mask"), tensors["module.mask"])


def test_a_file_of_safetensors_needs_no_torch(folder):
    path = save("safetensors", half(state(running_var=-1e-14), torch.float32))
    code = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = sys.modules['numpy'] = None\n"
        "from batchnorm.cli import main; main(['fix', 'model.safetensors'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load(path.with_suffix(".fixed.safetensors"))["stem.1.running_var"][3] == 0


def checkpoint_of_a_loop():
    """What training loops save, with tied tensors, an optimizer and an averaged copy that is sick as well."""
    model = changed(running_var=-1e-14)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3, 10, 10)).sum().backward()
    optimizer.step()
    own, averaged = model.state_dict(), changed(running_var=1e-40).state_dict()
    own["head.weight"][0, 0] = NAN
    averaged["body.1.running_mean"] *= 1.01
    return {
        "epoch": 3, "loss": np.float64(0.25), "best": float("inf"), "note": "µ", "shape": (1, 2),
        "state_dict": own, "model_ema": averaged, "tied": own["head.weight"],
        "view": own["body.0.weight"][0], "parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "optimizer": optimizer.state_dict(), "lr": [0.1, 0.01],
    }  # fmt: skip


def flat(value, path=()):
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, (*path, key))
    else:
        yield path, bits(value).tolist() if isinstance(value, torch.Tensor) else value


def test_everything_else_in_a_checkpoint_stays_as_it_is_and_averaged_copies_are_mended(folder):
    torch.save(checkpoint_of_a_loop(), "loop.ckpt")
    result = call("loop.ckpt")
    assert result.exit_code == 0, result.output
    before, after = (torch.load(name, weights_only=False) for name in ("loop.ckpt", "loop.fixed.pt"))
    mended = {("state_dict", "stem.1.running_var"), ("model_ema", "stem.1.running_var")}
    assert dict(flat(before)).keys() == dict(flat(after)).keys()
    assert {key for key, value in flat(before) if value != dict(flat(after))[key]} == mended
    assert all(after[copy][key][3] == 0 for copy, key in mended)
    assert after["state_dict"]._metadata == before["state_dict"]._metadata
    assert after["tied"].data_ptr() == after["state_dict"]["head.weight"].data_ptr()
    assert after["view"].data_ptr() == after["state_dict"]["body.0.weight"].data_ptr()
    assert type(after["parameter"]) is nn.Parameter
    assert type(after["loss"]) is np.float64
    assert "model_ema.stem.1" in result.output


def test_a_tensor_that_two_names_share_is_mended_once(folder):
    own = half(state(running_var=-1e-14), torch.float32)
    own["body.1.running_var"] = own["stem.1.running_var"]
    torch.save(own, "tied.pt")
    assert call("tied.pt").exit_code == 0
    after = load(Path("tied.fixed.pt"))
    assert after["body.1.running_var"].data_ptr() == after["stem.1.running_var"].data_ptr()
    assert after["stem.1.running_var"][3] == 0


def test_a_repeated_number_is_written_out_where_one_channel_changes(folder):
    own = state()
    own["stem.1.running_mean"] = torch.ones(1).expand(8)
    own["stem.1.running_var"] = torch.tensor([NAN]).expand(8)
    torch.save(own, "expanded.pt")
    assert call("expanded.pt", "--unsafe-fixes").exit_code == 0
    assert load(Path("expanded.fixed.pt"))["stem.1.running_var"].tolist() == [1.0] * 8


def test_a_prefix_is_taken_off_names_and_versions_in_every_copy(folder):
    compiled = nn.DataParallel(trained())
    wrapped = compiled.state_dict()
    torch.save({"state_dict": wrapped, "ema": wrapped.copy(), "epoch": 1}, "wrapped.ckpt")
    assert call("wrapped.ckpt").exit_code == 0
    after = torch.load("wrapped.fixed.pt", weights_only=True)
    for copy in ("state_dict", "ema"):
        trained().load_state_dict(after[copy], strict=True)
        assert list(after[copy]) == [key.removeprefix("module.") for key in wrapped]
    assert "stem.1" in after["state_dict"]._metadata
    assert "module" not in after["state_dict"]._metadata
    assert read("wrapped.fixed.pt").prefix == "state_dict."


def test_a_prefix_that_not_every_name_has_is_left(folder):
    names = {f"module.{key}": value for key, value in trained().state_dict().items()}
    torch.save({**names, "temperature": torch.ones(1)}, "partly.pt")
    assert "nothing to fix" in call("partly.pt").output
    assert tree(folder).keys() == {folder, folder / "nets.py", folder / "partly.pt"}


def test_lightning_names_stay(folder):
    names = {f"model.{key}": value for key, value in state(running_var=-1e-14).items()}
    torch.save({"state_dict": names, "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}}, "l.ckpt")
    assert call("l.ckpt").exit_code == 0
    after = torch.load("l.fixed.pt", weights_only=True)
    assert list(after["state_dict"]) == list(names)
    assert after["hyper_parameters"] == {"lr": 0.1}


# -- with a model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_measured_statistics_go_into_the_checkpoint_with_everything_else(folder):
    saved = checkpoint_of_a_loop()
    saved["state_dict"]["head.weight"][0, 0] = 0
    del saved["loss"]
    saved["state_dict"]["stem.1.running_mean"][2] = NAN
    torch.save(saved, "loop.ckpt")
    result = call("nets.py:model", "--weights", "loop.ckpt", "--data", "nets.py:loader", "--set", "track=True")
    assert result.exit_code in {0, 1}, result.output
    assert "BN102 statistics measured anew: stem.1" in result.output
    assert "batchnorm doctor nets.py:model --weights loop.fixed.pt --set track=True" in " ".join(result.output.split())
    before, after = (torch.load(name, weights_only=False) for name in ("loop.ckpt", "loop.fixed.pt"))
    different = {key for key, value in flat(before) if repr(value) != repr(dict(flat(after))[key])}
    assert all(len(key) == 2 and ("running" in key[1] or "num_batches" in key[1]) for key in different)
    assert ("model_ema", "stem.1.running_var") in different
    assert after["state_dict"]["stem.1.running_mean"].isfinite().all()
    model = trained()
    model.load_state_dict(after["state_dict"], strict=True)
    assert "BN102" not in {finding.code for finding in examine(model).findings}


def test_measured_statistics_of_a_file_in_half_precision_are_float32(folder):
    path = save("safetensors", half(state(running_var=NAN), torch.float16))
    result = call("nets.py:model", "--weights", path, "--data", "nets.py:loader", "--ignore", "BN108")
    assert result.exit_code == 0, result.output
    after = load(Path("model.fixed.safetensors"))
    assert after["stem.1.running_var"].dtype == torch.float32
    assert after["body.1.running_var"].dtype == torch.float16
    assert after["stem.1.running_var"].isfinite().all()


def test_a_model_without_weights_is_written_as_a_state_dict(folder):
    result = call("nets.py:sick", "--data", "nets.py:loader")
    assert result.exit_code == 0, result.output
    trained().load_state_dict(torch.load("nets.fixed.pt", weights_only=True), strict=True)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(Path("nets.fixed.pt").stat().st_mode) == 0o666 & ~umask


def test_settings_that_no_file_holds_are_told_and_count_as_left(folder):
    path = save("pt", trained().state_dict())
    result = call("nets.py:model", "--weights", path, "--set", "track=False")
    assert result.exit_code == 1
    assert "nothing to fix" in result.output
    assert "in your code: layer.track_running_stats = True" in " ".join(result.output.split())
    assert not Path("model.fixed.pt").exists()


def test_a_preview_of_a_model_leaves_the_folder_as_it_was(folder, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    path = save("pt", state(running_var=NAN))
    before = tree(folder)
    result = call("nets.py:model", "--weights", path, "--data", "nets.py:loader", "--diff")
    assert result.exit_code == 0, result.output
    assert "1 not finite →" in result.output
    assert "nothing written" in result.output
    assert tree(folder) == before
    assert not sys.dont_write_bytecode


def test_what_the_models_code_raises_is_told_in_one_sentence(folder):
    result = call("nets.py:raises", "--data", "nets.py:loader")
    assert result.exit_code == 2
    assert "nets.py:raises raised KeyError at nets.py:" in result.output
    assert "'camera'. --debug" in result.output


# -- what may go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "shutil.copymode"])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_an_interrupted_write_leaves_what_was_there_and_no_litter(folder, monkeypatch, kind, step, error):
    path = save(kind, state(running_var=-1e-14))
    before = {p: value[1:] for p, value in tree(folder).items()}

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(step, fails)
        result = call(path, "--in-place")
    assert result.exit_code == (2 if isinstance(error, OSError) else 130)
    assert {p: value[1:] for p, value in tree(folder).items()} == before
    if isinstance(error, OSError):
        assert f"cannot write {path.resolve()}: No space left on device" in " ".join(result.output.split())


def test_a_copy_that_reads_differently_is_given_up(folder, monkeypatch):
    path = save("safetensors", state(running_var=-1e-14))
    monkeypatch.setattr(
        "batchnorm.doctor.mending.safetensors_files._packed", lambda values, _: b"\0\0\x80?" * len(values)
    )
    with pytest.raises(ValueError, match=r"layer 'stem\.1' of a mended copy did not read as written"):
        mended_checkpoint.write(mended_checkpoint.plan(path), Path("out.safetensors"))
    assert {p.name for p in folder.iterdir()} == {"nets.py", path.name}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_named(folder, monkeypatch, code):
    path = save("pt", state(running_var=-1e-14))

    def refuses(*_, **__):
        raise OSError(code, os.strerror(code), "/somewhere/.hidden")

    monkeypatch.setattr("tempfile.mkstemp", refuses)
    result = call(path)
    assert result.exit_code == 2
    assert f"cannot write model.fixed.pt: {os.strerror(code)}. Choose another place" in result.output


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_left_alone(folder):
    path = save("pt", state(running_var=-1e-14))
    folder.chmod(0o500)
    try:
        result = call(path)
    finally:
        folder.chmod(0o700)
    assert result.exit_code == 2
    assert "Permission denied" in result.output


def test_a_folder_that_is_missing_is_named(folder):
    path = save("pt", state(running_var=-1e-14))
    result = call(path, "-o", "no/such/out.pt")
    assert result.exit_code == 2
    assert "cannot write no/such/out.pt: No such file or directory" in result.output


def test_the_mode_of_the_file_is_kept_and_a_link_stays_a_link(folder):
    path = save("pt", state(running_var=-1e-14))
    path.chmod(0o640)
    Path("link.pt").symlink_to(path)
    assert call("link.pt", "--in-place").exit_code == 0
    assert Path("link.pt").is_symlink()
    assert load(path)["stem.1.running_var"][3] == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_force_writes_over_a_file_in_the_way(folder):
    path = save("pt", state(running_var=-1e-14))
    Path("out.pt").write_text("older")
    refused = call(path, "-o", "out.pt")
    assert refused.exit_code == 2
    assert "out.pt exists already. Pass --force" in refused.output
    assert Path("out.pt").read_text() == "older"
    assert call(path, "-o", "out.pt", "--diff").exit_code == 0  # nothing is in the way of a look
    assert call(path, "-o", "out.pt", "--force").exit_code == 0
    assert load(Path("out.pt"))["stem.1.running_var"][3] == 0


def test_nothing_takes_the_name_before_it_is_whole(folder):
    def writer():
        with replacing(folder / "new.pt") as file:
            file.write(b"half of it")
            assert not (folder / "new.pt").exists()
            raise InterruptedError("a signal")

    with pytest.raises(InterruptedError):
        writer()
    assert {p.name for p in folder.iterdir()} == {"nets.py"}


def wrong(*args, words):
    return pytest.param(args, words, id=" ".join(args))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        wrong(
            "model.pt", "--data", "nets.py:loader", words="batchnorm fix model.py:make_model --weights model.pt --data"
        ),
        wrong("model.pt", "--weights", "model.pt", words="--weights needs a model, got the file 'model.pt'"),
        wrong("model.pt", "--set", "a=1", words="--set needs a model"),
        wrong(
            "model.pt", "-o", "model.pt", words="model.pt is the checkpoint itself. To write over it, pass --in-place"
        ),
        wrong("model.pt", "-o", "out.safetensors", words="keeps the format of model.pt"),
        wrong("model.pt", "-o", ".", words="it is a folder"),
        wrong("model.pt", "-o", "out.pt", "--in-place", words="--in-place writes over the checkpoint, got -o"),
        wrong("nets.py:sick", "--in-place", words="got a model without --weights"),
        wrong("model.pt", "--select", "BN999", words="no rule 'BN999'"),
        wrong("none.pt", words="none.pt"),
        wrong("nets.py", words="nets.py"),
        wrong("trains.onnx", words="Fix the checkpoint that the file was made from, and export it again"),
        wrong("nets.py:model", "--weights", "other.pt", words="other.pt does not fit Net"),
    ],
)
def test_wrong_inputs_say_what_to_do_and_write_nothing(folder, args, words):
    save("pt", state(running_var=-1e-14))
    torch.save(nn.BatchNorm1d(3).state_dict(), "other.pt")
    bn504(folder)
    before = tree(folder)
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.output.split())
    assert tree(folder) == before


def test_only_selected_rules_are_fixed(folder):
    sick = state()
    sick["stem.1.running_var"][:4] = torch.tensor([-1e-14, 1e-40, 1.0, NAN])
    path = save("pt", sick)
    assert [f.code for f in mended_checkpoint.plan(path, selection=Selection(select=("BN104",))).findings] == ["BN104"]
    assert "nothing to fix" in call(path, "--ignore", "BN1").output


def test_every_word_of_the_output_is_safe_to_print(folder):
    names = {f"stem\x1b[31m.{key}": value for key, value in nn.BatchNorm1d(4).state_dict().items()}
    names["stem\x1b[31m.running_var"] = torch.tensor([1e-40, 2.0, 3.0, 4.0])
    torch.save(names, "odd.pt")
    result = call("odd.pt", "--diff")
    assert "1e-40" in result.output
    assert "\x1b" not in result.output


def test_a_layer_of_the_model_that_the_file_lacks_is_named(folder):
    model = changed(running_var=-1e-14)
    changes = differences(model, treat(model), examine(model).findings, measured=False)
    torch.save({f"bn.{key}": value for key, value in layer_of(model).state_dict().items()}, "one.pt")
    with pytest.raises(ValueError, match=r"one.pt has no layer 'stem.1' of the model"):
        mended_checkpoint.plan("one.pt", live=changes)


# -- odd counters, names and places ------------------------------------------------------------------------------


@pytest.mark.parametrize("counter", [torch.tensor(NAN), torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_counter_that_is_no_number_is_replaced(folder, kind, counter):
    path = save(kind, {**state(running_var=1e-40), "stem.1.num_batches_tracked": counter})
    result = call(path)
    assert result.exit_code == 0, result.output
    after = load(Path(f"model.fixed.{kind}"))
    assert after["stem.1.num_batches_tracked"].shape == ()
    assert after["stem.1.num_batches_tracked"].dtype == torch.int64
    assert after["stem.1.num_batches_tracked"] == 0
    assert after["stem.1.running_var"][3] == 0


def test_a_counter_that_is_a_plain_number_stays(folder):
    path = save("pt", {**state(running_var=1e-40), "stem.1.num_batches_tracked": 7})
    assert "BN112" not in call(path).output
    assert load(Path("model.fixed.pt"))["stem.1.num_batches_tracked"] == 7


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_names_that_begin_with_a_dot_keep_it(folder, kind):
    own = {f".{key.removeprefix('stem.1.')}": t for key, t in state(running_var=1e-40).items() if "stem.1." in key}
    assert call(save(kind, own)).exit_code == 0
    after = load(Path(f"model.fixed.{kind}"))
    assert after.keys() == own.keys()
    assert after[".running_var"][3] == 0


def test_a_copy_that_cannot_be_read_is_told_by_the_names_that_the_user_knows(folder, monkeypatch):
    path = save("safetensors", state(running_var=-1e-14))
    monkeypatch.setattr("batchnorm.doctor.mending.safetensors_files._header", lambda _: b"\0" * 8 + b"{")
    result = call(path)
    assert result.exit_code == 2
    assert f"{path}: a mended copy could not be read: expected" in result.output
    assert ".fixed" not in result.output
    assert {p.name for p in folder.iterdir()} == {"nets.py", path.name}


def test_code_that_leaves_the_program_is_no_success(folder):
    result = call("nets.py:leaves", "--data", "nets.py:loader")
    assert result.exit_code == 2
    assert "nets.py:leaves raised SystemExit at nets.py:" in result.output


def test_data_of_a_generator_are_read_as_often_as_needed(folder):
    result = call("nets.py:sick", "--data", "nets.py:generator")
    assert "statistics measured anew" in result.output
    assert Path("nets.fixed.pt").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("missing", "raised FileNotFoundError at nets.py:"),
        ("many_lines", "raised ValueError at nets.py:"),
        ("arrays", "examine needs batches that hold tensors, got list without any. Make the loader yield tensors"),
    ],
)
def test_what_the_users_loader_raises_is_told_in_one_line(folder, data, words):
    result = call("nets.py:sick", "--data", f"nets.py:{data}")
    assert result.exit_code == 2
    assert words in result.output
    assert "cannot write" not in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("target", [".", "", "/"])
def test_a_folder_is_no_checkpoint(folder, target):
    for args in ([target], ["nets.py:model", "--weights", target or "."]):
        result = call(*args)
        assert result.exit_code == 2
        assert "expected a file, got a folder" in result.output


def test_what_is_in_the_way_and_no_file_is_not_replaced(folder):
    path = save("pt", state(running_var=1e-40))
    os.mkfifo("pipe.pt")
    result = call(path, "-o", "pipe.pt", "--force")
    assert result.exit_code == 2
    assert "cannot write pipe.pt: it is a pipe or device" in result.output
    assert stat.S_ISFIFO(Path("pipe.pt").stat().st_mode)


def test_a_link_stays_one_and_is_written_through(folder):
    path = save("pt", state(running_var=1e-40))
    Path("real.pt").write_bytes(b"old")
    Path("link.pt").symlink_to("real.pt")
    Path("dangling.pt").symlink_to("fresh.pt")
    assert call(path, "-o", "link.pt").exit_code == 2
    assert Path("real.pt").read_bytes() == b"old"
    assert call(path, "-o", "link.pt", "--force").exit_code == 0
    assert call(path, "-o", "dangling.pt").exit_code == 0
    for link, real in (("link.pt", "real.pt"), ("dangling.pt", "fresh.pt")):
        assert Path(link).is_symlink()
        assert load(Path(real))["stem.1.running_var"][3] == 0


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "m.bin"), ("safetensors", "m.SAFETENSORS")])
def test_the_format_goes_by_the_content(folder, kind, name):
    path = save(kind, state(running_var=1e-40)).rename(name)
    assert call(path).exit_code == 0
    assert load_file("m.fixed.safetensors")["stem.1.running_var"][3] == 0


def test_a_torch_file_of_another_name_is_mended_and_loaded(folder):
    path = save("pt", state(running_var=1e-40)).rename("m.safetensors")
    assert call(path).exit_code == 0
    assert load(Path("m.fixed.pt"))["stem.1.running_var"][3] == 0
    assert call("nets.py:model", "--weights", path, "--diff").exit_code == 0


def test_a_terminal_of_ascii_gets_ascii(folder):
    save("pt", state(running_var=1e-40))
    command = [sys.executable, "-m", "batchnorm", "fix", "model.pt", "--diff"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert " -> 0 ... " in done.stdout
    assert "?" not in done.stdout
