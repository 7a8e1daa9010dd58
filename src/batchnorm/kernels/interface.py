"""What a kernel is given and what it computes: three values, six functions, and where other work goes between them.

A kernel is a module: ``reference``, ``cpu`` (the native one) or ``triton``. x is (N, C, ...) with channels on axis 1;
statistics, gamma and beta are (C,). For the formulas see ``reference``.

Each pass over a batch has two halves, because every value of the result depends on all values of its channel:

    forward     statistics = measure(x)
                y = normalize(x, statistics, layer, residual)
    backward    forward = ForwardPass(x, statistics, layer, residual)
                sums, g = sum_gradients(grad, forward)
                d_x = input_gradient(grad, forward, sums / count, g)

``train_forward`` and ``train_backward`` do both halves in one call, which reads memory once where a channel fits the
cache; the halves give the same values. Between the halves is the place for what changes the set of values that a
channel is normalized by:

- Synchronized batch norm: ``Moments.from_var(count, *statistics)`` of every process are added, and so are ``sums`` and
  ``count``. d_gamma and d_beta are each process' own sums, as DistributedDataParallel adds the gradients up.
- Statistics of a part of the values, or of other examples: ``normalize`` takes any statistics. A value that was not
  measured gets its gradient with ``means`` None, as it has no part in the statistics.
- Stored statistics are constants: ``means`` is None for every value.

Units: ``mean`` has the unit of x and ``var``, which is biased, its square; both are float64, on Apple's GPUs float32.
``sums`` is (2, C): sum g, which is d_beta, and sum g z, which is d_gamma; its type is that in which the kernel adds,
float32 or float64. ``sums / count`` are the means of g and of g z. NaN and infinity stay in their channel. A batch of
no values has statistics NaN and sums 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

from torch import Tensor


@final
class Layer(NamedTuple):
    """What a batch norm layer is, without its stored statistics.

    Attributes:
        weight: gamma (C,), or None for 1.
        bias: beta (C,), or None for 0.
        eps: Added to the variance.
        act: Name of the activation in ``activations.TABLE``, or None.
        param: Parameter of the activation, 0 where it has none.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str | None = None
    param: float = 0.0


@final
class ChannelStatistics(NamedTuple):
    """What each channel is normalized by: its mean and its biased variance, (C,)."""

    mean: Tensor
    var: Tensor


@final
class ForwardPass(NamedTuple):
    """A forward pass, as its backward pass needs it.

    Attributes:
        x: What was normalized.
        statistics: By what.
        layer: By which layer.
        residual: What was added before the activation, or None.
        y: The result, which may stand for the residual where ``activations.sign_shows``. The native kernels recover x
            where it is the same tensor: y was written over x.
        constant: Whether the statistics were stored ones, which do not depend on x.
    """

    x: Tensor
    statistics: ChannelStatistics
    layer: Layer
    residual: Tensor | None = None
    y: Tensor | None = None
    constant: bool = False

    @property
    def gradient_of_p(self) -> bool:
        """Whether an activation met a residual, so that the residual's gradient is another than that of y."""
        return self.layer.act is not None and (self.residual is not None or self.y is not None)


# of x, gamma, beta and p; None in place of the last where no activation met a residual
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Kernel(Protocol):
    """The functions of a kernel."""

    def train_forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None = None
    ) -> tuple[Tensor, ChannelStatistics]:
        """The batch normalized by its own statistics, and those statistics."""
        ...

    def train_backward(self, grad: Tensor, forward: ForwardPass) -> Gradients:
        """The gradients of a forward pass, given that of y."""
        ...

    def measure(self, x: Tensor) -> ChannelStatistics:
        """Mean and biased variance of every channel of a batch."""
        ...

    def normalize(
        self, x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None
    ) -> Tensor:
        """``x`` normalized by given statistics, value by value: an example's result does not depend on its batch."""
        ...

    def sum_gradients(self, grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
        """``sums``, and the gradient g of p in the type of x, or None where no activation met a residual."""
        ...

    def input_gradient(
        self, grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None
    ) -> Tensor:
        """d_x, value by value; ``g`` is what ``sum_gradients`` returned; ``means`` None: the statistics are fixed."""
        ...
