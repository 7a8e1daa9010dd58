"""Replacements for the torch functions that rebuild tensors in a pickle: views of storages, or unreadable tensors.

An unreadable tensor has the reason why it cannot be read.
"""

from __future__ import annotations

from dataclasses import replace

from batchnorm.checkpoint.file_tensors import BYTES, Storage, Tensor, unreadable
from batchnorm.checkpoint.pickled.name import Name, in_words
from batchnorm.checkpoint.pickled.unknown_classes import Object, Opaque, Saved
from batchnorm.checkpoint.refusal import RefusalError, brief

_SHARDED_CLASSES = {"DTensor", "ShardedTensor", "LocalTensor"}
_SAVE_WHOLE = (
    "Save whole tensors: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict, or tensor.full_tensor() for each."
)


def tensor(base: object, offset: Saved, size: Saved, stride: Saved, *rest: object) -> Tensor:
    """A view of a storage; unreadable if the flag "neg" is set, because then the stored signs are flipped.

    ``rest`` is requires_grad, hooks, and a dict of flags, which may be missing.
    """
    if not isinstance(base, Storage) or not isinstance(size, tuple | list) or not isinstance(stride, tuple | list):
        raise RefusalError("a tensor's storage, size and stride", f"{brief(base)}, {brief(size)} and {brief(stride)}")
    view = Tensor(base, base.dtype, offset=offset, size=tuple(size), stride=tuple(stride), why=_flipped(*rest[2:3]))
    is_empty = not base.numel and view.numel
    return replace(view, why=f"a tensor whose memory was freed before saving. {_SAVE_WHOLE}") if is_empty else view


def _flipped(flags: object = None) -> str:
    """Why a tensor with these flags cannot be read; "" if it can."""
    is_flipped = isinstance(flags, dict) and flags.get("neg")
    return "stored with all signs flipped. Save tensor.resolve_neg()." if is_flipped else ""


def tensor_v3(base: Saved, offset: Saved, size: Saved, stride: Saved, *rest: Saved) -> Tensor:
    """A view in a type that has no storage class.

    ``rest`` is requires_grad, hooks, dtype, and a dict of flags, which may be missing; they are as in ``tensor``.
    """
    view = tensor(base, offset, size, stride, *rest[:2], *rest[3:4])
    if len(rest) < 3 or not isinstance(rest[2], Name) or rest[2].dtype not in BYTES:
        raise RefusalError("a tensor's type", brief(rest[2]) if len(rest) > 2 else "none")
    return replace(view, dtype=rest[2].dtype)


def local_part(tensor: Saved, kind: object, state: object) -> Saved:
    """The tensor of a subclass (such as DTensor), or its local tensor if that has the whole tensor.

    If the local tensor is only a part, or one term of a sum over devices, the tensor is returned as unreadable, and its
    reason says so.
    """
    local = _attributes(state).get("_local_tensor")
    if not isinstance(tensor, Tensor) or not tensor.why or not isinstance(local, Tensor):
        return tensor
    placements = _attributes(_attributes(state).get("_spec")).get("placements")
    partial = [value for value in placements if _is_partial(value)] if isinstance(placements, tuple) else []
    if local.size == tensor.size and not partial:
        return local
    numbers = f"only {local.shape} of the {tensor.shape} numbers of a"
    part = "one term of the sum that makes up a" if partial else numbers
    return replace(tensor, why=f"{part} {_last(kind)}. {_SAVE_WHOLE}")


def _attributes(state: object) -> dict[Saved, Saved]:
    """The attributes in an object's state.

    The state is a dict, or a pair of dicts, the second for slots; for any other state the result is {}.
    """
    if isinstance(state, tuple):
        return {name: value for part in state[:2] if isinstance(part, dict) for name, value in part.items()}
    return state if isinstance(state, dict) else {}


def _is_partial(placement: object) -> bool:
    return isinstance(placement, Object) and placement.name.endswith("Partial")


def _last(kind: object) -> str:
    return kind.name.rpartition(".")[2] if isinstance(kind, Name) else "tensor subclass"


def wrapper(kind: object, dtype: object, size: Saved, *_: object) -> Tensor:
    """A tensor of a subclass that has no numbers itself."""
    remedy = _SAVE_WHOLE if _last(kind) in _SHARDED_CLASSES else "Save a plain tensor in its place."
    return _without_numbers(dtype, size, f"a {_last(kind)} without numbers of its own. {remedy}")


def meta(dtype: object, size: Saved, *_: object) -> Tensor:
    """A tensor on the meta device."""
    return _without_numbers(dtype, size, "on the meta device, without values. Load the weights, then save the model.")


def uninitialized(*_: object) -> Tensor:
    """A parameter or buffer of a lazy layer."""
    return unreadable("float32", (), "not initialized. Run one batch through the model, then save it.")


def sparse(_: object, data: Saved, *__: object) -> Tensor:
    """A sparse tensor."""
    size = next((part for part in reversed(data) if _is_size(part)), ()) if isinstance(data, tuple) else ()
    return unreadable("float32", tuple(size), "sparse. Save tensor.to_dense().")


def nested(*_: object) -> Tensor:
    """A nested tensor, whose parts have several lengths."""
    return unreadable("float32", (), "nested. Save a tensor for each of its parts.")


def quantized(base: object, _: object, size: Saved, *__: object) -> Tensor:
    """A quantized tensor."""
    dtype = base.dtype if isinstance(base, Storage) else "quint8"
    return unreadable(dtype, tuple(size) if _is_size(size) else (), "quantized. Save tensor.dequantize().")


def _without_numbers(dtype: object, size: Saved, why: str) -> Tensor:
    if not isinstance(dtype, Name) or dtype.dtype not in BYTES or not _is_size(size):
        raise RefusalError("a tensor's type and size", f"{in_words(dtype)} and {brief(size)}")
    return unreadable(dtype.dtype, tuple(size), why)


def _is_size(value: object) -> bool:
    return isinstance(value, tuple | list) and all(type(length) is int for length in value)


def of_numpy(data: object, dtype: object, *_: object) -> Saved:
    """A tensor of a device that torch pickles as a NumPy array, such as XLA; an Opaque if it cannot be read.

    The tensor is float32 if NumPy lacks its type.
    """
    if not isinstance(data, Tensor) or not isinstance(dtype, Name) or dtype.dtype not in BYTES:
        return Opaque("a torch.Tensor pickled as a NumPy array", is_reported=True)
    return data
