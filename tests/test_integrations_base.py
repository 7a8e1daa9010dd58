"""What adapters share: nothing is loaded unasked, a library that is missing is named, ranks agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import forked
import pytest

from batchnorm.integrations.missing_packages import needed
from batchnorm.integrations.watch_session import Session

LIBRARIES = {
    "ignite": "pytorch-ignite",
    "lightning": "lightning",
    "mlflow": "mlflow",
    "skorch": "skorch",
    "tensorboard": "tensorboard",
    "transformers": "'transformers[torch]'",
}

WITHOUT = """
import importlib, sys
import batchnorm
batchnorm.watch
assert not [name for name in sys.modules if "integrations" in name]
for name in ("pytorch_lightning", *{libraries}):
    sys.modules[name] = None

def use(name):
    module = importlib.import_module("batchnorm.integrations." + name)
    if name == "ignite":
        module.attach(None, None)
    if name == "mlflow":
        module.MLflowSink()
    if name == "tensorboard":
        module.TensorBoardSink("folder")

for name in {libraries}:
    try:
        use(name)
    except ModuleNotFoundError as error:
        print(error)
"""

RANK = """
import sys, torch, batchnorm as bn
from torch import nn
from batchnorm.integrations.recalibration_in_training import calibrate
torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), sys.argv[1]
model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
model = model.requires_grad_(False)
for tensor in model.parameters():
    torch.distributed.broadcast(tensor, 0)
batch = torch.randn(16, 2, generator=torch.Generator().manual_seed(rank))
calibrate(model, [batch], None, forward=lambda m, x: m(x), is_distributed=True)
torch.save(dict(model.named_buffers()), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_nothing_is_loaded_unasked_and_every_missing_library_is_named_with_what_to_type() -> None:
    program = WITHOUT.format(libraries=sorted(LIBRARIES))
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert told.splitlines() == [
        f"this integration needs {name}, which is not installed. Run: pip install {install}"
        for name, install in sorted(LIBRARIES.items())
    ]


def test_what_is_missing_inside_of_a_library_is_told_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there'"), needed("other", "other"):
        import not_there  # noqa: F401


def test_a_session_that_did_not_begin_takes_everything() -> None:
    session = Session(every=5)
    session.note_loss(1.0)
    session.end()
    assert session.run is None


@pytest.mark.slow
def test_all_ranks_have_the_statistics_of_all_data(tmp_path: Path) -> None:
    import torch

    ranks = forked.run_world(RANK, str(tmp_path))
    assert [rank.returncode for rank in ranks] == [0, 0], [rank.stderr[-2000:] for rank in ranks]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.cat([torch.randn(16, 2, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)])
    torch.testing.assert_close(first["0.running_mean"], x.mean(0))
