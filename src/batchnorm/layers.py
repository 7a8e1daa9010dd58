"""BatchNorm1d, 2d and 3d: torch.nn's layers with exact statistics, buffers without NaN and ensembles under vmap.

In train mode a batch is normalized by its own mean and biased variance, and the stored statistics move towards
them; in eval mode the input is normalized by the stored statistics (Ioffe and Szegedy 2015, algorithms 1 and 2). A
layer accepts the arguments of its torch.nn class, has the same five state_dict keys and is an instance of that class.
It can add a residual and apply an activation in the same pass over memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import batch_statistics, kernels, processes
from batchnorm.argument_types import require_type
from batchnorm.channel_axis import channels_second
from batchnorm.kernels import ChannelStatistics, Layer, Running, Sample, activations
from batchnorm.kernels.reference import real_dtype, wide_dtype
from batchnorm.kernels.repeated_forwards import is_repeated
from batchnorm.kernels.shapes import values_per_channel
from batchnorm.layer_checks import (
    SHAPES,
    STATISTICS,
    about_a_single_value,
    about_eps,
    check_complex_settings,
    check_dtype,
    check_sizes,
    check_state,
    promoted,
    refuse,
)
from batchnorm.layer_settings import SETTINGS, LayerSettings, is_complex
from batchnorm.padded_batches import sample_of
from batchnorm.sequences import of_sequences
from batchnorm.variants.renorm import Renorm, check_stored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Layer(LayerSettings, _BatchNorm):
    """The code that the three layers share; each inherits it before the class of torch.nn."""

    _shapes: ClassVar[dict[int, str]]

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        weight: bool = True, bias: bool = True, act: str | None = None, act_param: float | None = None,
        memory: Literal["save"] | None = None, single_element: Literal["error", "population"] = "error",
        padding: Literal["zero", "keep"] = "zero", axis: Literal[1, -1] = 1, renorm: bool | Renorm = False,
        ghost_batch_size: int | None = None, own_weight: float = 0.0, sync: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        check_sizes(num_features, eps)
        check_dtype(dtype)
        param = activations.parameter(act, act_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set(
            memory=memory, single_element=single_element, padding=padding, axis=axis, renorm=renorm,
            ghost_batch_size=ghost_batch_size, own_weight=own_weight, sync=sync, process_group=process_group,
        )  # fmt: skip
        check_stored(type(self).__name__, renorm, is_tracked=track_running_stats)
        if not weight:
            self.register_parameter("weight", None)
        if not bias:
            self.register_parameter("bias", None)
        self._skipped, self._reported = torch.zeros((), dtype=torch.long, device=device), 0
        self._widen_statistics({})
        self._activate(act, param)
        if is_complex(self):
            check_complex_settings(self)

    # a plain attribute: a buffer would be a sixth key of the state_dict
    _skipped: Tensor | None = None
    _reported: int = 0
    # inside a block of ``micro_batches``: what happens to the batches of a step
    _step: batch_statistics.StepStatistics | None = None

    @property
    def skipped_updates(self) -> int:
        """Number of batches in which some channel's statistics were NaN or infinite, so that they were not stored."""
        return 0 if self._skipped is None else int(self._skipped)

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch.nn's name
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        length_axis: int | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Normalize the input, add the residual and apply ``act``; the result has the input's memory format.

        In train mode, and if no statistics are stored, the batch is normalized by its own statistics; otherwise by the
        stored statistics. Train mode also moves these towards those of the batch, unless the batch is empty or the call
        is inside a backward pass: activation checkpointing repeats earlier calls there. So any other forward inside a
        backward pass, for example in a gradient hook, stores nothing either.

        Padding, as ``mask`` or ``lengths`` show it, is neither read nor counted: it may be NaN. Its results, after the
        residual and the activation, and its gradients are 0. With ``padding="keep"`` it is normalized like all other
        values, and not counted.

        Args:
            input: Values to normalize. ``BatchNorm1d`` also accepts a ``PackedSequence``, and a nested tensor (N, j, C)
                of layout jagged, with channels last; both have no padding and give a result of their own kind.
            residual: A tensor of the input's shape, added before the activation; None adds nothing. The result has the
                type of ``input + residual``, or of the input.
            mask: Bool, True = valid: (N, ...) without the channels, (N, 1, ...), or the input's shape. None: all valid.
            lengths: Number of valid positions of each example, (N,), in place of a mask.
            length_axis: The axis along which ``lengths`` count; only an input (N, C, L) has one by default, 2, and
                with ``axis=-1`` an input (N, L, C), 1.
            weight: How many values each value counts as in the statistics, 0 or more: (N,), or of a mask's shapes.

        Raises:
            ValueError: If a shape does not fit the layer, if the batch's statistics are needed and it has one valid
                value per channel or none or eps is 0, or if a length or weight is out of range.
            TypeError: If the input or the residual is not floating-point, or complex in a layer with a real ``dtype``,
                or if a mask, length or weight has a wrong type.
        """
        if not isinstance(input, Tensor) or input.is_nested:
            return of_sequences(
                self, input, residual, mask=mask, lengths=lengths, length_axis=length_axis, weight=weight
            )
        self._check_input(input)
        if residual is not None:
            input, residual = promoted(self, input, residual)  # noqa: A001
        is_moved = self._axis != 1 and input.ndim > 2
        x, residual = (channels_second(self, t) for t in (input, residual)) if is_moved else (input, residual)
        sample = None
        if (mask is not None or lengths is not None or length_axis is not None or weight is not None) and input.numel():
            sample = sample_of(self, x, mask, lengths, length_axis, weight, keep=self._padding == "keep")
        y = self._normalized(x, residual, sample)
        return y.permute(0, *range(2, y.ndim), 1) if is_moved else y

    def _normalized(self, x: Tensor, residual: Tensor | None, sample: Sample | None) -> Tensor:
        """The result for ``x``, (N, C, ...), and the values of it that count; None: all."""
        gamma, beta, mean, var = self._state()
        check_state(self, x, gamma, beta, mean, var)
        layer = Layer(gamma, beta, self.eps, self._act, self._act_param)
        stored = None if mean is None or var is None else ChannelStatistics(mean, var)
        is_composed = (
            self._is_composed
            or self._step is not None
            or x.is_complex()
            or (self._sync and processes.group_of(self) is not None)
        )
        if sample is not None or is_composed:
            return batch_statistics.normalized(self, x, sample or Sample(), layer, residual, stored)
        if stored is not None and not self._measures(x):
            if self.training:
                stored = batch_statistics.stored_for_one(self, batch_statistics.measured_one(x, Sample()), stored)
            if self._own_weight:
                return batch_statistics.by_stored(self, x, Sample(), layer, residual, stored)
            return kernels.normalize(x, stored, layer, residual)
        count = values_per_channel(x)
        if count == 1 or not self.eps > 0:
            raise ValueError(about_a_single_value(self, x) if count == 1 else about_eps(self.eps))
        running = self._running(mean, var) if count else None
        return kernels.train(x, layer, residual, running, save=self._memory is not None)

    def _running(self, mean: Tensor | None, var: Tensor | None) -> Running | None:
        """The stored ``mean`` and ``var`` if a batch moves them; None in eval mode and inside a backward pass."""
        if mean is None or var is None or not (self.training and self.track_running_stats) or is_repeated():
            return None
        return Running(mean, var, *self._counters(), self.momentum)

    def _state(self) -> Any:
        """Gamma, beta and the stored statistics, read from the dicts: ``self.weight`` would take ten times as long."""
        parameters, buffers = self._parameters, self._buffers
        try:
            return parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
        except KeyError:  # one is no parameter or buffer, for example after torch.nn.utils.parametrize
            return self.weight, self.bias, self.running_mean, self.running_var

    def _counters(self) -> tuple[Tensor, Tensor]:
        """The counters of tracked and of skipped batches; a new tensor in place of a missing counter."""
        skipped = self._skipped
        try:
            tracked = self._buffers["num_batches_tracked"]
        except KeyError:  # see _state
            tracked = self.num_batches_tracked
        if skipped is None:
            stored: Any = self.running_mean
            skipped = torch.zeros((), dtype=torch.long, device=stored.device)
            if type(skipped) is Tensor:  # not a FakeTensor
                self._skipped = skipped
        return torch.zeros_like(skipped) if tracked is None else tracked, skipped

    def _measures(self, x: Tensor) -> bool:
        """Whether a layer with stored statistics normalizes ``x`` by the statistics of ``x``."""
        return self.training and not self._is_alone(values_per_channel(x))

    def _is_alone(self, count: float | None) -> bool:
        """Whether a single value per channel is normalized by stored statistics also in train mode."""
        return self._single_element == "population" and count == 1

    def _check_input(self, x: Tensor) -> None:
        good = isinstance(x, Tensor) and x.dim() in self._shapes and x.size(self._axis) == self.num_features
        if not (good and (x.is_floating_point() or x.is_complex()) and self.eps >= 0):
            refuse(self, self._shapes, x)

    def train(self, mode: bool = True) -> _Layer:
        """Set train or eval mode.

        On an accelerator, eval mode warns of batches whose statistics were not stored; on the CPU forward warns.
        """
        super().train(mode)
        skipped = self._skipped
        if not (mode or skipped is None or skipped.is_meta or kernels.running_statistics.warns_at_once(skipped.device)):
            self._report_skipped()
        return self

    def _report_skipped(self) -> None:
        skipped = self.skipped_updates
        new, self._reported = skipped - self._reported, skipped
        if new > 0:
            warnings.warn(
                f"{type(self).__name__}({self.num_features}) met NaN or infinity in the statistics of {new} "
                f"batch{'es' if new > 1 else ''} since its last warning, and did not store them. "
                "layer.skipped_updates counts such batches.",
                RuntimeWarning,
                stacklevel=3,
            )

    def reset_parameters(self) -> None:
        """Set gamma to 1, beta to 0, the stored mean to 0, the stored variance to 1 and its count of batches to 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        """torch.nn's line, then the settings that differ from torch.nn's layer."""
        parts = [super().extra_repr()]
        if self.affine and self.weight is None:
            parts.append("weight=False")
        parts += self._settings_repr()
        if type(self._skipped) is Tensor and not self._skipped.is_meta and self.skipped_updates:
            parts.append(f"skipped_updates={self.skipped_updates}")
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        """Move or cast as every module does, but keep statistics in float32 or float64: half precision ruins them."""
        before = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)
        self._widen_statistics(before)
        self._claim()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes of a pickled or copied layer; old pickles have public names for the settings."""
        if "single_element" in state and "_single_element" not in state:
            state = {f"_{name}" if name in SETTINGS else name: value for name, value in state.items()}
        if isinstance(group := state.get("_process_group"), processes.NamedGroup):
            state = state | {"_process_group": group.resolved()}
        super().__setstate__(state)
        self._claim()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen_statistics({})  # load_state_dict(assign=True) keeps the types of the loaded tensors
        self._claim()

    def _widen_statistics(self, before: dict[str, Tensor | None]) -> None:
        """Widen statistics that a cast narrowed; if ``before`` has the tensor before the cast, copy its values."""
        for name in STATISTICS:
            now = getattr(self, name)
            if now is None:
                continue
            if now.dtype != (wide := self._type_of(name, now)):
                full = before.get(name)
                source = now if full is None or full.is_meta else full
                source = source.real.clone() if source.is_complex() and not wide.is_complex else source
                setattr(self, name, source.to(now.device, wide))
            if self._skipped is None:
                continue
            if self._skipped.is_meta:  # on the meta device nothing was counted
                self._skipped = torch.zeros_like(self._skipped, device=now.device)
            self._skipped = self._skipped.to(now.device)
        self._compose()

    def _type_of(self, name: str, now: Tensor) -> torch.dtype:
        """The type that a statistic is stored in: the variance of complex values is real."""
        if name == "running_mean":
            return wide_dtype(now.dtype)
        mean = self.running_mean
        return real_dtype(mean.dtype if mean is not None and mean.is_complex() else now.dtype)


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L): gamma (x - mean) / sqrt(var + eps) + beta for each channel.

    A batch is normalized by its biased variance ``var``; ``running_var`` stores unbiased variances, as in torch.nn.
    Stored statistics are float64 in a float64 layer and otherwise float32, also after ``half()``. An empty batch
    changes nothing. If a channel's batch statistics are NaN or infinite, its stored statistics stay as they
    are; with ``momentum=None`` those of all channels do. ``skipped_updates`` counts such batches, and a RuntimeWarning
    reports them.

    Args:
        num_features: Channels C.
        eps: Added to the variance; 0 is allowed in eval mode only.
        momentum: Weight of a new batch in the stored statistics; None averages all batches equally.
        affine: Whether to learn gamma (``weight``) and beta (``bias``).
        track_running_stats: Whether to store statistics. Without them eval mode uses the statistics of the batch.
        device: Device of parameters and statistics.
        dtype: Type of the parameters. With ``torch.complex64`` or ``torch.complex128`` inputs, gamma, beta and
            ``running_mean`` are complex, and ``running_var`` is the real mean of |x - mean|^2.
        weight: False leaves gamma out and keeps beta.
        bias: False leaves beta out and keeps gamma.
        act: Activation applied to the result: "relu", "leaky_relu", "elu", "silu", "gelu" (exact) or "hardswish".
        act_param: torch's negative_slope of leaky_relu (default 0.01) or alpha of elu (default 1).
        memory: "save" keeps fewer tensors for the backward pass. With ``act="leaky_relu"`` and no residual, the result
            is written over the input, and the backward pass recovers the input, unless gamma is near 0. Other
            results are computed again in the backward pass, if the forward pass ran inside
            ``batchnorm.memory.saving()``; models from ``convert(model, memory="save")`` run inside it.
        padding: Results at the padding that ``mask`` or ``lengths`` show: "zero" sets them to 0; "keep" normalizes
            padding like all other values.
        single_element: What train mode does with one value per channel, which has no variance: "error" raises
            ValueError; "population" normalizes it by the stored statistics and does not change them. If one channel or
            ghost batch has one valid value, this holds for the whole batch.
        axis: -1 if inputs have their channels on the last axis: (N, L, C) or (N, H, W, C). Nothing is copied.
        renorm: Batch renorm (Ioffe 2017): train mode normalizes nearly by the stored statistics, as eval mode does.
            True uses the paper's limits, a ``Renorm`` others. The stored statistics move as usual.
        ghost_batch_size: Largest number of examples that train mode normalizes together (Hoffer et al. 2017): N
            examples are K = ceil(N / size) ghost batches, each normalized by its own moments; example i belongs to
            ghost batch i mod K. The stored statistics move once, by the moments of the whole batch. In pairs, an odd
            batch (N, C) has one ghost batch of 3.
        own_weight: Weight, from 0 to 1, of an example's own statistics in eval mode (Summers and Dinneen 2020); the
            stored statistics have the rest.
        sync: Whether train mode normalizes by the moments of the batches of all processes of torch.distributed, on any
            backend. The batches may differ in size, or be empty. In one process nothing changes.
        process_group: Synchronize the processes of this group only; naming a group sets ``sync``. None: all processes.

    Example:
        >>> layer = BatchNorm1d(3)
        >>> layer(torch.randn(16, 3)).shape
        torch.Size([16, 3])

    References:
        Ioffe and Szegedy 2015, "Batch Normalization", algorithms 1 and 2.
    """

    _shapes: ClassVar[dict[int, str]] = SHAPES["BatchNorm1d"]


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W); arguments and behaviour are those of BatchNorm1d."""

    _shapes: ClassVar[dict[int, str]] = SHAPES["BatchNorm2d"]


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W); arguments and behaviour are those of BatchNorm1d."""

    _shapes: ClassVar[dict[int, str]] = SHAPES["BatchNorm3d"]


# every layer, by the one of torch.nn that it stands for; other modules derive their lists from this one
OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
LAYERS = tuple(OURS.values())


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Every batch norm layer of a model by its dotted path: ours, torch.nn's and SyncBatchNorm."""
    require_type(model, nn.Module, "a model must be an nn.Module", "Pass the model itself.")
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def require_ours(model: nn.Module, who: str) -> dict[str, _Layer]:
    """The layers of this package in a model, by path; ``who`` begins the error if there are none, or others too."""
    layers = batch_norms(model)
    others = [f"{type(layer).__name__} at {path!r}" for path, layer in layers.items() if not isinstance(layer, _Layer)]
    if others or not layers:
        found = others[0] if others else "no batch norm layer"
        raise ValueError(
            f"{who} needs layers of this package, got {found}. Convert the model: batchnorm.convert(model)."
        )
    return {path: layer for path, layer in layers.items() if isinstance(layer, _Layer)}


def input_of(args: tuple[object, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a call of a layer: the first argument that is a tensor, whatever its name; None without one."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
