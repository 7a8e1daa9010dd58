"""DomainBank: one set of statistics for each domain where a model works, and a switch between them.

Domains share the weights, and each has its own statistics (Chang et al. 2019, "Domain-specific batch normalization for
unsupervised domain adaptation", also give each domain its own gamma and beta; here they are shared).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from batchnorm.adaptation.estimation import adapted
from batchnorm.adaptation.layer_statistics import adaptable
from batchnorm.files.sidecar import Sidecar
from batchnorm.model_wrappers import unwrapped
from batchnorm.population.stored_statistics import Statistics
from batchnorm.population.tensor_memory import digest_of

if TYPE_CHECKING:
    from batchnorm.call_types import Batch
    from batchnorm.population.stored_statistics import Layers

FILE = Sidecar("bank", ".bnbank.safetensors", "a bank", version=1, remedy="Write it with bank.save(path).")
STORED = "stored"


@final
class DomainBank:
    """Statistics of a model by domain name; "stored" is the name of the model's original statistics.

    ::

        bank = bn.DomainBank(model)
        bank.add("night", night_loader)
        with bank.using("night"):
            model(x)

    Switching writes only ``running_mean`` and ``running_var``, in place: the values that were added, bit for bit.

    Args:
        model: The model to switch. Frozen layers, layers in eval mode inside a model in train mode, and layers without
            stored statistics are not switched.

    Raises:
        ValueError: If there is no layer to switch.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self._layers: Layers = adaptable(self.model, "DomainBank")
        self._sets = {STORED: Statistics.of(self._layers)}

    def add(
        self,
        name: str,
        loader: Iterable[Batch] | None = None,
        *,
        prior: float | None = None,
        ema: float | None = None,
        max_examples: int | None = None,
    ) -> Statistics:
        """Add a domain and return its statistics, as ``adapt`` measures them; the model is not changed.

        Args:
            name: A new name for the domain.
            loader: The domain's examples; ``adapt`` starts from the stored statistics. None adds the model's current
                statistics, such as an ``Adapter``'s.
            prior: As in ``adapt``.
            ema: As in ``adapt``.
            max_examples: As in ``adapt``.

        Raises:
            ValueError: If ``name`` is not a text, is empty or exists already, or ``adapt`` raises it.
            TypeError: If ``adapt`` raises it.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"a domain's name must be text of at least one character, got {name!r}. Choose such a name."
            )
        if name in self._sets:
            raise ValueError(f"a domain needs a name of its own, got {name!r} again. Remove the old domain first.")
        if loader is None:
            self._sets[name] = Statistics.of(self._layers)
            return self._sets[name]
        with self.using(STORED), adapted(self.model, loader, prior=prior, ema=ema, max_examples=max_examples):
            statistics = Statistics.of(self._layers)
        self._sets[name] = statistics
        return statistics

    def use(self, name: str) -> None:
        """Switch the model to a domain's statistics.

        Raises:
            KeyError: If there is no such domain.
        """
        self[name].put(self._layers)

    @contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """The model with a domain's statistics in the block; its earlier statistics are restored after it, bit for bit.

        Raises:
            KeyError: If there is no such domain.
        """
        domain, before = self[name], Statistics.of(self._layers)
        try:
            domain.put(self._layers)
            yield self.model
        finally:
            before.put(self._layers)

    @property
    def current(self) -> str | None:
        """The first domain with the statistics that the model has now, compared bit for bit; None if there is none."""
        return next((name for name, domain in self._sets.items() if domain.are_in(self._layers)), None)

    def remove(self, name: str) -> None:
        """Forget a domain; the model keeps its current statistics.

        Raises:
            KeyError: If there is no such domain.
            ValueError: If the domain is "stored".
        """
        if name == STORED:
            raise ValueError("the stored statistics cannot be removed, got remove('stored'). Remove another domain.")
        del self._sets[self._checked(name)]

    def __getitem__(self, name: str) -> Statistics:
        return self._sets[self._checked(name)]

    def __delitem__(self, name: str) -> None:
        self.remove(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sets

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def _checked(self, name: str) -> str:
        if name not in self._sets:
            raise KeyError(f"no domain {name!r}, there are {', '.join(self._sets)}. Add it with bank.add.")
        return name

    # -- files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all domains to a file that ends in .bnbank.safetensors; a failed write leaves no part of it.

        Raises:
            ValueError: If the name has another ending.
            OSError: If the file cannot be written.
        """
        about = {"names": list(self._sets), "digest": weights_digest(self.model, self._layers)}
        FILE.write(path, about, self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        """All statistics; a key has its domain's number, because a name may contain any character."""
        return {
            f"{i}/{kind}/{path}": value.cpu()
            for i, domain in enumerate(self._sets.values())
            for kind, values in (("mean", domain.mean), ("var", domain.var))
            for path, value in values.items()
        }

    def load(self, path: str | os.PathLike[str]) -> DomainBank:
        """Replace all domains, also "stored", by those of a file, and return this bank; the model is not changed.

        Raises:
            ValueError: If the file is not a bank, is damaged, or was made with other weights or layers.
            OSError: If the file cannot be read.
        """
        about, tensors = FILE.read(path)
        names = _names(path, about)
        if about.get("digest") != weights_digest(self.model, self._layers):
            raise ValueError(
                f"a bank belongs to the weights that it was made with, got a model with other weights than {path}. "
                "Load those weights into the model first, or make a new bank."
            )
        if not all(self._is_whole(i, tensors) for i in range(len(names))):
            raise _damaged(path)
        self._sets = {name: self._set(i, tensors) for i, name in enumerate(names)}
        return self

    def _is_whole(self, i: int, tensors: dict[str, Tensor]) -> bool:
        """Whether a file has the statistics of domain ``i`` for every layer, in the layer's shapes and types."""
        stored = self._sets[STORED]
        needed = {f"{i}/mean/{path}": like for path, like in stored.mean.items()}
        needed |= {f"{i}/var/{path}": like for path, like in stored.var.items()}
        pairs = [(tensors.get(key), like) for key, like in needed.items()]
        return all(t is not None and (t.shape, t.dtype) == (like.shape, like.dtype) for t, like in pairs)

    def _set(self, i: int, tensors: dict[str, Tensor]) -> Statistics:
        stored = self._sets[STORED]
        parts = [
            {path: tensors[f"{i}/{kind}/{path}"].to(like.device) for path, like in values.items()}
            for kind, values in (("mean", stored.mean), ("var", stored.var))
        ]
        return Statistics(*parts)


def _names(path: str | os.PathLike[str], about: dict[str, object]) -> list[str]:
    names = about.get("names")
    if not isinstance(names, list) or STORED not in names or not all(isinstance(name, str) for name in names):
        raise _damaged(path)
    return names


def _damaged(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(f"{path} is a damaged bank: parts are missing or of other sizes. Make a new bank.")


def weights_digest(model: nn.Module, layers: Layers) -> str:
    """SHA-256 over the names, types, shapes and bits of a state_dict, without the bits of the layers' statistics."""
    switched = {f"{path}.{name}".lstrip(".") for path in layers for name in _STATISTICS}
    return digest_of(model.state_dict(), bare=switched)


_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
