"""LazyBatchNorm1d, 2d and 3d: layers that get their number of channels from the first batch.

At the first forward such a layer becomes ``BatchNorm1d``, 2d or 3d of this package, as torch.nn's lazy layers become
torch.nn's.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.nn.utils.rnn import PackedSequence

from batchnorm.layer_checks import refuse
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

# the values of a new layer
_INITIAL = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
_TABLES = ("_parameters", "_buffers")


@final
class _Waiting(NamedTuple):
    """A tensor that has no size yet, in a copied or saved layer: torch's own tensors lose their type there."""

    is_parameter: bool
    requires_grad: bool
    device: torch.device
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        new: Any = UninitializedParameter if self.is_parameter else UninitializedBuffer
        return new(self.requires_grad, device=self.device, dtype=self.dtype)


def _waiting(tensor: Any) -> object:
    """The description of a tensor without a size; any other value itself."""
    if not is_lazy(tensor):
        return tensor
    return _Waiting(isinstance(tensor, nn.Parameter), tensor.requires_grad, tensor.device, tensor.dtype)


class _Lazy(LazyModuleMixin):
    """What the three lazy layers share; each inherits it before its own layer."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(0, eps, momentum, affine, track_running_stats, device, dtype, **settings)  # pyrefly: ignore
        layer: Any = self
        for table in _TABLES:
            tensors: dict[str, Any] = vars(layer)[table]
            for name in _INITIAL.keys() & tensors.keys():
                if (empty := tensors[name]) is not None:
                    is_parameter = isinstance(empty, nn.Parameter)
                    tensors[name] = _Waiting(is_parameter, is_parameter, empty.device, empty.dtype).tensor()
        layer._claim()

    def initialize_parameters(self, *args: object, **kwargs: object) -> None:
        """Give the layer's tensors the number of channels of its first input; tensors that were loaded stay.

        Raises:
            ValueError, TypeError: If the layer cannot normalize such an input. The layer stays lazy.
        """
        layer: Any = self
        x = next(iter((*args, *kwargs.values())), None)
        x = x.data if isinstance(x, PackedSequence) else x
        is_jagged = isinstance(x, Tensor) and x.is_nested
        if not isinstance(x, Tensor) or not (is_jagged or x.ndim in layer._shapes):
            refuse(layer, layer._shapes, x)
        assert isinstance(x, Tensor)  # noqa: S101 - refuse raises
        count = _size(layer)
        layer.num_features = x.shape[-1 if is_jagged else layer._axis] if count is None else count
        for name, tensor in [*layer._parameters.items(), *layer._buffers.items()]:
            if is_lazy(tensor):
                tensor.materialize((layer.num_features,))
                with torch.no_grad():
                    tensor.fill_(_INITIAL[name])
        layer._widen_statistics({})
        layer._claim()

    def reset_parameters(self) -> None:
        """As in the layer that this one becomes; nothing before the first batch."""
        layer: Any = self
        if not layer.has_uninitialized_params():
            super().reset_parameters()  # type: ignore[misc] - the layer's

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc] - the layer's
        layer: Any = self
        layer.num_features = _size(layer) or 0

    def __getstate__(self) -> dict[str, Any]:
        """The attributes, with descriptions of the tensors that have no size: copies and pickles keep their types."""
        tables = {table: {name: _waiting(t) for name, t in vars(self)[table].items()} for table in _TABLES}
        return vars(self) | tables

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes, and new tensors without a size."""
        tables = {
            table: {name: t.tensor() if isinstance(t, _Waiting) else t for name, t in state[table].items()}
            for table in _TABLES
        }
        super().__setstate__(state | tables)  # type: ignore[misc] - the layer's


def _size(layer: nn.Module) -> int | None:
    """The number of channels of a layer's tensors; None if it has none with a size."""
    tensors = {**layer._parameters, **layer._buffers}
    known = [t for name, t in tensors.items() if name in _INITIAL and t is not None and not is_lazy(t)]
    return known[0].numel() if known else None


class LazyBatchNorm1d(_Lazy, BatchNorm1d):
    """A BatchNorm1d that gets ``num_features`` from the first batch, and then is a ``BatchNorm1d``.

    The arguments are those of ``BatchNorm1d`` without ``num_features``. A state_dict of a layer with a known number of
    channels can be loaded before the first batch. Until then gamma, beta and the statistics have no values; they can be
    moved, cast, copied and saved.

    Example:
        >>> model = nn.Sequential(LazyBatchNorm1d(act="relu"))
        >>> y = model(torch.randn(16, 3))
        >>> model[0]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, act='relu')
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Lazy, BatchNorm2d):
    """A BatchNorm2d that gets ``num_features`` from the first batch; see LazyBatchNorm1d."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Lazy, BatchNorm3d):
    """A BatchNorm3d that gets ``num_features`` from the first batch; see LazyBatchNorm1d."""

    cls_to_become = BatchNorm3d


# every lazy layer, by the one of torch.nn that it stands for
OURS_LAZY = {
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
