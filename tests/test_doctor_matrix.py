"""Every planted fault is found by its code, no other error with it; healthy models have no error and no warning."""

import pytest
import torch
from planted import FAULTS, Net, batches, bn501, diagnosis_of, images, loader, trained
from torch import nn

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.rules import RULES, Severity

# found by looking at the folder and the installation (test_rules_environment), or by comparing ranks (rank_checks)
ELSEWHERE = {"BN604", "BN605", "BN901", "BN902"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_its_code_and_no_other_error(name):
    code = name.split()[0]
    diagnosis = diagnosis_of(name)
    found = [finding for finding in diagnosis.findings if finding.code == code]
    assert found, [(finding.code, finding.measured) for finding in diagnosis.findings]
    for finding in found:
        assert all((finding.measured, finding.limit, finding.consequence, finding.remedy))
    assert {finding.code for finding in diagnosis.at_least(Severity.ERROR)} <= {code}


def test_every_rule_has_a_planted_fault():
    assert {name.split()[0] for name in FAULTS} | ELSEWHERE == set(RULES)
    assert len(RULES) >= 30


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def _tabular(features=6):
    return nn.Sequential(nn.Linear(features, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def _rows(count=256, seed=0):
    return list(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)).split(32))


def _sound(seed=0):
    return list(torch.randn(256, 2, 50, generator=torch.Generator().manual_seed(seed)).split(32))


def _volumes(seed=0):
    return list(torch.randn(64, 1, 6, 6, 6, generator=torch.Generator().manual_seed(seed)).split(16))


def _tensorflow_settings(channels):
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _frozen():
    return bn.freeze(trained()).train()


def _averaged():
    averaged = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True)
    averaged.update_parameters(trained())
    return averaged.eval()


def _half():
    return trained(Net(bn.BatchNorm2d)).bfloat16()


def _trained_mode():
    return trained().train()


HEALTHY = {
    "convolutions": lambda: (trained(), batches()),
    "in train mode": lambda: (_trained_mode(), batches()),
    "ours": lambda: (trained(Net(bn.BatchNorm2d)), batches()),
    "ours with activation": lambda: (trained(bn.convert(Net(), fuse=True, example=images(4))), batches()),
    "residual": lambda: (
        trained(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), Residual(), Residual())),
        batches(),
    ),
    "tabular": lambda: (trained(_tabular(), data=_rows(2048, 1)), _rows()),
    "batch norm of inputs": lambda: (
        trained(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), data=_rows(2048, 1)),
        _rows(),
    ),
    "sound": lambda: (
        trained(nn.Sequential(nn.Conv1d(2, 8, 5, bias=False), nn.BatchNorm1d(8), nn.SiLU()), data=_sound(1)),
        _sound(1),
    ),
    "volumes": lambda: (
        trained(nn.Sequential(nn.Conv3d(1, 4, 3, bias=False), nn.BatchNorm3d(4), nn.ReLU()), data=_volumes(1)),
        _volumes(1),
    ),
    "TensorFlow's settings": lambda: (trained(Net(_tensorflow_settings), updates=600), batches()),
    "frozen": lambda: (_frozen(), batches()),
    "averaged with buffers": lambda: (_averaged(), batches()),
    "a shuffled loader": lambda: (trained(), loader(images(), 32, shuffle=True, drop_last=True)),
    "transposed and grouped": lambda: (
        trained(nn.Sequential(nn.ConvTranspose2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6), nn.GELU())),
        batches(),
    ),
    "no affine": lambda: (trained(Net(lambda c: nn.BatchNorm2d(c, affine=False))), batches()),
    "double": lambda: (trained().double(), [x.double() for x in batches()]),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_has_no_error_and_no_warning(name):
    model, data = HEALTHY[name]()
    diagnosis = examine(model, data)
    assert [(f.code, f.layer, f.measured) for f in diagnosis.at_least(Severity.WARNING)] == []
    assert len(diagnosis.checked) >= 35


@pytest.mark.parametrize("name", HEALTHY)
def test_the_file_of_a_healthy_model_has_no_error_and_no_warning(name, tmp_path):
    torch.save(HEALTHY[name]()[0].state_dict(), tmp_path / "model.pt")
    diagnosis = examine(tmp_path / "model.pt")
    assert [(f.code, f.layer, f.measured) for f in diagnosis.at_least(Severity.WARNING)] == []
    assert diagnosis.layers


@pytest.mark.slow
def test_what_could_not_be_checked_says_why(tmp_path):
    diagnosis = examine(trained())
    assert "needs data" in diagnosis.not_checked["BN116"]
    assert set(diagnosis.checked) | set(diagnosis.not_checked) == set(RULES)
    assert examine(**bn501(tmp_path)).data == "256 examples in 8 batches"
