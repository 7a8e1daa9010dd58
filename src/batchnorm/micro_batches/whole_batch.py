"""step_backward: a training step on micro-batches with the statistics of the whole batch, which may exceed memory.

Every layer normalizes by the mean and variance of its inputs over all micro-batches, as one forward on the whole batch
would. These are measured first, site by site, with the sites before normalized by their own. Then each micro-batch runs
with gradients. A layer's gradient has two terms that depend on the other examples,

    d_x = gamma rstd (g - sum g / n - z sum g z / n)

with the sums over the whole batch. ``gradient="exact"`` computes them; ``gradient="constant"`` leaves both terms out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from batchnorm import kernels
from batchnorm.argument_types import kind_of, require_callable, require_module, require_whole_number
from batchnorm.call_types import Batch
from batchnorm.layers import require_ours
from batchnorm.micro_batches.cut_graphs import UncutGraphError
from batchnorm.micro_batches.exact_gradient import LossOf, exact_backward
from batchnorm.micro_batches.joined_layers import JoinedModel, StepMoments
from batchnorm.micro_batches.step_totals import RandomStarts, measure_step
from batchnorm.micro_batches.whole_step import Attached, require_channels, require_train_mode, stored_by
from batchnorm.model_wrappers import unwrapped
from batchnorm.population.batches import call, require_examples
from batchnorm.population.eager import uncompiled
from batchnorm.population.tensor_trees import examples_in

if TYPE_CHECKING:
    from batchnorm.population.batches import Forward

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def step_backward(
    model: nn.Module,
    micros: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor],
    *,
    gradient: Literal["exact", "constant"] = "exact",
    segments: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
    forward: Forward | None = None,
) -> Tensor:
    """The loss of a step over micro-batches that are normalized as one batch; adds its gradients to those of the model.

    With ``gradient="exact"`` the loss, the gradients and the stored statistics are those of one forward and backward
    pass on the whole batch, to rounding. Every forward of a micro-batch draws the same random numbers in each of its
    runs, and the random states are afterwards those of a loop of forwards over the micro-batches. A layer that a
    forward calls twice normalizes and stores each call, as for the whole batch. Other modules that change themselves in
    a forward, such as counters, see several forwards. Forwards wait for each other at the layers: a global of the
    user's code that a forward changes for its own duration reaches the others too, which is not noticed.

    The model runs on every micro-batch once to measure (twice if it draws random numbers; once for every call of a
    layer, to that call, if greenlet is not installed or forwards may not wait), and once with gradients.

    Args:
        model: A model in train mode whose batch norm layers are layers of this package. It is called eagerly. Its
            micro-batches must run through the same layers in the same order, and it must not use activation
            checkpointing.
        micros: The micro-batches, in any form that ``recalibrate`` accepts, of any sizes.
        loss: ``loss(output, micro)`` returns the loss of a micro-batch, a scalar.
        gradient: "exact", or "constant" for gradients with mean and variance as constants. Those are biased, and need
            the memory of one micro-batch.
        segments: With "exact", the graphs of all micro-batches are held at once (1), or about a part in ``segments`` of
            each: then the forwards run about ``(segments + 1) / 2`` times.
        reduction: What ``loss`` computes over the examples of a micro-batch: with "mean" each loss counts by its
            share of the examples, so that the result is the mean over all; with "sum" the losses are added. The number
            of examples is the first size of a micro-batch's first tensor.
        forward: ``forward(model, micro)``, in place of ``model(micro)`` or of the model on the first part of ``micro``.

    Returns:
        The loss of the step, without a graph.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If there is no micro-batch, or an argument is out of range; if the model is in eval mode, is wrapped
            for several devices, or has no batch norm layer, or one of others, with ghost batches, or lazy that has not
            run; if a loss is no scalar; if some channel has fewer than 2 values in the whole step; or if micro-batches
            run through different layers.
        RuntimeError: If the model is inside ``step``, or recomputes in the backward pass; with "exact", if the forward
            or the loss itself runs a backward pass through batch norm, such as a gradient penalty.

        After an exception, gradients and stored statistics are as before.

    Warns:
        RuntimeWarning: If ``segments`` cannot be used with this model, so that all graphs were held.

    Example:
        >>> import torch, batchnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), batchnorm.BatchNorm1d(3))
        >>> x, y = torch.randn(32, 2), torch.randn(32, 3)
        >>> micros = list(zip(x.split(8), y.split(8)))
        >>> loss = step_backward(model, micros, lambda output, micro: (output - micro[1]).square().mean())

    References:
        Ioffe and Szegedy 2015, "Batch Normalization", section 3.
    """
    _check(model, loss, gradient, segments, reduction, forward)
    parts = _as_list(micros)
    layers = require_ours(unwrapped(model), "step_backward")
    require_train_mode(layers, "step_backward")
    require_channels(layers, "step_backward")
    _require_whole_batches(layers)
    loss_of = _weighted(loss, parts, reduction)
    joined = JoinedModel(unwrapped(model), layers, parts, forward or call)
    attached = Attached(layers, joined.parts)
    try:
        with uncompiled(), _kept_gradients(model):
            starts = measure_step(joined)
            losses = (_exactly if gradient == "exact" else _by_constants)(joined, starts, loss_of, segments)
    finally:
        attached.detach()
    starts.behind()
    _store(joined)
    return torch.stack(losses).sum()


def _exactly(joined: JoinedModel, starts: RandomStarts, loss: LossOf, segments: int) -> list[Tensor]:
    """``exact_backward``, with all graphs held if they cannot be cut into segments."""
    try:
        with _kept_gradients(joined.model):
            return exact_backward(joined, starts, loss, segments=segments)
    except UncutGraphError as error:
        why = str(error)
    losses = exact_backward(joined, starts, loss, segments=1, has_gates=False)
    if segments > 1:
        warnings.warn(
            f"step_backward holds the graphs of all micro-batches instead of {segments} segments: {why}. Give "
            "segments=1, or use operations that are not in place.",
            RuntimeWarning,
            stacklevel=3,
        )
    return losses


def _by_constants(joined: JoinedModel, starts: RandomStarts, loss: LossOf, _segments: int) -> list[Tensor]:
    losses = []
    for micro in range(len(joined.micros)):
        starts.before[micro]()
        value = loss(joined.forward(micro, StepMoments()), micro)
        if value.requires_grad:
            value.backward()
        losses.append(value.detach())
    return losses


def _store(joined: JoinedModel) -> None:
    """Move the stored statistics of every site's layer, in the order of the sites."""
    with torch.no_grad():
        for site in joined.sites:
            if site.moves and site.total is not None:
                kernels.store(stored_by(joined.layers[site.path]), site.total)
    for layer in joined.layers.values():
        tracked: Any = getattr(layer, "num_batches_tracked", None)
        # the doctor reads it; it holds until the layer moves its statistics in another way
        vars(layer)["_joined"] = len(joined.micros), None if tracked is None else tracked.detach().clone()


def _weighted(loss: Callable[[Any, Any], Tensor], parts: Sequence[Batch], reduction: str) -> LossOf:
    """The contribution of each micro-batch to the loss of the step."""
    sizes = [examples_in(part) or 0 for part in parts]
    whole = sum(sizes)
    if reduction == "mean" and not whole:
        raise ValueError(
            "step_backward needs micro-batches with examples for reduction='mean', got none. Give reduction='sum' and "
            "a loss that adds."
        )

    def contribution(output: object, micro: int) -> Tensor:
        value = loss(output, parts[micro])
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else kind_of(value)
            raise ValueError(f"step_backward needs a loss that is one real number, got {got}. Return loss.mean().")
        return value.reshape(()) * (sizes[micro] / whole) if reduction == "mean" else value.reshape(())

    return contribution


@contextmanager
def _kept_gradients(model: nn.Module) -> Iterator[None]:
    """A block after which the gradients of the parameters are as before if it ends by an exception."""
    before = [(p, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for p, grad in before:
            p.grad = grad
        raise


def _require_whole_batches(layers: Mapping[str, Any]) -> None:
    """Refuse ghost batches, which are not normalized together."""
    for path, layer in layers.items():
        if layer._ghost_batch_size is not None:
            raise ValueError(
                "step_backward needs layers that normalize whole batches, got ghost_batch_size="
                f"{layer._ghost_batch_size} at {path!r}. Use batchnorm.step: the gradients of ghost batches within a "
                "micro-batch do not depend on others."
            )


def _as_list(micros: Iterable[Batch]) -> list[Batch]:
    if isinstance(micros, (Tensor, Mapping, str, bytes)) or not isinstance(micros, Iterable):
        raise TypeError(
            f"step_backward needs a list of micro-batches, got {kind_of(micros)}. A batch x is split by x.split(8)."
        )
    parts = list(micros)
    if not parts:
        raise ValueError("step_backward needs at least one micro-batch, got none. Leave out a step without data.")
    for part in parts:
        require_examples(part, "step_backward")
    return parts


def _check(model: Any, loss: object, gradient: object, segments: Any, reduction: object, forward: object) -> None:
    require_module(model, "step_backward")
    require_callable(loss, "step_backward needs a function loss(output, micro)", "Return a scalar.")
    if forward is not None:
        require_callable(forward, "step_backward needs a function forward(model, micro)", "Or leave it out.")
    for name, value, known in (
        ("gradient", gradient, ("exact", "constant")),
        ("reduction", reduction, ("mean", "sum")),
    ):
        if value not in known:
            raise ValueError(
                f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}. Leave it out for {known[0]!r}."
            )
    require_whole_number(segments, "segments", "Give 1 to hold all graphs.")
    if segments < 1:
        raise ValueError(f"segments must be 1 or more, got {segments}. Give 1 to hold all graphs.")
    if isinstance(model, _WRAPPERS):
        raise ValueError(  # noqa: TRY004 - a right type, wrapped
            f"step_backward needs a model without {type(model).__name__}, which expects one backward pass for each "
            "forward. Pass model.module, and average the gradients over the processes afterwards."
        )
