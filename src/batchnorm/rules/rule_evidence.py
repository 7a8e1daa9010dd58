"""Evidence: everything that rules may read, as plain values that need no torch.

A part that was not examined is None, and ``unknown`` may have the reason. A file gives ``stored`` and ``file``. A model
gives ``stored``, ``modules``, ``structure`` and, if its code can be traced, ``graph``. Data add ``measured`` and
``run``, the training loop's settings add ``loop``, several processes ``ranks``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Mapping

    from batchnorm.checkpoint.stored import Checkpoint, Shared, Stored
    from batchnorm.replicas.differences import Replicas

_REASONS = {
    "file": "needs a file",
    "modules": "needs a model, not only a file",
    "structure": "needs a model, not only a file",
    "graph": "needs an example to see which layer follows which",
    "sharing": "needs an example to see which layer follows which",
    "measured": "needs data",
    "run": "needs data",
    "loop": "needs a loader or the settings of the training loop",
    "optimizer": "needs the optimizer",
    "reference": "needs a reference to compare with",
    "environment": "needs the environment",
    "ranks": "needs several processes that call examine with group=",
}


@final
@dataclass(frozen=True, slots=True)
class Module:
    """Settings of one live layer."""

    kind: str  # class name, such as "BatchNorm2d"
    eps: float
    momentum: float | None
    tracks: bool  # track_running_stats
    training: bool
    frozen: bool  # always uses stored statistics, because of batchnorm.freeze or of its class
    trainable: bool  # gamma or beta requires a gradient
    affine: bool
    device: str
    is_lazy: bool = False
    is_sync: bool = False  # torch's SyncBatchNorm, or ours with sync=True
    syncs_on_cpu: bool = False  # whether its synchronization works on a CPU, as of a layer of this package
    joined: int = 1  # micro-batches that its latest step normalized together
    skipped_updates: int = 0
    held: bool = False  # frozen by batchnorm.freeze
    tells: bool = True  # whether its settings can be read; False for traced and exported layers
    act: str = ""  # the activation that a layer of this package applies to its result
    where: str = ""  # file:line of the user's class around the layer; "" if not known
    ignored: frozenset[str] = frozenset()  # codes in the layer's batchnorm_ignore


@final
@dataclass(frozen=True, slots=True)
class Structure:
    """Modes, wrappers and names of the layers in the model."""

    training: bool  # the root's flag
    wrappers: tuple[str, ...] = ()  # class names of the model's wrappers: DistributedDataParallel, AveragedModel
    broadcasts_buffers: bool | None = None  # of DistributedDataParallel
    averages_buffers: bool | None = None  # of AveragedModel: use_buffers
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # layer: all its paths, if it has several
    dropped: Mapping[str, str] = field(default_factory=dict)  # module in a layer's place: lost activation


@final
@dataclass(frozen=True, slots=True)
class Graph:
    """Which module reads the result of which layer, as traced in the code or observed on an example."""

    calls: Mapping[str, int] | None = None  # layer: calls in one forward pass; None without an example
    biased: Mapping[str, str] = field(default_factory=dict)  # layer: the conv or linear before it that has a bias
    behind_dropout: Mapping[str, str] = field(default_factory=dict)
    behind_batch_norm: Mapping[str, str] = field(default_factory=dict)
    foldable: Mapping[str, str] = field(default_factory=dict)  # layer: the layer it can be folded into
    activations: Mapping[str, str] = field(default_factory=dict)  # layer: the activation that alone reads its result
    # layer: norm of each weight row of the linear map right before it; None if another module is before it
    filters: Mapping[str, array[float] | None] = field(default_factory=dict)
    # layer: the layer before it, if only a depthwise convolution and activations are between them, channel by channel
    channel_by_channel: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)  # module whose forward cannot be traced: the reason


@final
@dataclass(frozen=True, slots=True)
class MeasuredLayer:
    """Measurements of one layer on the data. The whole model is in eval mode, unless a field says otherwise.

    ``mean`` and ``var`` are exact over all given examples; variances are biased.
    """

    examples: int
    batches: int
    values_per_example: float  # H*W for images
    mean: array[float]
    var: array[float]
    mean_deviation: array[float]  # (mean - stored mean) / sqrt(stored variance + eps); NaN without statistics
    var_ratio: array[float]  # (var + eps) / (stored variance + eps); NaN without statistics
    # t of the stored mean and of the log of the stored variance: the difference from the data's, divided by its
    # standard error; None if momentum or the effective batch size is unknown
    t_mean: array[float] | None = None
    t_var: array[float] | None = None
    # effective size of a batch, in examples: variance of example means / variance of batch means, in the loader's
    # order; and its value for independent examples
    effective_examples: float | None = None
    batch_examples: float | None = None
    # p of an F-test of batch means against the means of single examples, for the channel with the largest F, times the
    # number of channels; at most 1
    clustering_p: float | None = None
    non_finite: int = 0  # inputs that are NaN or infinite
    constant: tuple[int, ...] = ()  # channels that have the same value in all the data
    lowest: array[float] | None = None  # smallest eval output of each channel, before any activation
    highest: array[float] | None = None
    padded_share: float = 0.0  # share of all positions that look like padding
    # gap between train mode and eval mode in the layer's output, in units of its sd, and its parts
    gap: float | None = None
    gap_noise: float | None = None  # noise part: batch against population statistics
    gap_stale: float | None = None  # stale part: population against stored statistics
    gap_shown: float | None = None  # stale part of the channels in ``shown`` alone
    # channels whose stored statistics differ from those of the data, whatever distribution the data have; in a layer
    # with right statistics, the probability of one or more such channels is at most 0.01
    shown: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Run:
    """Observations of the whole model on the data."""

    never_ran: tuple[str, ...] = ()  # layers that were not called
    updates_forward: Mapping[str, int] = field(default_factory=dict)  # layer: updates in a forward in train mode
    updates_backward: Mapping[str, int] = field(default_factory=dict)  # layer: further updates in the backward pass
    functional: tuple[str, ...] = ()  # modules that call F.batch_norm with the batch's statistics in eval mode
    # probability that batches of examples in random order differ as much, for any distribution; None if no F test gave
    # a reason to compute it
    order_p: float | None = None
    companions: float | None = None  # largest relative change of an example's eval output alone and in a batch
    companions_tolerance: float = 0.0
    alone_error: str = ""  # error in eval mode for one example alone, if several examples ran
    train_error: str = ""  # error of one training step
    input_scales: array[float] | None = None  # sd of each input feature
    input_means: array[float] | None = None
    unwatched: tuple[str, ...] = ()  # layers whose calls cannot be observed: scripted, exported, of another library
    unmeasured: Mapping[str, str] = field(default_factory=dict)  # layer without measured inputs: the reason
    # the reason why a part is not known; parts: "companions", "step", "backward", "functional", "inputs"
    unknown: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Loop:
    """Settings of the training loop, as far as the loader and the caller give them."""

    batch_size: int | None = None  # per device
    last_batch: int | None = None  # examples in the last batch; None if unknown
    accumulation: int = 1
    world_size: int = 1


@final
@dataclass(frozen=True, slots=True)
class Optimizer:
    """What an optimizer does to batch norm layers."""

    kind: str
    decay: Mapping[str, float] = field(default_factory=dict)  # weight decay on gamma or beta, by layer
    unlisted: tuple[str, ...] = ()  # trainable layers that are not in the optimizer
    is_schedule_free: bool = False


@final
@dataclass(frozen=True, slots=True)
class OtherVersion:
    """Another version of the same model, from which it was imported, folded or exported."""

    path: str
    eps: Mapping[str, float] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)
    difference: float | None = None  # max |output - reference output| / max |reference output| in eval mode
    tolerance: float = 0.0
    unknown: str = ""  # why outputs were not compared


@final
@dataclass(frozen=True, slots=True)
class InputsApart:
    """How far the inputs of a layer differ between ranks, each measured on its own data."""

    in_sd: float  # rms over channels of the largest difference of two ranks' means, in sd
    examples: int  # the smallest number of examples of a rank


@final
@dataclass(frozen=True, slots=True)
class Ranks:
    """The copies of a model on the ranks of a process group, compared; the same on every rank."""

    replicas: Replicas
    inputs: Mapping[str, InputsApart] = field(default_factory=dict)  # by layer, of those that every rank measured


@final
@dataclass(frozen=True, slots=True)
class Environment:
    """The Python environment of the process."""

    shadow: str = ""  # a file or folder that Python would import as batchnorm instead of the package
    kernels: str = "native"  # or "reference"


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one target."""

    target: str  # as the user wrote it; remedies repeat it
    stored: Mapping[str, Stored]
    file: Checkpoint | None = None
    state: str = ""  # the state of the file that the user asked for; "" for all; remedies repeat it
    modules: Mapping[str, Module] | None = None
    structure: Structure | None = None
    graph: Graph | None = None
    measured: Mapping[str, MeasuredLayer] | None = None
    run: Run | None = None
    loop: Loop | None = None
    optimizer: Optimizer | None = None
    reference: OtherVersion | None = None
    environment: Environment | None = None
    ranks: Ranks | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)  # part: why it is None although its input was given

    @property
    def sharing(self) -> Graph | tuple[Shared, ...] | None:
        """The graph of a model, or the repeated names in a file: they show layers that are used at several places.

        None if there is neither. A file without repeated names proves nothing: one layer may be called twice.
        """
        return self.graph or (self.file.shared if self.file else None) or None

    def why_not(self, part: str) -> str:
        """Why a part is missing; "" if it is not missing."""
        if part == "stored" or getattr(self, part) is not None:
            return ""
        if part == "sharing" and self.modules is not None:
            return self.why_not("graph")
        return self.unknown.get(part, _REASONS[part])

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Layers with one of these stored values that could not be read."""
        return [name for name, stored in self.stored.items() if not stored.unread.keys().isdisjoint(keys)]

    def unseen(self, needs: Iterable[str], reads: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Layers that a rule cannot judge, with the reason; "" for the whole model.

        Args:
            needs: The parts of the evidence that the rule needs.
            reads: The stored values that the rule reads.
        """
        modules = (self.modules or {}).items()
        if "stored" in needs:
            # the notes of the diagnosis have the reason of each value
            yield from ((name, "some values could not be read") for name in self.unread(reads))
            yield from ((name, "it is lazy") for name, module in modules if module.is_lazy)
            yield from ((name, "it is on the meta device") for name, m in modules if m.device == "meta")
        if "modules" in needs:
            yield from ((name, "its settings cannot be read") for name, module in modules if not module.tells)
        if "measured" in needs and self.stored and not self.measured:
            yield "", "no layer received an input that can be measured"
        if "measured" in needs and self.run:
            yield from self.run.unmeasured.items()
        if not {"graph", "sharing"}.isdisjoint(needs) and self.graph:
            yield from ((name, f"its forward cannot be followed: {why}") for name, why in self.graph.unread.items())

    def activation(self, layer: str) -> str:
        """The activation that alone reads a layer's result; "" if there is none, or if it is not known."""
        known = self.graph.activations if self.graph else self.file.activations if self.file else {}
        return known.get(layer, "")

    def filters(self, layer: str) -> tuple[bool, array[float] | None]:
        """Whether the module before a layer is known; and the norms of its weight rows, None if it is no linear map."""
        known = self.graph.filters if self.graph else self.file.filters if self.file else {}
        return layer in known, known.get(layer)

    def momentum(self, layer: str) -> float | None:
        """A layer's momentum in torch's meaning; None if all batches weigh the same, or if a file does not store it."""
        if self.modules and layer in self.modules:
            return self.modules[layer].momentum
        return self.stored[layer].momentum if layer in self.stored else None

    def where(self, layer: str) -> str:
        """file:line of a layer's code; "" if it is not known."""
        module = (self.modules or {}).get(layer)
        return module.where if module else ""

    def eps(self, layer: str) -> float:
        """A layer's eps; 1e-5 if it is not known."""
        known = self.known_eps(layer)
        return 1e-5 if known is None else known

    def known_eps(self, layer: str) -> float | None:
        """A layer's eps; None if a file does not store it, or if the layer's settings cannot be read."""
        if self.modules and layer in self.modules:
            module = self.modules[layer]
            return module.eps if module.tells else None
        return self.stored[layer].eps if layer in self.stored else None
