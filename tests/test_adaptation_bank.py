"""DomainBank: statistics by name, switched and stored bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import batchnorm as bn
from batchnorm.adaptation.bank import FILE


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), bn.BatchNorm2d(2)).eval()


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def night() -> list[torch.Tensor]:
    return [0.1 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 1]


def test_adding_leaves_the_model_as_it_is_and_using_switches_bit_for_bit(model):
    before = bits(model)
    bank = bn.DomainBank(model)
    bank.add("night", night())
    assert bits(model) == before
    assert bank.current == "stored"
    bank.use("night")
    assert bank.current == "night"
    assert torch.equal(model[1].running_mean, bank["night"].mean["1"])
    bank.use("stored")
    assert bits(model) == before


def test_a_domain_is_what_adapt_measures_from_the_stored_statistics(model):
    bank = bn.DomainBank(model)
    bank.add("night", night())
    bank.use("night")
    bank.add("dusk", night(), prior=16)  # not from the night's, which are in use
    assert bank.current == "night"
    bank.use("stored")
    bn.adapt(model, night(), prior=16)
    assert bank.current == "dusk"


def test_using_goes_back_to_what_was_before_also_on_exceptions(model):
    bank = bn.DomainBank(model)
    bank.add("night", night())
    model[1].running_mean.fill_(0.123)  # no domain's
    before = bits(model)
    with pytest.raises(ZeroDivisionError), bank.using("night"):  # noqa: PT012 - what happens inside is tested
        assert bank.current == "night"
        raise ZeroDivisionError
    assert bits(model) == before
    assert bank.current is None


@pytest.mark.parametrize("damage", ["no tensor", "other shape", "other type", "no stored", "no names"])
def test_a_damaged_file_is_refused_and_the_bank_stays(model, tmp_path, damage):
    bank, path = bn.DomainBank(model), tmp_path / "a.bnbank.safetensors"
    bank.add("night", night())
    bank.save(path)
    about, tensors = FILE.read(path)
    if damage == "no tensor":
        del tensors["1/var/4"]
    elif damage == "other shape":
        tensors["1/mean/1"] = torch.zeros(1)
    elif damage == "other type":
        tensors["1/mean/1"] = tensors["1/mean/1"].double()
    elif damage == "no stored":
        about["names"] = ["dawn", "night"]
    else:
        del about["names"]
    FILE.write(path, about, tensors)
    with pytest.raises(ValueError, match=r"a.bnbank.safetensors is a damaged bank"):
        bank.load(path)
    assert list(bank) == ["stored", "night"]


def test_without_a_loader_what_is_in_use_is_kept(model):
    bank = bn.DomainBank(model)
    with bn.adapted(model, night()):
        bank.add("as adapted")
    bank.use("as adapted")
    bank.add("again", night())
    assert torch.equal(bank["as adapted"].var["4"], bank["again"].var["4"])


def test_names_removal_and_the_way_back(model):
    bank = bn.DomainBank(model)
    bank.add("night", night())
    assert list(bank) == ["stored", "night"]
    assert len(bank) == 2
    assert "night" in bank
    del bank["night"]
    assert "night" not in bank
    with pytest.raises(ValueError, match="the stored statistics cannot be removed"):
        bank.remove("stored")
    with pytest.raises(KeyError, match="no domain 'night', there are stored"):
        bank.use("night")
    with pytest.raises(KeyError, match="no domain 'night'"), bank.using("night"):
        pass
    with pytest.raises(ValueError, match="a name of its own, got 'stored' again"):
        bank.add("stored", night())
    with pytest.raises(ValueError, match="text of at least one character, got ''"):
        bank.add("", night())


def test_a_domain_that_cannot_be_measured_is_not_added(model):
    bank = bn.DomainBank(model)
    before = bits(model)
    with pytest.raises(ValueError, match="at least one batch"):
        bank.add("night", [])
    assert list(bank) == ["stored"]
    assert bits(model) == before


def test_a_file_brings_every_domain_back_bit_for_bit(model, tmp_path):
    bank = bn.DomainBank(model)
    bank.add("night / Ü", night())
    path = tmp_path / "model.bnbank.safetensors"
    bank.save(path)
    bank.use("night / Ü")  # another bank is made while these are in use
    other = bn.DomainBank(model).load(path)
    assert list(other) == ["stored", "night / Ü"]
    assert other.current == "night / Ü"
    other.use("stored")
    assert bank.current == "stored"


def test_files_of_other_weights_and_other_files_are_refused(model, tmp_path):
    path = tmp_path / "model.bnbank.safetensors"
    bn.DomainBank(model).save(path)
    model[0].weight.data[0] += 1
    with pytest.raises(ValueError, match="belongs to the weights that it was made with"):
        bn.DomainBank(model).load(path)
    with pytest.raises(ValueError, match=r"a bank needs a file that ends in .bnbank.safetensors, got 'x'"):
        bn.DomainBank(model).save(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        bn.DomainBank(model).load(tmp_path / "missing.bnbank.safetensors")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a bank"):
        bn.DomainBank(model).load(path)
    save_file({"x": torch.zeros(1)}, path, {"batchnorm.bank": json.dumps({"version": 99})})
    with pytest.raises(ValueError, match="is not a bank of version 1"):
        bn.DomainBank(model).load(path)


def test_the_digest_covers_gamma_but_not_the_statistics(model, tmp_path):
    path = tmp_path / "model.bnbank.safetensors"
    bn.DomainBank(model).save(path)
    model[1].running_mean.fill_(9)
    model[1].num_batches_tracked.fill_(9)
    bn.DomainBank(model).load(path)
    model[1].weight.data.fill_(9)
    with pytest.raises(ValueError, match="belongs to the weights"):
        bn.DomainBank(model).load(path)


def test_a_model_without_layers_has_no_domains():
    with pytest.raises(ValueError, match="DomainBank needs batch norm layers that store statistics"):
        bn.DomainBank(nn.Linear(1, 1))
