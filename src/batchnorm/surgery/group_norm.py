"""to_group_norm: group normalization in the place of batch norm, for batches that are too small for batch norm.

For each example and each group of channels, with sums over the group's n values (Wu and He 2018, equations 1, 2, 6):

    mean = sum x / n     var = sum (x - mean)^2 / n     y = gamma (x - mean) / sqrt(var + eps) + beta
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.argument_types import require_flag, require_module, require_whole_number
from batchnorm.kernels.activations import activate
from batchnorm.layer_settings import settings_in_use
from batchnorm.surgery.layer_maps import KINDS
from batchnorm.surgery.patterns import written_kind
from batchnorm.surgery.replacement import check_memory, replace

Model = TypeVar("Model", bound=nn.Module)

_MOST_GROUPS = 32  # the default of Wu and He, table 3


def to_group_norm(model: Model, groups: int | None = None, *, inplace: bool = False) -> Model:
    """A copy of the model with ``nn.GroupNorm`` in the place of each batch norm layer.

    The copy computes something else than the model and must be trained before use: each example is normalized by its
    own statistics, in train and in eval mode, and there are no stored statistics. Gamma, beta and eps are carried
    over as a start for the training, and so are names, sharing, training flags, devices and types, ``requires_grad``
    and hooks. A layer of ours with an activation becomes a GroupNorm with that activation.

    Args:
        model: Not changed, unless ``inplace``.
        groups: The number of groups in each layer. None: the largest power of two, at most 32, that divides the
            number of channels and leaves at least two channels in a group; one group for a single channel.
        inplace: Change ``model`` itself and return it; parameters stay the same objects.

    Shape:
        ``(N, C)`` or ``(N, C, *)``, as before. For ``(N, C)`` and groups of one channel, a group has one value, and
        the result is beta.

    Raises:
        TypeError: If ``model`` is not an ``nn.Module``, ``groups`` is not a whole number, or ``inplace`` is not True or
            False.
        ValueError: If ``groups`` is below 1 or does not divide the channels of a layer; if a layer is lazy or
            parametrized; if a layer may do more than batch norm, because its class is neither torch.nn's nor ours or
            its ``forward`` was replaced. The model is then unchanged.
        RuntimeError: If the model cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
        >>> type(to_group_norm(model)[1]).__name__, to_group_norm(model)[1].num_groups
        ('GroupNorm', 32)

    References:
        Wu and He 2018, "Group Normalization".
    """
    require_module(model, "to_group_norm")
    if groups is not None:
        require_whole_number(groups, "groups", "Pass None to choose for each layer.")
    require_flag(inplace, "inplace")
    check_memory(model, "to_group_norm")
    return replace(model, lambda path, layer: _grouped(path, layer, groups), inplace=inplace)


def _grouped(path: str, layer: _BatchNorm, groups: int | None) -> nn.GroupNorm:
    if any(is_lazy(tensor) for tensor in [*layer.parameters(), *layer.buffers()]):
        raise ValueError(
            f"to_group_norm needs layers whose number of channels is known, got {type(layer).__name__} at {path!r}. "
            "Run the model on a batch first."
        )
    ours: Any = layer
    if written_kind(layer) not in KINDS or "forward" in vars(layer):
        raise ValueError(
            f"to_group_norm needs layers of torch.nn or batchnorm, got {type(layer).__name__} at {path!r}, which may "
            "do more than batch norm. Choose its replacement with batchnorm.replace."
        )
    if settings := settings_in_use(layer, ["axis"]):
        raise ValueError(
            f"to_group_norm needs layers with channels on axis 1, got {settings[0]} at {path!r}. Choose its "
            "replacement with batchnorm.replace."
        )
    count = layer.num_features
    if groups is not None and (groups < 1 or count % groups):
        raise ValueError(
            f"to_group_norm needs groups that divide the channels, got {groups} groups for the {count} channels at "
            f"{path!r}. Leave groups out to choose for each layer."
        )
    args = (groups or _fitting_groups(count), count, layer.eps, layer.affine)
    act = cast("str | None", getattr(layer, "act", None))
    new = nn.GroupNorm(*args) if act is None else GroupNormAct(*args, act=act, act_param=ours.act_param)
    for name in ("weight", "bias"):
        if getattr(layer, name) is None:
            new.register_parameter(name, None)
    return new


def _fitting_groups(count: int) -> int:
    groups = math.gcd(_MOST_GROUPS, count)
    return max(groups // 2, 1) if groups == count else groups


@final
class GroupNormAct(nn.GroupNorm):
    """GroupNorm that adds a residual and applies an activation, as our batch norm layers do."""

    _applies_act = True

    def __init__(
        self, num_groups: int, num_channels: int, eps: float, affine: bool, *, act: str | None, act_param: float
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine)
        self.act, self.act_param = act, act_param

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 - torch.nn's name
        """Normalize the input, add the residual if there is one, and apply ``act``."""
        y = super().forward(input)
        return activate(y if residual is None else y + residual, self.act, self.act_param)

    def extra_repr(self) -> str:
        """The line of ``nn.GroupNorm``, and the activation."""
        return f"{super().extra_repr()}, act={self.act!r}"
