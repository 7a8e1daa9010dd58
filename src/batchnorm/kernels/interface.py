"""The interface of a kernel: three types of arguments, six functions, and how other work is put between their calls.

A kernel is a module: ``reference``, ``cpu`` (the native kernel) or ``triton``. x has shape (N, C, ...) with channels on
axis 1; statistics, gamma and beta have shape (C,). For the formulas see ``reference``.

Each pass over a batch has two halves, because every value of the result depends on all values of its channel:

    forward     statistics = measure(x)
                y = normalize(x, statistics, layer, residual)
    backward    forward = ForwardPass(x, statistics, layer, residual)
                sums, g = sum_gradients(grad, forward)
                d_x = input_gradient(grad, forward, sums / count, g)

``train_forward`` and ``train_backward`` do both halves in one call, which reads memory once if a channel fits the
cache; the results are the same. Between the halves a caller can change which values the statistics are computed from:

- A ``Group`` of batches, of several processes or micro-batches: it merges the moments of all of them, and adds their
  ``sums``. d_gamma and d_beta are the batch's own sums, because DistributedDataParallel or autograd adds the gradients.
- Statistics of a part of the values, or of other examples: ``normalize`` accepts any statistics. For a value that the
  statistics do not depend on, ``input_gradient`` is called with ``means`` None.
- Stored statistics are constants: ``means`` is None for every value.

Units: ``mean`` has the unit of x, and ``var``, which is biased, the square of this unit; both are float64, on Apple's
GPUs float32. ``sums`` has shape (2, C): sum g, which is d_beta, and sum g z, which is d_gamma. Its type is the type in
which the kernel adds, float32 or float64. ``sums / count`` are the means of g and of g z. A NaN or infinity affects its
own channel only. For an empty batch the statistics are NaN and the sums 0.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, final

from torch import Tensor


@final
class Layer(NamedTuple):
    """The parameters and settings of a batch norm layer, without its stored statistics.

    Attributes:
        weight: gamma (C,); None means 1.
        bias: beta (C,); None means 0.
        eps: Added to the variance.
        act: Name of the activation in ``activations.TABLE``; None without activation.
        param: Parameter of the activation; 0 for an activation without a parameter.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str | None = None
    param: float = 0.0


@final
class ChannelStatistics(NamedTuple):
    """The mean and biased variance by which each channel is normalized, both (C,)."""

    mean: Tensor
    var: Tensor


@final
class Measured(NamedTuple):
    """Moments by which a batch is normalized.

    Attributes:
        statistics: Mean and biased variance, (C,); NaN if the count is 0.
        count: Number of values of each channel, () or (C,), in float64.
    """

    statistics: ChannelStatistics
    count: Tensor

    def detached(self) -> Measured:
        """The same numbers, as constants."""
        mean, var = self.statistics
        return Measured(ChannelStatistics(mean.detach(), var.detach()), self.count)

    def for_count_2(self) -> ChannelStatistics:
        """The mean with half of the unbiased variance: ``update_running`` with a count of 2 stores these moments.

        The variance is not finite in a channel whose count is 1 or less.
        """
        mean, var = self.statistics
        return ChannelStatistics(mean, var * (self.count / (self.count - 1)) / 2)


class Group(Protocol):
    """Batches that are normalized together: of several processes, or several micro-batches of a step."""

    def union(self, own: Measured) -> Measured:
        """The moments of all batches of the group, from those of this batch; the same bits for every batch.

        Differentiable any number of times; a backward pass that is itself differentiated calls it again.
        """
        ...

    def total(self, sums: Tensor) -> Tensor:
        """The sums (2, C) of all batches of the group, from the sums of this batch, in the backward pass."""
        ...


@final
class ForwardPass(NamedTuple):
    """What a backward pass needs to know of its forward pass.

    Attributes:
        x: The tensor that was normalized.
        statistics: The statistics that it was normalized by.
        layer: The layer that normalized it.
        residual: The tensor that was added before the activation, or None.
        y: The result, or None. If ``activations.sign_shows``, y can be passed in place of the residual. If y and x are
            the same tensor, y was written over x, and the native kernels recover x.
        constant: Whether the statistics were stored statistics, which do not depend on x.
        valid: Which positions are no padding, bool (N, ...) without the channels, contiguous; None: all. Values and
            gradients of padding are not read, and are 0 in results.
    """

    x: Tensor
    statistics: ChannelStatistics
    layer: Layer
    residual: Tensor | None = None
    y: Tensor | None = None
    constant: bool = False
    valid: Tensor | None = None

    @property
    def gradient_of_p(self) -> bool:
        """Whether there are an activation and a residual, so that p and y have different gradients."""
        return self.layer.act is not None and (self.residual is not None or self.y is not None)


# gradients of x, gamma, beta and p; the last is None unless there are an activation and a residual
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Kernel(Protocol):
    """The functions of a kernel."""

    def train_forward(
        self, x: Tensor, layer: Layer, residual: Tensor | None = None
    ) -> tuple[Tensor, ChannelStatistics]:
        """The batch normalized by its own statistics, and those statistics."""
        ...

    def train_backward(self, grad: Tensor, forward: ForwardPass) -> Gradients:
        """The gradients of x, gamma, beta and p, from ``grad``, the gradient of y."""
        ...

    def measure(self, x: Tensor) -> ChannelStatistics:
        """Mean and biased variance of every channel of a batch."""
        ...

    def normalize(
        self, x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None
    ) -> Tensor:
        """``x`` normalized by the given statistics, value by value: a result does not depend on other examples."""
        ...

    def sum_gradients(self, grad: Tensor, forward: ForwardPass) -> tuple[Tensor, Tensor | None]:
        """``sums``, and the gradient g of p in the type of x; None instead of g unless ``forward.gradient_of_p``."""
        ...

    def input_gradient(
        self, grad: Tensor, forward: ForwardPass, means: Tensor | None, g: Tensor | None = None
    ) -> Tensor:
        """d_x, value by value; ``g`` comes from ``sum_gradients``; ``means`` is None for constant statistics."""
        ...


class PaddedKernel(Kernel, Protocol):
    """A kernel that leaves padding out: ``valid`` is that of ``ForwardPass``."""

    def measure(self, x: Tensor, valid: Tensor | None = None) -> ChannelStatistics:
        """Mean and biased variance of the valid positions of every channel."""
        ...

    def normalize(
        self, x: Tensor, statistics: ChannelStatistics, layer: Layer, residual: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As in ``Kernel``; 0 in the padding."""
        ...
