"""The module in the place of a folded batch norm layer: it adds the residual and applies the activation as before."""

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
    """Takes the place of a batch norm layer that was folded into one or more other layers.

    It stores the layer and the original weights and biases of the other layers. They are not in the state_dict, but
    ``half``, ``to`` and similar methods convert them. It adds the residual and applies the activation if the layer did.

    Args:
        layer: The folded layer.
        partners: The layers that it was folded into, by path.
        tensors: For each partner its weight and bias from before the fold.
        then: Code of what a layer of another library did with the normalized values; None if it did nothing more, and
            for layers of torch.nn and ours.
        moved: Whether the input is made contiguous first: there are views or transpositions between layer and partner.
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
        # modules in a tuple are not registered as children
        self._kept = (layer, *partners.values())
        self._tensors = tensors
        self._paths = tuple(partners)
        self._moved = moved
        self._then = then
        if then is not None:  # the code calls the layer's children, and one of them may be named ``act``
            self._modules.update(layer._modules)
            self._run = then.compiled()
        else:
            ours = isinstance(layer, _Layer)
            self.act = cast("str | None", layer.act if ours else None)
            self.act_param = cast("float", layer.act_param if ours else 0.0)
        if _MARK in vars(layer):
            vars(self)[_MARK] = vars(layer)[_MARK]  # the mark tells revert to remove the activation here too
        self.training = layer.training

    @property
    def partners(self) -> tuple[nn.Module, ...]:
        """The layers that batch norm was folded into."""
        return self._kept[1:]

    @property
    def is_empty(self) -> bool:
        """Whether this module only returns its input, unless a residual is passed."""
        return self._then is None and self.act is None and not self._moved

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:  # noqa: A002 - torch.nn's name
        """The input, with the residual added and the activation applied where the layer did so."""
        if self._moved:  # batch norm returned contiguous memory, and later code may call ``view``
            input = input.contiguous()  # noqa: A001
        if self._then is not None:
            return self._run(self, input)
        return activate(input if residual is None else input + residual, self.act, self.act_param)

    def restored(self) -> nn.Module:
        """Give the other layers their original tensors back, and return the layer in the mode of this module."""
        layer = self._kept[0]
        for partner, tensors in zip(self.partners, self._tensors, strict=True):
            set_tensors(partner, tensors)
        if isinstance(layer, _Layer) and self.act is None and layer.act is not None:  # removed after the fold
            vars(layer).pop(_MARK, None)
            layer.act, layer.act_param = None, 0.0
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedAway:
        super()._apply(fn, recurse)
        self._kept[0]._apply(fn)
        self._tensors = [{name: None if t is None else fn(t) for name, t in each.items()} for each in self._tensors]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # compiled code cannot be pickled; __setstate__ compiles it again
        return {name: value for name, value in vars(self).items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._then is not None:
            self._run = self._then.compiled()

    def extra_repr(self) -> str:
        """The layer and the paths of the layers that it was folded into."""
        return f"{self._kept[0]}, folded into {' and '.join(map(repr, self._paths))}"


def own_tensors(partner: nn.Module) -> dict[str, Tensor | None]:
    """Weight and bias of a layer, not copied: they share the parameters' memory."""
    return {name: None if (p := getattr(partner, name)) is None else p.data for name in ("weight", "bias")}


def set_tensors(partner: Any, tensors: dict[str, Tensor | None]) -> None:
    """Put weight and bias into a layer, in place; None removes a parameter.

    Existing parameters stay the same objects and get new data. A missing parameter is created.
    """
    for name, tensor in tensors.items():
        parameter = getattr(partner, name)
        if tensor is None or parameter is None:
            new = None if tensor is None else nn.Parameter(tensor, partner.weight.requires_grad)
            partner.register_parameter(name, new)
        else:
            parameter.data = tensor  # the old memory is not overwritten: autograd graphs may still need it
