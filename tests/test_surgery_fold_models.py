"""fold on whole models: what is reported, kept, stored and undone, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fingerprint import fingerprint
from surgery_checks import ResNet, image, trained
from test_surgery_fold import quiet, settled
from torch import nn

import batchnorm as bn
from batchnorm.surgery import Partner, convert, fold, foldable, revert, unfold
from batchnorm.surgery.folding_placeholder import FoldedAway


def net() -> tuple[nn.Module, torch.Tensor]:
    x = image()
    return trained(ResNet(), x), x


def close(folded: nn.Module, model: nn.Module, x: torch.Tensor, *, depth: int = 10) -> None:
    """Ten layers, each of up to 54 terms and each with relative errors of eps sqrt(54) in what it gets and makes."""
    model = copy.deepcopy(model).eval()
    expected = model(x)
    gap = (folded(x) - expected).abs().max()
    assert gap <= torch.finfo(x.dtype).eps * 54**0.5 * depth * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("prepared", ["torch", "ours", "fused", "fused to save memory", "frozen", "float64"])
def test_a_residual_network(prepared):
    model, x = net()
    if prepared == "float64":
        model, x = model.double(), x.double()
    if prepared == "frozen":
        bn.freeze(model)
    if prepared == "ours":
        model = convert(model)
    if prepared.startswith("fused"):
        model = convert(model, fuse=True, example=x, memory="save" if "save" in prepared else None)
    before = copy.deepcopy(model.state_dict())
    said: list = []
    folded = fold(model, x, report=said.append)
    assert not bn.find(folded)
    close(folded, model, x)
    assert str(said[0]).startswith("folded 10 of 10 batch norm layers; outputs differ by at most ")
    assert said[0].layers["layer2.0.downsample.1"] == Partner("layer2.0.downsample.0", "before")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    back = unfold(folded).eval()
    assert list(back.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), back.state_dict().values(), strict=True))
    assert torch.equal(back(x), copy.deepcopy(model).eval()(x))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]


def test_the_largest_difference_is_what_is_reported():
    model, x = net()
    said: list = []
    folded = fold(model, x, report=said.append)
    expected = model.eval()(x)
    assert said[0].error == (folded(x) - expected).abs().max().item() > 0
    assert said[0].largest == expected.abs().max().item()


def test_the_report_is_printed_with_what_was_left(capsys):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6))
    fold(model, torch.randn(2, 3, 5, 5))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("folded 1 of 2 batch norm layers; outputs differ by at most")
    assert second == ("  left '3': no convolution or linear layer is next to it: '2' before it, the output behind it")


class Plain(nn.Module):
    """The same architecture without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 4, 1, bias=False)
        self.bn2, self.bn1 = settled(nn.BatchNorm2d(4)), settled(nn.BatchNorm2d(6))

    def forward(self, x):
        return self.bn2(self.b(F.relu(self.bn1(self.a(x)))))


def test_the_state_dict_is_that_of_the_architecture_without_batch_norm():
    x = torch.randn(2, 3, 5, 5)
    folded = quiet(Normed(), x)
    plain = Plain()
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(plain(x), folded(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_folded_model_is_copied_and_stored_with_its_way_back(kind):
    model, x = net()
    folded = quiet(convert(model, fuse=True, example=x), x)
    copied = copy.deepcopy(folded) if kind == "deepcopy" else pickle.loads(pickle.dumps(folded))
    assert torch.equal(copied(x), folded(x))
    unfold(copied, inplace=True)
    assert len(bn.find(copied)) == 10
    assert not bn.find(folded)
    close(copied, model, x)


@pytest.mark.slow
def test_a_folded_model_is_compiled_and_exported():
    model, x = net()
    folded = quiet(convert(model, fuse=True, example=x), x)
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(folded, (x,))
    expected = folded(x)
    for got in (compiled(x), exported.module()(x)):
        assert (got - expected).abs().max() <= torch.finfo(x.dtype).eps * 54**0.5 * 10 * expected.abs().max()
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)


def test_in_train_mode_a_folded_layer_goes_on_by_its_stored_statistics():
    x = torch.randn(2, 3, 5, 5)
    folded = quiet(nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6))), x)
    assert torch.equal(folded.train()(x), folded.eval()(x))
    assert unfold(folded.train())[1].training
    assert not unfold(folded.eval())[1].training


def test_what_was_kept_is_cast_with_the_model():
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6)))
    back = unfold(quiet(model, x).double())
    assert back.eval()(x.double()).dtype == torch.float64
    assert torch.equal(back[0].weight, model[0].weight.double())
    assert back[1].running_mean.dtype == torch.float64


def test_revert_of_a_fused_and_folded_model_gives_activations_back_once():
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6)), nn.SiLU()).eval()
    folded = revert(quiet(convert(model, fuse=True), x))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(folded[2]) is nn.SiLU
    back = revert(unfold(folded))
    assert torch.equal(back(x), model(x))
    assert type(back[1]) is nn.BatchNorm2d


def test_in_place_parameters_stay_the_same_objects():
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), settled(nn.BatchNorm2d(6)))
    weight, before = model[0].weight, copy.deepcopy(model)
    assert fold(model, x, inplace=True, report=None) is model
    assert model[0].weight is weight
    assert isinstance(model[1], FoldedAway)
    assert str(model[1]).endswith("folded into '0')")
    assert unfold(model, inplace=True) is model
    assert model[0].weight is weight
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_model_without_batch_norm_is_copied():
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3)), torch.randn(2, 3, 5, 5)
    assert torch.equal(quiet(model, x)(x), model(x))
    assert str(unfold(model)) == str(model)
    assert foldable(model) == {}


def test_nothing_is_left_of_looking_at_a_model():
    model, x = net()
    before = fingerprint(model)
    assert foldable(model) == foldable(model, x)
    assert fingerprint(model) == before


# --- refusals -------------------------------------------------------------------------------------------------


class ReadsTheLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(x)) / self.bn.num_features


class ReturnsNothing(nn.Sequential):
    def forward(self, x):
        return str(super().forward(x))


def test_errors_say_what_to_do():
    x = torch.randn(2, 3, 5, 5)
    pair = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match=r"fold needs an nn\.Module, got str"):
        fold("model", x)
    with pytest.raises(TypeError, match=r"an nn\.Module, got str"):
        foldable("model")
    with pytest.raises(TypeError, match=r"unfold needs an nn\.Module, got str"):
        unfold("model")
    with pytest.raises(ValueError, match=r"fold needs an example on which the model runs in eval mode.*3 channels"):
        fold(pair, torch.randn(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"before torch\.compile, got a compiled one"):
        fold(torch.compile(pair, backend="eager"), x)
    with pytest.raises(ValueError, match="whose results can be compared, got str"):
        fold(ReturnsNothing(nn.Conv2d(3, 6, 3)), x)
    with pytest.raises(ValueError, match=r"runs without its batch norm layers, got AttributeError"):
        fold(ReadsTheLayer(), x)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_could_not_be_folded_is_as_before(inplace):
    x, model = torch.randn(2, 3, 5, 5), ReadsTheLayer()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="runs without"):
        fold(model, x, inplace=inplace)
    assert type(model.bn) is nn.BatchNorm2d
    assert torch.equal(model(x), before(x))
    assert model.training


def test_weights_that_lose_all_digits_are_an_error():
    """A mean of 1e6 standard deviations: what is left of an output is rounding, folded or not."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, eps=1e-30))
    with torch.no_grad():
        model[0].bias.fill_(1e3)
        model[1].running_mean.fill_(1e3)
        model[1].running_var.fill_(1e-8)
        model[0].weight.mul_(1e-5)
    with pytest.raises(ValueError, match=r"outputs that differ by .*, where rounding explains .*recalibrate the model"):
        fold(model, torch.randn(2, 3, 5, 5))


def test_a_wrong_fold_is_found_by_the_comparison(monkeypatch):
    from batchnorm.surgery.folding import fold_and_unfold

    right = fold_and_unfold.plan
    monkeypatch.setattr(fold_and_unfold, "plan", lambda *args: ({"1": Partner("0", "behind")}, right(*args)[1]))
    model = nn.Sequential(nn.Conv2d(6, 6, 1), settled(nn.BatchNorm2d(6)))
    with pytest.raises(ValueError, match="outputs that differ by"):
        fold(model, torch.randn(2, 6, 5, 5))
