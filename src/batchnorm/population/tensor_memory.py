"""Tensors as memory: whether the numbers of one can be read here, a copy of them, and whether two have the same bits.

A tensor may have no numbers to read: its memory was given back until it is needed (FSDP, offloading), they lie on other
ranks, or it stands for numbers that there are none of (meta, fake, lazy, inside a transform of torch.func). To read one
all the same ends the process in some of these cases, so it is asked first.
"""

from __future__ import annotations

import hashlib
import sys
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

_USUAL = {Tensor, torch.nn.Parameter}
# an integer type for every size of element: NaN is equal to itself only as bits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER = "Use its full_tensor(), FSDP.summon_full_params(model), or a model that was loaded from a full state dict"


class AbsenceError(ValueError):
    """The numbers of a tensor were needed where they cannot be read."""


def absence(tensor: Tensor) -> str:
    """Why a tensor's numbers cannot be read here, with what to do, as the end of a sentence; "" if they can."""
    if is_lazy(tensor):
        return "has no shape yet. Run a batch through the model first"
    if why := emptiness(tensor):
        return why
    if is_distributed(tensor):
        return "" if _is_whole_here(tensor) else f"is sharded over ranks. {_GATHER}"
    if _is_made_of_others(tensor):
        return f"is a {type(tensor).__name__}, which keeps its numbers in parts. Convert it to a plain tensor"
    return ""


def emptiness(tensor: Tensor) -> str:
    """Why there are no numbers in a tensor, as ``absence`` says it; "" if there are, here or on other ranks."""
    if _is_plainly_there(tensor) or is_lazy(tensor):
        return ""
    if _is_transformed(tensor):
        return "is inside a transform of torch.func. Ask outside of it"
    if is_fake(tensor):
        return "is fake and has no numbers. Use a model outside of FakeTensorMode"
    if tensor.is_meta:
        return "is on the meta device and has no numbers. Load its values first, or offload without buffers"
    if not is_distributed(tensor) and is_freed(tensor):
        return f"has given its memory back. {_GATHER}, or bring it back from where it was offloaded"
    return ""


def _is_plainly_there(tensor: Tensor) -> bool:
    """A quick answer for the usual tensor, of which a model has hundreds; False decides nothing."""
    if type(tensor) not in _USUAL or tensor.layout is not torch.strided:
        return False
    try:
        return bool(tensor.data_ptr()) and tensor.untyped_storage().nbytes() >= tensor.nbytes
    except RuntimeError:  # inside of a transform
        return False


def whole(tensor: Tensor, size: int | None = None) -> Tensor | None:
    """A tensor's numbers as a plain dense tensor without gradient, not copied where it is one; None if they are absent.

    No other rank is asked. A sharded tensor is whole where each rank holds all of it.

    Args:
        tensor: Of any kind.
        size: Elements that the whole has, where that is known: FSDP1 leaves a rank's part in the place of the whole.
    """
    if absence(tensor) or (size is not None and tensor.numel() != size):
        return None
    if is_distributed(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    memory = memory_of(tensor)
    if memory.is_quantized:
        return memory.dequantize()
    return memory if memory.layout == torch.strided else memory.to_dense()


def digest_of(tensors: Mapping[str, Any], bare: Container[str] = ()) -> str:
    """SHA-256 of tensors by name, type, shape and bits; of a sharded one this rank's part, of an absent one no bits.

    Args:
        tensors: A state_dict, in its order. What is no tensor counts by its name.
        bare: Names whose bits do not count.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            digest.update(name.encode())
            continue
        shape = "no shape" if is_lazy(tensor) else tuple(tensor.shape)
        digest.update(f"{name} {tensor.dtype} {shape}".encode())
        for part in () if name in bare else _readable_parts(tensor):
            flat = bits_of(part).cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            # a copy: memory that NumPy has seen can never be given back again, as FSDP does with every pass
            digest.update(flat.view(torch.uint8).clone().numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _readable_parts(tensor: Tensor) -> list[Tensor]:
    if (plain := whole(tensor)) is not None:
        return [plain]
    return list(chain.from_iterable(map(_readable_parts, parts_of(tensor))))


def require(tensors: Mapping[str, Tensor | None], who: str) -> None:
    """Refuse tensors whose numbers are absent.

    Args:
        tensors: By what they are called.
        who: Needs them.

    Raises:
        AbsenceError: If one of them cannot be read here; a ValueError.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (why := absence(tensor)):
            raise AbsenceError(f"{who} needs the numbers of {name!r}, got a tensor that {why}.")


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor with a shape has less memory than its elements take."""
    if not has_memory(tensor):
        return False
    memory = memory_of(tensor)
    if memory.is_meta or not _has_storage(memory) or not (needed := _bytes_needed(memory)):
        return False
    return memory.untyped_storage().nbytes() < needed or not memory.data_ptr()


def storage_size(tensor: Tensor) -> int | None:
    """Bytes of the memory that a tensor shows a part of; None if it has none of the usual kind."""
    memory = memory_of(tensor)
    return memory.untyped_storage().nbytes() if _has_storage(memory) else None


def resize_storage(tensor: Tensor, size: int | None) -> None:
    """Give memory back, or bring it back, without what was in it."""
    if size is not None and storage_size(tensor) != size:
        memory_of(tensor).untyped_storage().resize_(size)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is one of memory, given back or not; those that are fake or made of other tensors are none."""
    return not (_is_transformed(tensor) or is_fake(tensor) or _is_made_of_others(tensor))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that one is made of, such as the local part of a sharded one."""
    if _is_transformed(tensor) or not is_traceable_wrapper_subclass(tensor):
        return []
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    found = [getattr(tensor, name) for name in names]
    return [part for part in found if isinstance(part, Tensor)]  # a sharded one names its mesh too


def memory_of(tensor: Tensor) -> Tensor:
    """An alias without gradient and without the class of the tensor: lazy ones would not answer questions."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        return tensor.data


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory, freed or not."""
    if a.layout != b.layout or a.dtype != b.dtype or a.device != b.device or a.is_nested != b.is_nested:
        return False
    if a.is_nested:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    if not _has_storage(a):
        return a.shape == b.shape
    at = [(t.shape, t.stride(), t.storage_offset(), t.untyped_storage()._cdata) for t in (a, b)]
    return at[0] == at[1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape, device and bits; those whose memory is absent have not.

    On the meta device there are no bits that differ.
    """
    if not all(has_memory(t) and not is_freed(t) for t in (a, b)):
        return False
    a, b = memory_of(a), memory_of(b)
    if a.layout != b.layout or a.dtype != b.dtype or a.device != b.device or _shape(a) != _shape(b):
        return False
    if (whole_bytes := bits_of(a)) is not a:
        return torch.equal(whole_bytes, bits_of(b))
    if a.is_meta:
        return True
    if a.layout in _PARTS:
        return all(same_bits(getattr(a, name)(), getattr(b, name)()) for name in _PARTS[a.layout])
    a, b = (_with_bits(t if t.layout == torch.strided else t.to_dense()) for t in (a, b))
    return torch.equal(a, b)


def _shape(tensor: Tensor) -> object:
    return tensor._nested_tensor_size().tolist() if tensor.is_nested else tensor.shape


def bits_of(memory: Tensor) -> Tensor:
    """What to copy and compare of a tensor's memory: itself, or all its bytes where its kind has no such functions."""
    if memory.is_meta or not (memory.is_quantized or memory.is_nested or memory.dtype in _PACKED):
        return memory
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.untyped_storage())


def write(tensor: Tensor, value: Tensor) -> None:
    """Put numbers into a tensor in place, through the tensor itself: a graph that used it knows."""
    for axis in _repeated_axes(tensor):
        tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def _repeated_axes(tensor: Tensor) -> list[int]:
    """Axes along which ``expand`` shows the same elements again."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return []
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return [axis for axis, (size, stride) in enumerate(sizes) if size > 1 and stride == 0]


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
# several elements in a byte, or parts of one: nothing but their bytes can be copied
_PACKED = {
    getattr(torch, name)
    for name in (
        "float4_e2m1fn_x2",
        "bits1x8",
        "bits2x4",
        "bits4x2",
        "bits8",
        "bits16",
        *(f"{kind}{n}" for kind in ("int", "uint") for n in range(1, 8)),
    )
    if hasattr(torch, name)
}


def _with_bits(tensor: Tensor) -> Tensor:
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor.resolve_neg()
    return plain.view(_BITS[plain.itemsize])


def _has_storage(tensor: Tensor) -> bool:
    return torch._C._has_storage(tensor)


def _bytes_needed(tensor: Tensor) -> int:
    """From the start of its storage to its last element; sizes of elements below a byte are not told apart."""
    if tensor.is_nested:
        return tensor.numel() * tensor.itemsize
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize


def _is_transformed(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor stands for one in a trace, and never had numbers."""
    kinds: list[Any] = [
        getattr(sys.modules.get(module), kind, None)
        for module, kind in (
            ("torch._subclasses.fake_tensor", "FakeTensor"),
            ("torch._subclasses.functional_tensor", "FunctionalTensor"),
        )
    ]
    return isinstance(tensor, tuple(kind for kind in kinds if kind is not None))


def _is_made_of_others(tensor: Tensor) -> bool:
    if is_traceable_wrapper_subclass(tensor):
        return True
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if not _has_storage(tensor):
            return True
        try:
            tensor.untyped_storage().data_ptr()
        except RuntimeError:  # "invalid python storage": there never was any
            return True
    return False


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is torch's DTensor, of which each rank holds a part or a copy."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _is_whole_here(tensor: Any) -> bool:
    alone = tensor.device_mesh.size() == 1
    return not is_freed(tensor.to_local()) and (alone or all(part.is_replicate() for part in tensor.placements))
