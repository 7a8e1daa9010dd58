"""The module in the place of a folded batch norm layer: it keeps the layer, and applies what the layer did besides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.kernels.activations import activate
from batchnorm.layers import _Layer
from batchnorm.surgery.fusion import _MARK
from batchnorm.surgery.rewriting import Code


@final
class FoldedAway(nn.Identity):
    """Stands where a batch norm layer was whose work another layer, or several, now do.

    It keeps the layer, and the others' weights and biases of before, out of the state_dict; ``half``, ``to`` and the
    like reach them. A residual and an activation that the layer applied, it applies.
    """

    _applies_act = True

    def __init__(
        self,
        layer: _BatchNorm,
        partners: dict[str, nn.Module],
        tensors: list[dict[str, Tensor | None]],
        *,
        then: Code | None = None,
        moved: bool = False,
    ) -> None:
        super().__init__()
        # in a tuple, so that they are no children
        self._kept = (layer, *partners.values())
        self._tensors = tensors
        self._paths = tuple(partners)
        self._moved = moved
        self._then = then
        if then is not None:  # the code calls the layer's children by their names, ``act`` among them
            self._modules.update(layer._modules)
            self._run = then.compiled()
        else:
            ours = isinstance(layer, _Layer)
            self.act = cast("str | None", layer.act if ours else None)
            self.act_param = cast("float", layer.act_param if ours else 0.0)
        if _MARK in vars(layer):
            vars(self)[_MARK] = vars(layer)[_MARK]  # revert takes the activation away from what has the mark
        self.training = layer.training

    @property
    def partners(self) -> tuple[nn.Module, ...]:
        """The layers that do the work."""
        return self._kept[1:]

    @property
    def is_empty(self) -> bool:
        """Whether the layer did nothing but batch norm."""
        return self._then is None and self.act is None and not self._moved

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 - torch.nn's name
        """The input, with the residual added and the activation applied where the layer did so."""
        if self._moved:  # batch norm made a result that can be viewed
            input = input.contiguous()  # noqa: A001
        if self._then is not None:
            return self._run(self, input)
        return activate(input if residual is None else input + residual, self.act, self.act_param)

    def restored(self) -> nn.Module:
        """The layer, in the mode that was asked of its place; the other one has its tensors of before again."""
        layer = self._kept[0]
        for partner, tensors in zip(self.partners, self._tensors, strict=True):
            set_tensors(partner, tensors)
        if isinstance(layer, _Layer) and self.act is None and layer.act is not None:  # taken away since
            vars(layer).pop(_MARK, None)
            layer.act, layer.act_param = None, 0.0
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedAway:
        super()._apply(fn, recurse)
        self._kept[0]._apply(fn)
        self._tensors = [{name: None if t is None else fn(t) for name, t in each.items()} for each in self._tensors]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a function that was made at run time cannot be pickled, and is made again
        return {name: value for name, value in vars(self).items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._then is not None:
            self._run = self._then.compiled()

    def extra_repr(self) -> str:
        """The layer and who does its work."""
        return f"{self._kept[0]}, folded into {' and '.join(map(repr, self._paths))}"


def own_tensors(partner: nn.Module) -> dict[str, Tensor | None]:
    """Weight and bias of a layer, in the memory that they are in."""
    return {name: None if (p := getattr(partner, name)) is None else p.data for name in ("weight", "bias")}


def set_tensors(partner: Any, tensors: dict[str, Tensor | None]) -> None:
    """Change the layer in place: it has these tensors, under the parameters that it had or under new ones."""
    for name, tensor in tensors.items():
        parameter = getattr(partner, name)
        if tensor is None or parameter is None:
            new = None if tensor is None else nn.Parameter(tensor, partner.weight.requires_grad)
            partner.register_parameter(name, new)
        else:
            parameter.data = tensor  # other memory: what was recorded or kept with the old one stays valid
