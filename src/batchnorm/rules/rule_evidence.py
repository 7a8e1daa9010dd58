"""Evidence: everything that rules may look at, as plain values that need no torch.

A part that was not looked at is None; ``unknown`` says why. A file gives ``stored`` only; a model adds ``modules``
and ``structure``; data add ``measured`` and ``run``; a loop's settings add ``loop``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable, Iterator, Mapping

    from batchnorm.checkpoint.stored import Checkpoint, Shared, Stored

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
    frozen: bool  # always uses stored statistics: by batchnorm.freeze, or by its class
    trainable: bool  # gamma or beta requires a gradient
    affine: bool
    device: str
    is_lazy: bool = False
    is_sync: bool = False
    skipped_updates: int = 0
    held: bool = False  # frozen by batchnorm.freeze
    tells: bool = True  # its settings can be read: a traced or exported layer has none
    act: str = ""  # what a layer of this package applies to its result
    where: str = ""  # file:line of the code that defines or constructs it, if known
    ignored: frozenset[str] = frozenset()  # codes its owner put into batchnorm_ignore


@final
@dataclass(frozen=True, slots=True)
class Structure:
    """How the layers stand in the model."""

    training: bool  # the root's flag
    wrappers: tuple[str, ...] = ()  # class names around or in it: DistributedDataParallel, AveragedModel
    broadcasts_buffers: bool | None = None  # of DistributedDataParallel
    averages_buffers: bool | None = None  # of AveragedModel: use_buffers
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # every path of a layer, if several
    dropped: Mapping[str, str] = field(default_factory=dict)  # in a layer's place, and the activation it lost


@final
@dataclass(frozen=True, slots=True)
class Graph:
    """Which layer feeds which, as it was traced, or observed on an example."""

    calls: Mapping[str, int] | None = None  # calls of each layer in one forward pass, if an example was run
    biased: Mapping[str, str] = field(default_factory=dict)  # layer: the conv or linear before it that has a bias
    behind_dropout: Mapping[str, str] = field(default_factory=dict)
    behind_batch_norm: Mapping[str, str] = field(default_factory=dict)
    foldable: Mapping[str, str] = field(default_factory=dict)  # layer: the layer it can be folded into
    activations: Mapping[str, str] = field(default_factory=dict)  # layer: what alone reads its result, if it is one
    # layer: norm of each row of the weights right before it; None where something else is before it
    filters: Mapping[str, array[float] | None] = field(default_factory=dict)
    # layer: the one before it whose activation it gets through a depthwise convolution, channel by channel
    channel_by_channel: Mapping[str, str] = field(default_factory=dict)
    unread: Mapping[str, str] = field(default_factory=dict)  # modules whose forward cannot be followed: why


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """One layer on the data, in eval mode of the whole model unless said otherwise.

    Fresh statistics are exact over all examples given; variances are biased.
    """

    examples: int
    batches: int
    values_per_example: float  # N*H*W over N
    mean: array[float]
    var: array[float]
    mean_deviation: array[float]  # (fresh mean - stored mean) / sqrt(stored variance + eps); NaN if none is stored
    var_ratio: array[float]  # fresh variance over stored one, each with eps; NaN if none is stored
    # t of the stored mean and of the log of the stored variance against the noise that the running average has;
    # None where momentum or M_eff is unknown
    t_mean: array[float] | None = None
    t_var: array[float] | None = None
    # effective size of a batch for its mean, in examples: var of example means over var of batch means; by the
    # order in which the loader gave them, and what independent examples would give
    effective_examples: float | None = None
    batch_examples: float | None = None
    # probability of an F this large if batches were drawn at random from normal examples
    clustering_p: float | None = None
    non_finite: int = 0  # inputs that are NaN or infinite
    constant: tuple[int, ...] = ()  # channels of one value on all the data
    lowest: array[float] | None = None  # smallest eval output of each channel, before any activation
    highest: array[float] | None = None
    padded_share: float = 0.0  # of positions, behind the end of an example
    # gap between train mode and eval mode in the layer's output, in units of its sd, and its parts
    gap: float | None = None
    gap_noise: float | None = None  # batch against population statistics
    gap_stale: float | None = None  # population against stored statistics
    gap_shown: float | None = None  # the same of the channels in ``shown``
    # channels whose stored statistics are not those of these data, whatever the law of the data; in a layer whose
    # statistics are right, the probability that any channel is named is at most 0.01
    shown: tuple[int, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Run:
    """The model as a whole on the data."""

    never_ran: tuple[str, ...] = ()  # layers that were not called
    updates_forward: Mapping[str, int] = field(default_factory=dict)  # of num_batches_tracked, in one train forward
    updates_backward: Mapping[str, int] = field(default_factory=dict)  # further ones in its backward
    functional: tuple[str, ...] = ()  # modules that call F.batch_norm with the batch's statistics in eval mode
    # probability that batches differ as much if the examples come in random order, whatever their law; None where no F
    # gave a reason to compute it
    order_p: float | None = None
    companions: float | None = None  # max relative change of an example's eval output by what is in its batch
    companions_tolerance: float = 0.0
    alone_error: str = ""  # what eval mode raised for one example alone, which ran beside others
    train_error: str = ""  # what a train-mode step raised
    input_scales: array[float] | None = None  # sd of each input feature
    input_means: array[float] | None = None
    unwatched: tuple[str, ...] = ()  # layers whose calls are not seen: scripted, exported, of another library
    unmeasured: Mapping[str, str] = field(default_factory=dict)  # layers whose inputs are not known: why
    # why a part is not known: "companions", "step", "backward", "functional", "inputs"
    unknown: Mapping[str, str] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Loop:
    """How the model is trained, as far as the loader and the caller tell it."""

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
    unlisted: tuple[str, ...] = ()  # trainable layers that it does not update
    is_schedule_free: bool = False


@final
@dataclass(frozen=True, slots=True)
class OtherVersion:
    """Another version of the same model: what it was imported from, or what was folded."""

    path: str
    eps: Mapping[str, float] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)
    difference: float | None = None  # max |output - reference output| / max |reference output| in eval mode
    tolerance: float = 0.0
    unknown: str = ""  # why outputs were not compared


@final
@dataclass(frozen=True, slots=True)
class Environment:
    """Where it runs."""

    shadow: str = ""  # a file or folder that Python would import as batchnorm instead of the package
    kernels: str = "native"  # or "reference"


@final
@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known about one target."""

    target: str  # as the user wrote it, for remedies
    stored: Mapping[str, Stored]
    file: Checkpoint | None = None
    modules: Mapping[str, Module] | None = None
    structure: Structure | None = None
    graph: Graph | None = None
    measured: Mapping[str, Measured] | None = None
    run: Run | None = None
    loop: Loop | None = None
    optimizer: Optimizer | None = None
    reference: OtherVersion | None = None
    environment: Environment | None = None
    unknown: Mapping[str, str] = field(default_factory=dict)  # part: why it is None, if not simply not given

    @property
    def sharing(self) -> Graph | tuple[Shared, ...] | None:
        """The calls of layers, or the names of a file, from which one sees that a layer is used at several places.

        A file without repeated names proves nothing: one layer may be called twice.
        """
        return self.graph or (self.file.shared if self.file else None) or None

    def why_not(self, part: str) -> str:
        """Why a part is not there; empty if it is."""
        if part == "stored" or getattr(self, part) is not None:
            return ""
        if part == "sharing" and self.modules is not None:
            return self.why_not("graph")
        return self.unknown.get(part, _REASONS[part])

    def unread(self, keys: Iterable[str]) -> list[str]:
        """Layers that have one of these values stored where it could not be read."""
        return [name for name, stored in self.stored.items() if not stored.unread.keys().isdisjoint(keys)]

    def unseen(self, needs: Iterable[str], reads: Iterable[str]) -> Iterator[tuple[str, str]]:
        """Layers that a rule cannot judge, with the reason; "" for the whole model.

        Args:
            needs: The parts of the evidence that the rule needs.
            reads: The stored values that the rule reads.
        """
        modules = (self.modules or {}).items()
        if "stored" in needs:
            # each with a reason of its own, which the diagnosis has as a note
            yield from ((name, "some values could not be read") for name in self.unread(reads))
            yield from ((name, "it is lazy") for name, module in modules if module.is_lazy)
            yield from ((name, "it is on the meta device") for name, m in modules if m.device == "meta")
        if "modules" in needs:
            yield from ((name, "it does not tell its settings") for name, module in modules if not module.tells)
        if "measured" in needs and self.stored and not self.measured:
            yield "", "no layer got an input that can be measured"
        if "measured" in needs and self.run:
            yield from self.run.unmeasured.items()
        if not {"graph", "sharing"}.isdisjoint(needs) and self.graph:
            yield from ((name, f"its forward cannot be followed: {why}") for name, why in self.graph.unread.items())

    def activation(self, layer: str) -> str:
        """The activation that follows a layer and alone reads its result; "" if there is none, or it is not known."""
        known = self.graph.activations if self.graph else self.file.activations if self.file else {}
        return known.get(layer, "")

    def filters(self, layer: str) -> tuple[bool, array[float] | None]:
        """Whether the module before a layer is known; and the norms of its rows, if it is a linear map."""
        known = self.graph.filters if self.graph else self.file.filters if self.file else {}
        return layer in known, known.get(layer)

    def momentum(self, layer: str) -> float | None:
        """A layer's momentum in torch's meaning. None for equal weights, and for a file, which does not tell it."""
        if self.modules and layer in self.modules:
            return self.modules[layer].momentum
        return self.stored[layer].momentum if layer in self.stored else None

    def where(self, layer: str) -> str:
        """file:line of a layer's code, if known."""
        module = (self.modules or {}).get(layer)
        return module.where if module else ""

    def eps(self, layer: str) -> float:
        """A layer's eps; 1e-5 if there is only a file, and the file does not tell it."""
        known = self.known_eps(layer)
        return 1e-5 if known is None else known

    def known_eps(self, layer: str) -> float | None:
        """A layer's eps; None where neither a file nor the layer tells it."""
        if self.modules and layer in self.modules:
            module = self.modules[layer]
            return module.eps if module.tells else None
        return self.stored[layer].eps if layer in self.stored else None
