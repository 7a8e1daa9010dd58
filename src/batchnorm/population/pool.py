"""The pool: the processes whose data count together. A layer's statistics are the moments of its inputs on all of them.

Every rank measures its own batches, and all ranks go through the layers in the same order. For each layer they exchange
the moments of its inputs once and merge them in the order of the ranks, in float64 on the CPU. So all ranks store the
same bits before the next layer is measured. A process alone is a pool of one rank, which exchanges nothing.

Each message names its stage, and may contain a failure in its place. So an error on one rank ends all ranks at their
next exchange, and ranks that are not at the same stage notice it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any, final

from torch import distributed

from batchnorm.processes.collectives import of_all_ranks, uninterrupted
from batchnorm.processes.membership import members, ranks_as_words, values_by_rank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import ProcessGroup

    from batchnorm.call_types import Batch
    from batchnorm.population.batches import Batches
    from batchnorm.population.input_moments import InputMoments

# a layer at which forwards wait, or None: the order of the layers is needed, because some batches do not wait
Place = str | None
_LISTED = 5  # differences between ranks that an error lists
_log = logging.getLogger("batchnorm.processes")


class UnsuitedError(Exception):
    """This model's forwards may not wait; the message says why, as the end of a sentence."""


@final
@dataclass(frozen=True, slots=True)
class _Message:
    """What a rank sends in one exchange.

    Args:
        stage: What is exchanged.
        value: Its contents.
        count: The rank's number of batches; None as long as it is not known.
        failure: The error that ended this rank's work, in words; "" if it works.
    """

    stage: str
    value: Any = None
    count: int | None = None
    failure: str = ""


@final
class Pool:
    """The processes whose data count together, and what they agree on while they measure.

    Args:
        group: The ranks; None: this process alone.
        who: The caller's name in messages.

    Attributes:
        ranks: The global ranks; [0] for a process alone.
        spoiled: For each measured layer the ranks that excluded an input.
        batches: This process's batches.
        counts: Numbers of batches of all ranks at their last message; None where a first pass was not over.
    """

    def __init__(self, group: ProcessGroup | None = None, who: str = "recalibrate") -> None:
        self.who = who
        self.ranks = [0] if group is None else members(group)
        self._group = group
        self._reason = ""  # why forwards may not wait, after the ranks agreed on that
        self._is_over = False  # after the last message
        self._is_in_forward = False  # whether a forward is running that is itself a collective
        self.spoiled: dict[str, list[int]] = {}
        self.batches: Batches | None = None
        self.counts: list[int | None] = []

    @property
    def is_shared(self) -> bool:
        """Whether there is another process."""
        return len(self.ranks) > 1

    @property
    def part(self) -> tuple[int, int]:
        """The index of this process and the number of processes."""
        return (distributed.get_rank(self._group) if self.is_shared else 0), len(self.ranks)

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A block that ends on all ranks, or with an error on all of them.

        Raises:
            RuntimeError: If another rank had an error in its block; if an exchange fails.
        """
        try:
            yield
            self._exchange("the end")
        except BaseException as error:
            self._report(error)
            raise

    def require_same(self, own: Mapping[str, tuple[str, str]]) -> None:
        """Compare this rank's model and settings with those of the others.

        Args:
            own: For each thing that must be the same, by its name, a description and a digest.

        Raises:
            RuntimeError: On every rank, if something differs.
        """
        found = self._exchange("models and settings", own)
        names = dict.fromkeys(chain.from_iterable(found))
        unequal = [name for name in names if len({each.get(name) for each in found}) > 1]
        if unequal:
            listed = ". ".join(f"{name}: {self._differing(name, found)}" for name in unequal[:_LISTED])
            more = f", and {len(unequal) - _LISTED} more" if len(unequal) > _LISTED else ""
            raise RuntimeError(
                f"{self.who} needs the same model and settings on every rank of its group, got {listed}{more}. Give "
                "every rank the same weights and arguments; batchnorm.check_replicas(model) compares batch norm layers."
            )

    def _differing(self, name: str, found: Sequence[Mapping[str, tuple[str, str]]]) -> str:
        pairs = [each.get(name, ("absent", "")) for each in found]
        versions = list(dict.fromkeys(pairs))
        is_content = len({words for words, _ in pairs}) == 1
        return values_by_rank(
            self.ranks, [f"version {1 + versions.index(pair)}" if is_content else pair[0] for pair in pairs]
        )

    def of_all(self, what: str, own: object) -> list[Any]:
        """The values of all ranks, in rank order; ``what`` they are in words."""
        return self._exchange(what, own)

    def require_batches(self, count: int) -> None:
        """Refuse data without a batch on any rank; ``count`` is this rank's number of batches.

        Raises:
            ValueError: On every rank.
        """
        if not any(self._exchange("numbers of batches", count)):
            raise ValueError(
                f"{self.who} needs at least one batch, got an empty loader on {ranks_as_words(self.ranks)}. Check the "
                "data set's length. Pass list(loader) if it can be read only once."
            )

    def reason(self, why: str) -> str:
        """Why some rank's forwards may not wait; ``why`` is this rank's reason. "" if all may wait.

        The first reason counts until the end. Ranks that exchange moments meanwhile raise UnsuitedError.
        """
        if not self._reason:
            self._exchange("reasons", why)
        return self._reason

    def orders(self, own: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """The sequences in which forwards enter layers, on all ranks; ``own`` are this rank's."""
        return list(chain.from_iterable(self._exchange("orders of layers", own)))

    def merged(self, places: list[Place], own: InputMoments) -> tuple[list[Place], InputMoments]:
        """The layers at which the forwards of all ranks wait; if it is one layer, the moments of all its inputs.

        Args:
            places: The layers at which this rank's forwards wait; it has none if its forwards have ended.
            own: If it is one layer, the moments of this rank's inputs.

        Raises:
            UnsuitedError: If the forwards of another rank may not wait.
        """
        found = self._exchange("moments", (places, own.to("cpu") if self.is_shared else own))
        everywhere = list(dict.fromkeys(chain.from_iterable(each for each, _ in found)))
        if len(everywhere) != 1 or everywhere[0] is None:
            return everywhere, own
        self.spoiled[everywhere[0]] = [rank for rank, (_, each) in zip(self.ranks, found, strict=True) if each.spoiled]
        return everywhere, reduce(add, [each for _, each in found])

    def where_spoiled(self, path: str) -> str:
        """The ranks that excluded an input of a layer, such as " on rank 1"; "" for a process alone."""
        return f" on {ranks_as_words(self.spoiled[path])}" if self.is_shared else ""

    def in_step(self, batches: Batches, *, is_collective: bool) -> Iterator[tuple[Batch, bool]]:
        """Each batch to run the model on, and whether it counts.

        If a forward is a collective, every rank runs as many: a rank without a further batch repeats its first batch,
        which does not count.

        Raises:
            ValueError: On every rank, if forwards are collectives and a rank has no batch.
        """
        if not (is_collective and self.is_shared):
            yield from ((batch, True) for batch in batches)
            return
        first: Batch = None
        own = iter(batches)
        while True:
            batch, is_over = next(((each, False) for each in own), (None, True))
            first = batches.copy_of(batch) if first is None and not is_over else first
            if not self._has_more(not is_over, has_any=first is not None):
                return
            self._is_in_forward = True
            yield (batches.copy_of(first), False) if is_over else (batch, True)
            self._is_in_forward = False

    def _has_more(self, more: bool, *, has_any: bool) -> bool:
        """Whether some rank has a further batch."""
        found = self._exchange("batches", (more, has_any))
        empty = [rank for rank, (_, any_) in zip(self.ranks, found, strict=True) if not any_]
        if empty and any(each for each, _ in found):
            raise ValueError(
                f"{self.who} needs a batch on every rank if the model is sharded, because all ranks take part in a "
                f"forward, got none on {ranks_as_words(empty)}. Give every rank a batch."
            )
        return any(each for each, _ in found)

    def _exchange(self, stage: str, value: object = None) -> list[Any]:
        """The values of all ranks in rank order."""
        count = None if self.batches is None else self.batches.count
        messages = self._gathered(_Message(stage, value, count))
        if failures := [(rank, each.failure) for rank, each in zip(self.ranks, messages, strict=True) if each.failure]:
            self._is_over = True
            raise RuntimeError(_about_failures(self.who, failures))
        self.counts = [each.count for each in messages]
        reasons = [each.value if each.stage == "reasons" else "" for each in messages]
        if any(reasons):
            self._reason = self._joined(reasons)
            if stage != "reasons":
                raise UnsuitedError(self._reason)
        elif len({each.stage for each in messages}) > 1:
            self._is_over = True
            stages = values_by_rank(self.ranks, [each.stage for each in messages])
            raise RuntimeError(
                f"{self.who} needs all ranks at the same place, got exchanges of {stages}. Give every rank a loader "
                "that gives the same batches in every pass, and a model without random choices."
            )
        return [each.value for each in messages]

    def _joined(self, reasons: list[str]) -> str:
        if len(set(reasons)) == 1:
            return reasons[0]
        known = [(rank, why) for rank, why in zip(self.ranks, reasons, strict=True) if why]
        return values_by_rank([rank for rank, _ in known], [why for _, why in known])

    def _gathered(self, message: _Message) -> list[_Message]:
        if self._group is None or not self.is_shared:
            return [message]
        _log.debug("%s exchanges %s", self.who, message.stage)
        with uninterrupted():  # Ctrl-C is raised at its end, when it is known whether the exchange failed
            self._is_over = True
            messages = of_all_ranks(message, self._group, self.who, message.stage)
            self._is_over = False
        if not all(isinstance(each, _Message) for each in messages):
            self._is_over = True
            raise RuntimeError(f"{self.who} met another collective. Call it on all ranks of its group, in one order.")
        return messages

    def _report(self, error: BaseException) -> None:
        """Send an error of this rank to the others, in place of the next message."""
        if self._is_over or self._is_in_forward or not self.is_shared:
            return
        _log.info("%s has failed here and waits to report it: %r", self.who, error)
        with suppress(RuntimeError):
            self._gathered(_Message("a failure", failure=f"{type(error).__name__}: {error}".strip(": ")))
        self._is_over = True


def _about_failures(who: str, failures: list[tuple[int, str]]) -> str:
    ranks = [rank for rank, _ in failures]
    errors = values_by_rank(ranks, [text for _, text in failures])
    return (
        f"{who} needs every rank of its group, got an error on {ranks_as_words(ranks)}, so all ranks keep their "
        f"statistics. Look at the traceback of that rank. The error: {errors}"
    )
