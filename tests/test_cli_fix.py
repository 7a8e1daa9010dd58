"""batchnorm fix: what is mended, what is left, and what becomes of the files."""

import hashlib
from functools import partial
from pathlib import Path

import command_line
import pytest
import torch
from planted import Net, changed, layer_of, trained
from safetensors.torch import load_file, save_file

import batchnorm as bn
from batchnorm.checkpoint import read
from batchnorm.doctor import examine

MODEL = """
from planted import Net as model, batches
loader = batches()
"""


FOLDER = {"fixnet.py": MODEL}
call = partial(command_line.call, "fix")


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def tiny():
    """A denormal variance, inside of a nested checkpoint with other things."""
    state = changed(running_var=1e-40).state_dict()
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"step": torch.arange(5)}}, "tiny.pt")
    return "tiny.pt"


def half():
    """Statistics in half precision, a wrapper's prefix, no counters."""
    state = trained().state_dict()
    save_file(
        {
            f"module.{key}": value.half() if "running" in key else value
            for key, value in state.items()
            if "num_b" not in key
        },
        "half.safetensors",
    )
    return "half.safetensors"


def lost():
    torch.save(changed(running_var=float("nan")).state_dict(), "lost.pt")
    return "lost.pt"


def output_of(state):
    model = Net()
    model.load_state_dict(state, strict=True)
    return model.eval()(torch.linspace(-2, 2, 3 * 3 * 10 * 10).reshape(3, 3, 10, 10))


def test_a_safe_fix_keeps_outputs_and_everything_else_in_the_file(folder):
    result = call(tiny())
    assert result.exit_code == 0, result.output
    before, after = torch.load("tiny.pt"), torch.load("tiny.fixed.pt")
    assert after["state_dict"]["stem.1.running_var"][3] == 0
    assert after["epoch"] == 3
    assert torch.equal(after["optimizer"]["step"], before["optimizer"]["step"])
    torch.testing.assert_close(output_of(after["state_dict"]), output_of(before["state_dict"]), rtol=0, atol=1e-6)
    for key, value in before["state_dict"].items():
        if key != "stem.1.running_var":
            assert torch.equal(after["state_dict"][key], value), key
    assert not {"BN103", "BN104"} & {finding.code for finding in examine("tiny.fixed.pt").findings}


def test_the_result_loads_strictly_into_the_plain_model(folder):
    result = call(half())
    assert result.exit_code == 0, result.output
    assert examine("half.fixed.safetensors").findings == ()
    assert read("half.fixed.safetensors").layers["stem.1"].dtypes["running_var"] == "float32"
    output_of(load_file("half.fixed.safetensors"))


@pytest.mark.parametrize("make", [tiny, half])
def test_a_second_fix_changes_nothing(folder, make):
    path = Path(make())
    call(str(path))
    fixed = f"{path.stem}.fixed{path.suffix}"
    before = contents(folder)
    result = call(fixed)
    assert result.exit_code == 0
    assert "nothing to fix" in result.output
    assert contents(folder) == before


@pytest.mark.parametrize("more", [[], ["--unsafe-fixes"]])
@pytest.mark.parametrize("make", [tiny, half, lost])
def test_a_preview_writes_nothing(folder, make, more):
    path = make()
    before = contents(folder)
    result = call(path, "--diff", *more)
    assert result.exit_code in {0, 1}
    assert contents(folder) == before


def test_a_preview_shows_figures_before_and_after(folder):
    result = call(tiny(), "--diff")
    assert "stem.1  BN104 variance 0" in result.output
    assert "1e-40" in result.output
    assert "would write tiny.fixed.pt" in result.output


def test_what_needs_data_says_so_and_is_left(folder):
    result = call(lost())
    assert result.exit_code == 1
    assert "needs --data, or --unsafe-fixes" in " ".join(result.output.split())
    assert not (folder / "lost.fixed.pt").exists()


@pytest.mark.slow
def test_data_measure_the_sick_layer_anew_and_no_other(folder):
    result = call("fixnet.py:model", "--weights", lost(), "--data", "fixnet.py:loader")
    assert result.exit_code == 0, result.output
    before, after = torch.load("lost.pt"), torch.load("lost.fixed.pt")
    assert after["stem.1.running_var"].isfinite().all()
    assert torch.equal(after["body.1.running_var"], before["body.1.running_var"])
    assert examine("lost.fixed.pt").ok


def test_unsafe_fixes_are_only_done_if_they_are_asked_for(folder):
    result = call(lost(), "--unsafe-fixes")
    assert result.exit_code == 0, result.output
    assert torch.load("lost.fixed.pt")["stem.1.running_var"].isfinite().all()


def test_an_old_file_is_written_over_only_if_that_is_asked_for(folder):
    path, before = tiny(), None
    before = Path(path).read_bytes()
    assert call(path).exit_code == 0
    again = call(path)
    assert again.exit_code == 2
    assert "tiny.fixed.pt" in again.output
    assert Path(path).read_bytes() == before
    assert call(path, "--in-place").exit_code == 0
    assert Path(path).read_bytes() != before
    assert {file.name for file in folder.iterdir() if file.is_file()} == {"fixnet.py", "tiny.pt", "tiny.fixed.pt"}


def test_an_error_while_writing_leaves_the_folder_as_it_was(folder, monkeypatch):
    path = tiny()
    before = contents(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    result = call(path, "--in-place")
    assert result.exit_code == 2
    assert "No space left" in result.output
    assert contents(folder) == before


def test_treat_mends_a_copy():
    model = changed(running_var=-1e-14)
    layer_of(model).momentum = 0.99
    mended = bn.treat(model)
    assert layer_of(model).momentum == 0.99
    assert layer_of(mended).running_var[3] == 0
    assert layer_of(mended).momentum == pytest.approx(0.01)
    assert examine(mended).ok


@pytest.mark.parametrize(
    ("args", "words"),
    [(["nothing.pt"], "nothing.pt"), (["fixnet.py"], "fixnet.py"), (["fixnet.py:modle"], "model"), ([], "TARGET")],
)
def test_wrong_inputs_end_with_cause_and_remedy(folder, args, words):
    result = call(*args)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output
