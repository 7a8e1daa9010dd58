"""Tensors as memory: whether a tensor's values can be read here, copies of them, and comparison bit for bit.

A tensor may have no values to read: its memory was freed until needed (FSDP, offloading), its values are on other
ranks, or it never had values (meta, fake, lazy, inside a transform of torch.func). In some cases reading the tensor
ends the process, so every tensor is checked first.
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
# an integer type for every element size: NaN equals itself only as bits
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER = "Use its full_tensor(), FSDP.summon_full_params(model), or a model that was loaded from a full state dict"


class AbsenceError(ValueError):
    """A tensor's values were needed but cannot be read."""


def absence(tensor: Tensor) -> str:
    """Why a tensor's values cannot be read here, with a remedy, as the end of a sentence; "" if they can."""
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
    """Why a tensor has no values, worded as in ``absence``; "" if it has values, here or on other ranks."""
    if _surely_has_values(tensor) or is_lazy(tensor):
        return ""
    if _is_transformed(tensor):
        return "is inside a transform of torch.func. Do this outside of it"
    if is_fake(tensor):
        return "is fake and has no numbers. Make it outside of FakeTensorMode"
    if tensor.is_meta:
        return "is on the meta device and has no numbers. Load its values first, or offload without buffers"
    if not is_distributed(tensor) and is_freed(tensor):
        return f"has given its memory back. {_GATHER}, or load the tensor back from where it was offloaded"
    return ""


def _surely_has_values(tensor: Tensor) -> bool:
    """Whether a tensor of a usual kind certainly has values; a fast check, whose result False decides nothing."""
    if type(tensor) not in _USUAL or tensor.layout is not torch.strided:
        return False
    try:
        return bool(tensor.data_ptr()) and tensor.untyped_storage().nbytes() >= tensor.nbytes
    except RuntimeError:  # inside of a transform
        return False


def whole(tensor: Tensor, size: int | None = None) -> Tensor | None:
    """A tensor's values as a plain dense tensor without gradient, copied only if necessary; None if they are absent.

    Also None if the number of values is not ``size``. No other rank is involved. A sharded tensor is whole if each rank
    holds all of it.

    Args:
        tensor: A tensor of any kind.
        size: Number of elements of the whole tensor; None if unknown. FSDP1 leaves only a rank's part in a tensor.
    """
    if absence(tensor) or (size is not None and tensor.numel() != size):
        return None
    if is_distributed(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    memory = memory_of(tensor)
    if memory.is_quantized:
        return memory.dequantize()
    return memory if memory.layout == torch.strided else memory.to_dense()


def digest_of(tensors: Mapping[str, object], bare: Container[str] = ()) -> str:
    """SHA-256 of tensors: names, types, shapes and bits; of a sharded tensor only the bits that are on this rank.

    Args:
        tensors: A state_dict, in its order. Tensors without values count without bits, other values by name only.
        bare: Names of tensors whose bits do not count.
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
            # a copy: memory shared with NumPy can never be freed again, as FSDP does in every pass
            digest.update(flat.view(torch.uint8).clone().numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _readable_parts(tensor: Tensor) -> list[Tensor]:
    if (plain := whole(tensor)) is not None:
        return [plain]
    return list(chain.from_iterable(map(_readable_parts, parts_of(tensor))))


def require(tensors: Mapping[str, Tensor | None], who: str) -> None:
    """Refuse tensors whose values are absent.

    Args:
        tensors: Tensors by their names in messages; None is skipped.
        who: The caller that needs the tensors, in messages.

    Raises:
        AbsenceError: A ValueError, if a tensor's values cannot be read here.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (why := absence(tensor)):
            raise AbsenceError(f"{who} needs the numbers of {name!r}, got a tensor that {why}.")


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor with a shape has less memory than its elements need."""
    if not has_memory(tensor):
        return False
    memory = memory_of(tensor)
    if memory.is_meta or not _has_storage(memory) or not (needed := _bytes_needed(memory)):
        return False
    return memory.untyped_storage().nbytes() < needed or not memory.data_ptr()


def storage_size(tensor: Tensor) -> int | None:
    """Bytes of the memory that a tensor uses or views; None if it has no usual memory."""
    memory = memory_of(tensor)
    return memory.untyped_storage().nbytes() if _has_storage(memory) else None


def resize_storage(tensor: Tensor, size: int | None) -> None:
    """Free a tensor's memory, or allocate it again without its contents; nothing happens if ``size`` is None."""
    if size is not None and storage_size(tensor) != size:
        memory_of(tensor).untyped_storage().resize_(size)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has memory of its own, freed or not; fake tensors and wrappers of other tensors have none."""
    return not (_is_transformed(tensor) or is_fake(tensor) or _is_made_of_others(tensor))


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors inside a wrapper tensor, such as the local part of a sharded tensor."""
    if _is_transformed(tensor) or not is_traceable_wrapper_subclass(tensor):
        return []
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = [getattr(tensor, name) for name in names]
    return [part for part in parts if isinstance(part, Tensor)]  # a sharded tensor also names its mesh


def memory_of(tensor: Tensor) -> Tensor:
    """An alias of a tensor without gradient and subclass, because lazy tensors raise errors in most functions."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():
        return tensor.data


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors show the same elements of the same memory, freed or not."""
    if a.layout != b.layout or a.dtype != b.dtype or a.device != b.device or a.is_nested != b.is_nested:
        return False
    if a.is_nested:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    if not _has_storage(a):
        return a.shape == b.shape
    at = [(t.shape, t.stride(), t.storage_offset(), t.untyped_storage()._cdata) for t in (a, b)]
    return at[0] == at[1]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape, device and bits; False if memory is absent.

    On the meta device no bits differ.
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
    """A tensor to copy and compare: the memory itself, or all its bytes if torch has no functions for its kind."""
    if memory.is_meta or not (memory.is_quantized or memory.is_nested or memory.dtype in _PACKED):
        return memory
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.untyped_storage())


def write(tensor: Tensor, value: Tensor) -> None:
    """Write values into a tensor in place, through the tensor itself, so that graphs that used it notice."""
    for axis in _repeated_axes(tensor):
        tensor, value = tensor.narrow(axis, 0, 1), value.narrow(axis, 0, 1)
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(value)


def _repeated_axes(tensor: Tensor) -> list[int]:
    """Axes along which ``expand`` repeats the same elements."""
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
# types of which torch can copy only the bytes, such as those with several elements per byte
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
    """Bytes from the start of a tensor's storage to its last element; elements of less than a byte count as a byte."""
    if tensor.is_nested:
        return tensor.numel() * tensor.itemsize
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize


def _is_transformed(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor represents another tensor in a trace, and never had values."""
    kinds: list[type | None] = [
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
        except RuntimeError:  # "invalid python storage": the tensor never had a storage
            return True
    return False


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is torch's DTensor, of which each rank holds a part or a copy."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def _is_whole_here(tensor: Any) -> bool:
    alone = tensor.device_mesh.size() == 1
    return not is_freed(tensor.to_local()) and (alone or all(part.is_replicate() for part in tensor.placements))
