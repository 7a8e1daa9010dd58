"""Tensors of all kinds: what can be read is read, what cannot is named, and no look ends the process."""

from __future__ import annotations

import warnings

import forked
import pytest
import torch
from tensor_kinds import KINDS, freed, made, plain_parts, write_sevens
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

from batchnorm import preserve_state
from batchnorm.population.tensor_memory import absence, require, same_bits, whole

KIND_NAMES = sorted(KINDS)
ABSENT = {
    "freed": "has given its memory back",
    "freed parameter": "has given its memory back",
    "lazy": "has no shape yet",
    "lazy buffer": "has no shape yet",
    "meta": "is on the meta device",
    "fake": "is fake",
    "functional": "is inside a transform",
    "jagged": "is a NestedTensor, which keeps its numbers in parts",
    "masked": "is a MaskedTensor, which keeps its numbers in parts",
    "pair": "is a Pair, which keeps its numbers in parts",
    "flat pair": "is a FlatPair, which keeps its numbers in parts",
}


def holding(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    if isinstance(tensor, nn.Parameter):
        model.tensor = tensor
    else:
        model.register_buffer("tensor", tensor)
    return model


def bits(tensor: torch.Tensor) -> list:
    return [(part.dtype, tuple(part.shape), part.clone()) for part in plain_parts(tensor)]


def same(before: list, now: list) -> bool:
    def raw(part: torch.Tensor) -> torch.Tensor:
        part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part.resolve_neg()
        return part.contiguous().view(torch.uint8) if part.ndim else part

    pairs = zip(before, now, strict=True)
    return len(before) == len(now) and all(a[:2] == b[:2] and torch.equal(raw(a[2]), raw(b[2])) for a, b in pairs)


@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("tool", ["nothing", "write", "replace"])
def test_a_look_at_a_tensor_of_any_kind_leaves_it_as_it_was(kind, tool):
    tensor = made(kind)
    model, before, size = holding(tensor), bits(tensor), memory_size(tensor)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(ComplexHalf|[Qq]uantiz|masked|[Nn]ested|prototype|Sparse)")
        with preserve_state(model):
            if tool == "write":
                write_sevens(tensor)
                assert not before or not tensor.numel() or not same(before, bits(tensor)), "the tool wrote nothing"
            elif tool == "replace":
                del model.tensor
                model.tensor = torch.zeros(5)
        assert model.tensor is tensor
        assert same(before, bits(tensor))
    assert memory_size(tensor) == size


def memory_size(tensor: torch.Tensor) -> int | None:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage().nbytes() if torch._C._has_storage(tensor) else None


OWN = ["plain", "parameter", "strided view", "expanded", "overlapping", "conjugate", "nested", "with dispatch"]


@pytest.mark.parametrize("kind", [*OWN, "quantized", "float4", "of inference"])
def test_memory_that_is_given_back_inside_the_block_is_there_again_with_the_same_bits(kind):
    tensor = made(kind)
    model, before = holding(tensor), bits(tensor)
    with preserve_state(model):
        freed(tensor)
    assert same(before, bits(tensor))


def test_memory_that_is_fetched_inside_the_block_is_given_back_again():
    tensor = made("freed")
    with preserve_state(holding(tensor)):
        tensor.untyped_storage().resize_(12)
        tensor.fill_(3)
    assert tensor.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("kind", ["plain", "parameter", "freed", "freed parameter", "strided view", "with functions"])
def test_other_memory_put_under_a_tensor_is_taken_away_again(kind):
    """Offloading does so: parameter.data = parameter.data.to(device)."""
    tensor = made(kind)
    model, at, before = holding(tensor), tensor.untyped_storage()._cdata, bits(tensor)
    with preserve_state(model):
        tensor.data = torch.zeros(3)
    assert tensor.untyped_storage()._cdata == at
    assert same(before, bits(tensor))


def test_views_of_one_storage_are_restored_together():
    flat = torch.arange(6.0)
    model = nn.Module()
    for i in range(3):
        model.register_buffer(f"part{i}", flat[2 * i : 2 * i + 2])
    with preserve_state(model):
        flat.fill_(7)
        flat.untyped_storage().resize_(0)
    assert flat.equal(torch.arange(6.0))
    assert model.part1.data_ptr() == flat[2:].data_ptr()


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_numbers_that_are_absent_are_said_to_be_and_why(kind):
    tensor = made(kind)
    said = absence(tensor)
    assert said.startswith(ABSENT.get(kind, "")), said
    assert bool(said) == (kind in ABSENT)
    if said:
        assert whole(tensor) is None
        with pytest.raises(ValueError, match=r"^fold needs the numbers of 'a.weight', got a tensor that "):
            require({"b": torch.ones(1), "a.weight": tensor, "c": None}, "fold")


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(ABSENT) - {"uint2", "float4", "nested"}))
def test_a_whole_tensor_is_plain_and_dense(kind):
    got = whole(made(kind))
    assert type(got) is torch.Tensor
    assert got.layout == torch.strided
    assert not got.requires_grad
    assert not got.is_quantized


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_two_tensors_are_compared_without_ending_the_process(kind):
    known = kind not in ABSENT or kind in {"meta", "lazy", "lazy buffer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same_bits(made(kind), made(kind)) is known
    assert not same_bits(made(kind), torch.ones(7, 7))


def test_a_model_inside_of_a_transform_can_be_looked_at():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(8, 3)
    parameters, buffers = stack_module_state([model] * 3)

    def loss(parameters, buffers):
        with torch.nn.utils.stateless._reparametrize_module(model, {**parameters, **buffers}), preserve_state(model):
            return model(x).square().sum()

    def plain(parameters, buffers):
        return functional_call(model, {**parameters, **buffers}, (x,)).square().sum()

    looked, expected = (vmap(grad(each))(parameters, buffers) for each in (loss, plain))
    assert all(torch.equal(looked[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_process_survives_a_look_at_memory_that_is_given_back():
    code = (
        "import torch, batchnorm as bn; from torch import nn\n"
        "m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))\n"
        "with bn.preserve_state(m): m[0].weight.untyped_storage().resize_(0)\n"
        "m(torch.ones(2, 3))"
    )
    assert forked.run(code).returncode == 0
