"""Checks of a layer's settings, inputs, residual and state; every error says what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from batchnorm.argument_types import require_number, require_type, require_whole_number
from batchnorm.channel_axis import axis_of, shape_as_given

STATISTICS = ("running_mean", "running_var")
# the input shapes of each layer, by their number of axes
SHAPES: dict[str, dict[int, str]] = {
    "BatchNorm1d": {2: "(N, C)", 3: "(N, C, L)"},
    "BatchNorm2d": {4: "(N, C, H, W)"},
    "BatchNorm3d": {5: "(N, C, D, H, W)"},
}


class AnyBatchNorm(Protocol):
    """What messages say of a batch norm layer, of this package or of torch.nn."""

    num_features: int
    eps: float
    running_mean: Tensor | None


def promoted(layer: AnyBatchNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The input and the residual in a common type: the type of ``x + residual``.

    Raises:
        ValueError: If the residual is no tensor, or has another shape or device.
        TypeError: If the residual is neither floating-point nor complex, or is complex for a real input.
    """
    name = type(layer).__name__
    if not isinstance(residual, Tensor) or residual.shape != x.shape or residual.device != x.device:
        got = f"{tuple(residual.shape)} on {residual.device}" if isinstance(residual, Tensor) else type(residual)
        raise ValueError(
            f"{name} needs a residual of the input's shape {tuple(x.shape)} on {x.device}, got {got}. "
            "Expand the residual, or add it outside the layer."
        )
    if not (residual.is_floating_point() or residual.is_complex()):
        raise TypeError(f"{name} needs a floating-point residual, got {residual.dtype}. Call residual.float() first.")
    if residual.is_complex() and not x.is_complex():
        raise TypeError(
            f"{name} needs a real residual for an input of {x.dtype}, got {residual.dtype}. Add it outside."
        )
    if x.dtype == residual.dtype:
        return x, residual
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def about_a_single_value(layer: AnyBatchNorm, x: Tensor) -> str:
    """The text of the error for a batch ``x``, (N, C, ...), with one value per channel."""
    shape = shape_as_given(layer, x)
    advice = "or construct the layer with track_running_stats=True and call eval()."
    if layer.running_mean is not None:
        advice = "call eval(), or construct the layer with single_element='population'."
    return (
        f"{type(layer).__name__} needs more than 1 value per channel, got shape {tuple(shape)}: one value "
        f"has no variance. Use drop_last=True in the loader, {advice} In torch.nn's words: Expected more than 1 "
        f"value per channel when training, got input size {shape}"
    )


def about_few_counts(layer: AnyBatchNorm, x: Tensor, least: float | None) -> str:
    """The error for a batch with padding or weights that leave a channel without a variance."""
    name = type(layer).__name__
    if least == 1:
        size: Any = getattr(layer, "_ghost_batch_size", None)
        return about_a_single_value(layer, x) if size is None else _about_a_ghost_batch(layer, x, size)
    if least == 0:
        return (
            f"{name} needs 2 valid positions in train mode, got none. In mask= True means valid: pass ~mask if yours "
            "means padding. Or leave such a batch out, or call eval(), which returns 0 there."
        )
    return (
        f"{name} needs weights that add up to more than 1 in every channel, got {least:g}. A weight counts as so many "
        "equal values: multiply the weights by a number."
    )


def _about_a_ghost_batch(layer: AnyBatchNorm, x: Tensor, size: int) -> str:
    return (
        f"{type(layer).__name__} needs more than 1 value per channel in every ghost batch, got a single value in one: "
        f"ghost_batch_size={size} for shape {tuple(shape_as_given(layer, x))}. Use a larger ghost_batch_size, or "
        "construct the layer with single_element='population'."
    )


def about_few_counts_of_ranks(layer: AnyBatchNorm, least: float, ranks: str, *, is_ghost: bool) -> str:
    """The error, the same on every rank, for batches that together, or a ghost batch, leave a channel no variance."""
    where = f"every ghost batch of {ranks}" if is_ghost else f"the batches of {ranks} together"
    advice = "or construct the layer with track_running_stats=True and call eval()"
    if layer.running_mean is not None:
        advice = "call eval(), or construct the layer with single_element='population'"
    return (
        f"{type(layer).__name__} needs more than 1 value per channel in {where}, got "
        f"{least:g}: one value has no variance. Use drop_last=True in the loader, pass ~mask if True means padding, "
        f"{advice}. In torch's words: Expected more than 1 value per channel when training"
    )


def refuse(layer: AnyBatchNorm, shapes: Mapping[int, str], x: object) -> None:
    """Raise the error that says what is wrong with an input that a layer cannot normalize."""
    name = type(layer).__name__
    check_eps(layer.eps)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} needs a tensor, got {type(x).__name__}. Convert it with torch.as_tensor.")
    if x.ndim not in shapes:
        layouts = " or ".join(_layout(layer, text) for text in shapes.values())
        sizes = " or ".join(f"{ndim}D" for ndim in shapes)
        raise ValueError(
            f"{name} needs {layouts}, got {tuple(x.shape)}. {_layer_for(x.ndim)} In torch.nn's words: expected "
            f"{sizes} input (got {x.ndim}D input)"
        )
    if not (x.is_floating_point() or x.is_complex()):
        fix = "Call x.dequantize() first" if x.is_quantized else "Call x.float() first"
        raise TypeError(f"{name} needs a floating-point input, got {x.dtype}. {fix}.")
    axis = axis_of(layer)
    fix = _other_axis(-axis) if x.shape[-axis] == layer.num_features else ""
    stored = next((name for name in (*STATISTICS, "weight") if getattr(layer, name) is not None), "input")
    raise ValueError(
        f"{stored} should contain {x.shape[axis]} elements not {layer.num_features}: {name}({layer.num_features}) "
        f"needs {layer.num_features} channels on axis {axis}, got {tuple(x.shape)}.{fix}"
    )


def _other_axis(axis: int) -> str:
    """A sentence that says what to do if the size of another axis is the number of channels."""
    if axis == 1:
        return " Axis 1 has this size: construct the layer with axis=1."
    return " The last axis has this size: construct the layer with axis=-1, or move it by x.movedim(-1, 1)."


def _layout(layer: AnyBatchNorm, text: str) -> str:
    """A shape of ``SHAPES``, with the channels where the layer has them: "(N, L, C)"."""
    return text if axis_of(layer) == 1 or text == "(N, C)" else text.replace(" C,", "").replace(")", ", C)")


def check_state(layer: AnyBatchNorm, x: Tensor, *state: Tensor | None) -> None:
    """Refuse parameters and statistics of another shape or device than the input: someone replaced or moved them."""
    shape, device = x.shape[1:2], x.device
    for name, values in zip(("weight", "bias", *STATISTICS), state, strict=True):
        if values is not None and (values.shape != shape or values.device != device):
            raise ValueError(
                f"{type(layer).__name__} needs {name} of shape ({layer.num_features},) on {x.device}, got "
                f"{tuple(values.shape)} on {values.device}. Move the whole model with model.to(), or load a "
                "state of these shapes."
            )


def check_complex(layer: AnyBatchNorm, x: Tensor, *state: Tensor | None) -> None:
    """Refuse complex input for a real layer and real input for a complex layer; ``state`` is gamma, beta and mean.

    A layer without any of these normalizes both.
    """
    name = type(layer).__name__
    for values in state:
        if values is not None and values.is_complex() != x.is_complex():
            fix = f"x.to({values.dtype}), or construct the layer without dtype="
            if x.is_complex():
                fix = f"{name}({layer.num_features}, dtype={x.dtype}), or normalize x.real and x.imag separately"
            raise TypeError(
                f"{name} needs an input of the kind of its own tensors, which are {values.dtype}, got {x.dtype}. "
                f"Use {fix}."
            )
    if x.is_complex():
        check_complex_settings(layer)


def check_complex_settings(layer: Any) -> None:
    """Refuse settings of a layer that complex numbers do not have: an order or a sign."""
    used = {"act": layer._act, "renorm": layer._renorm}
    for name, value in used.items():
        if value:
            raise ValueError(
                f"{type(layer).__name__} needs real numbers for {name}, got {name}={value!r} with a complex type. "
                "Leave it out; activations of complex numbers are modules of your own behind the layer."
            )


def check_sizes(num_features: int, eps: float) -> None:
    """Refuse a number of channels that is no whole number, an eps that is no number, and an eps below 0 or NaN."""
    require_whole_number(num_features, "num_features", "It is the number of channels: BatchNorm2d(64).")
    require_number(eps, "eps", "Use 1e-5.")
    check_eps(eps)


def check_dtype(dtype: object) -> None:
    """Refuse a type of a layer's tensors that has no gradients, such as one of whole numbers."""
    kinds = "a dtype must be floating-point or complex"
    if dtype is None:
        return
    require_type(dtype, torch.dtype, kinds, "Use torch.float32, or leave it out.")
    if not (dtype.is_floating_point or dtype.is_complex):  # type: ignore[attr-defined] - it is a torch.dtype
        raise TypeError(f"{kinds}, got {dtype}. Use torch.float32, or leave it out; inputs are cast with x.float().")


def check_eps(eps: float) -> None:
    """Refuse an eps below 0 or NaN."""
    if not eps >= 0:
        raise ValueError(about_eps(eps))


def about_eps(eps: float) -> str:
    """The text of the error for an eps that train mode cannot use."""
    return (
        f"eps must be positive, got {eps}. It keeps a constant channel from dividing by zero; eval mode allows 0. "
        f"In torch.nn's words: batch_norm eps must be positive during training, but got {eps}"
    )


def check_memory(memory: object) -> None:
    """Refuse an unknown value of the setting ``memory``."""
    if memory not in {None, "save"}:
        raise ValueError(f"memory must be None or 'save', got {memory!r}. Leave it out for the usual memory use.")


def check_padding(padding: object) -> None:
    """Refuse a value of ``padding`` that does not exist.

    Raises:
        ValueError: If it is neither "zero" nor "keep".
    """
    if padding not in {"zero", "keep"}:
        raise ValueError(f"padding must be 'zero' or 'keep', got {padding!r}. Omit it for 'zero'.")


def check_axis(axis: object) -> None:
    """Refuse an axis of the channels that is neither 1 nor -1."""
    require_whole_number(axis, "axis", "Leave it out for 1, or use -1 for channels on the last axis.")
    if axis not in {1, -1}:
        raise ValueError(f"axis must be 1 or -1, got {axis}. Move the channels to one of these: x.movedim({axis}, 1).")


def check_sync(sync: object) -> None:
    """Refuse a value of the setting ``sync`` that is neither True nor False."""
    require_type(sync, bool, "sync must be True or False", "Pass process_group= for a group of processes.")


def check_single_element(policy: object) -> None:
    """Refuse an unknown value of the setting ``single_element``."""
    if policy not in {"error", "population"}:
        raise ValueError(f"single_element must be 'error' or 'population', got {policy!r}. Leave it out for 'error'.")


def _layer_for(ndim: int) -> str:
    """A sentence that says what to do with an input of ``ndim`` dimensions, which the layer cannot normalize."""
    for name, shapes in SHAPES.items():
        if ndim in shapes:
            return f"Use {name} for {shapes[ndim]}."
    return "Add the batch axis with x.unsqueeze(0)." if ndim < 2 else "Flatten the axes after the channels."
