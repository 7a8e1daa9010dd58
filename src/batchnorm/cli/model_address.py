"""The model that a command line names: its address, its weights, and the arguments of its function."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from batchnorm import addresses
from batchnorm.cli.preconditions import require

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True, slots=True)
class ModelAddress:
    """The address of a model, with the options ``--weights``, ``--state`` and ``--set``."""

    address: str
    weights: str | None = None
    state: str = ""
    given: tuple[str, ...] = ()

    @property
    def is_code(self) -> bool:
        """Whether the target is code, not a file."""
        return addresses.is_address(self.address)

    @property
    def words(self) -> list[str]:
        """The words of a command line that name the model."""
        weights = ["--weights", self.weights] if self.weights else []
        state = ["--state", self.state] if self.weights and self.state else []
        return [self.address, *weights, *state, *(word for setting in self.given for word in ("--set", setting))]

    @property
    def source(self) -> str:
        """The file that the address names; for package.module the path that its file would have."""
        where, _, _ = self.address.rpartition(":")
        return where if where.endswith(".py") else where.replace(".", "/") + ".py"

    def __str__(self) -> str:
        return shlex.join(self.words)

    def made(self) -> nn.Module:
        """The model, with its weights."""
        return addresses.model(self.address, addresses.parsed(self.given), self.weights, self.state)


@contextlib.contextmanager
def running(address: str) -> Iterator[None]:
    """A block that runs the user's code. Its prints go to standard error, and its errors become messages."""
    with contextlib.redirect_stdout(sys.stderr), addresses.as_address_errors(address):
        yield


def batches(address: str | None) -> Iterable[Any] | None:
    """The batches at an address, read into memory if they are an iterator; None without an address."""
    data = addresses.data(address) if address else None
    return list(data) if isinstance(data, Iterator) else data


def require_torch(what: str) -> None:
    """Raise an error that says how to install torch, if it is missing."""
    require("torch", "numpy", what=what, extra="torch")
