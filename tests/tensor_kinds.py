"""Tensors of every kind that a model may hold: how to make one, how to write into it, and its bits to compare."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Callable


class WithFunctions(Tensor):
    """A subclass that only adds to torch's functions."""


class WithDispatch(Tensor):
    """A subclass with memory of its own that answers every operator itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch._C._DisableTorchDispatch():
            return function(*args, **(kwargs or {}))


class Pair(Tensor):
    """A wrapper around two tensors, which answers no operator at all."""

    @staticmethod
    def __new__(cls, a, b):
        return Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a, b):
        self.a, self.b = a, b

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


class FlatPair(Pair):
    """The same, taken apart as torch's compilers do it."""

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return FlatPair(inner["a"], inner["b"])


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def of_inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


KINDS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.ones(3),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.ones(0, 3),
    "bool": lambda: torch.ones(3).bool(),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "uint2": lambda: torch.ones(3, dtype=torch.uint8).view(torch.uint2),
    "float4": lambda: torch.ones(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "complex32": lambda: torch.ones(3, dtype=torch.complex32),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "strided view": lambda: torch.arange(6.0)[::2],
    "expanded": lambda: torch.ones(1).expand(3),
    "overlapping": lambda: torch.ones(5).as_strided((3, 3), (1, 1)),
    "of numpy": lambda: torch.from_numpy(torch.ones(3).numpy().copy()),
    "of inference": of_inference,
    "freed": lambda: freed(torch.ones(3)),
    "freed parameter": lambda: freed(nn.Parameter(torch.ones(3))),
    "lazy": nn.UninitializedParameter,
    "lazy buffer": nn.UninitializedBuffer,
    "meta": lambda: torch.ones(3, device="meta"),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "csc": lambda: torch.eye(3).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "mkldnn": lambda: torch.ones(3, 3).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "quantized by channel": lambda: torch.quantize_per_channel(
        torch.ones(3, 2), torch.full((3,), 0.1), torch.zeros(3).long(), 0, torch.qint8
    ),
    "quantized by float": lambda: torch.quantize_per_channel(
        torch.ones(3, 2), torch.full((3,), 0.1), torch.zeros(3), 0, torch.quint8
    ),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "masked": lambda: torch.masked.masked_tensor(torch.ones(3), torch.ones(3).bool()),
    "with functions": lambda: torch.ones(3).as_subclass(WithFunctions),
    "with dispatch": lambda: Tensor._make_subclass(WithDispatch, torch.ones(3)),
    "pair": lambda: Pair(torch.ones(3), torch.ones(3)),
    "flat pair": lambda: FlatPair(torch.ones(3), torch.ones(3)),
}


def made(kind: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most kinds are prototypes
        return KINDS[kind]()


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Plain tensors that hold what a tensor of any kind says; none where it says nothing."""
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return []
    if isinstance(tensor, Pair):
        return [tensor.a, tensor.b]
    if hasattr(tensor, "_masked_data"):
        return [tensor._masked_data, tensor._masked_mask]
    if tensor.layout == torch.jagged:
        return [tensor.values(), tensor.offsets()]
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr}:
        return [tensor.values()]
    if tensor.layout != torch.strided:
        return [tensor.to_dense()]
    if tensor.is_quantized:
        return [tensor.int_repr()]
    absent = tensor.is_meta or torch._is_functional_tensor(tensor) or type(tensor).__name__ == "FakeTensor"
    if absent or (tensor.numel() and not tensor.untyped_storage().nbytes()):
        return []
    return [tensor.detach()] if tensor.dtype not in _PACKED else [bytes_of(tensor)]


_PACKED = {torch.uint2, torch.float4_e2m1fn_x2}


def bytes_of(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def write_sevens(tensor: Tensor) -> None:
    """Change what a tensor says, in place, as far as it says anything."""
    if not plain_parts(tensor):
        return
    with torch.no_grad(), torch.inference_mode(tensor.is_inference()):
        if tensor.is_quantized or tensor.itemsize == 1:
            if tensor.dtype in _PACKED or tensor.is_quantized:
                bytes_of(tensor).fill_(7)
            else:
                tensor.view(torch.uint8).fill_(0)
        elif tensor.layout == torch._mkldnn:
            tensor.mul_(7)
        else:
            for part in plain_parts(tensor)[:1] if tensor.layout != torch.sparse_coo else [tensor._values()]:
                part[:1].fill_(7) if part.ndim and part.stride()[:1] == (0,) else part.fill_(7)
