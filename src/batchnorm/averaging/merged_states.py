"""merge_statistics: one state dict from several, for federated learning and for soups of models.

Let state i have the mean m_i and the biased variance v_i of n_i values of a channel. With n = sum n_i, all values
together have (Chan, Golub and LeVeque 1979)

    m = sum n_i m_i / n      v = sum n_i v_i / n + sum n_i (m_i - m)^2 / n

The second sum is the variance between the states. A mean of running variances loses it.

Which tensors belong together is read from their names (``layers_in_state``), and what each tensor becomes is decided in
one place, ``_Merger.merged``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import add
from typing import Any, Literal, final

import torch
from torch import Tensor

from batchnorm.argument_types import require_whole_number
from batchnorm.averaging.layers_in_state import COUNTER, StatisticsNames, local_names, statistics_names
from batchnorm.averaging.parties import WHO, Party, State, agree, parties_of, require_same_names, require_same_shapes
from batchnorm.moments import Moments


@torch.no_grad()
def merge_statistics(
    states: Sequence[State],
    counts: Sequence[float] | None = None,
    *,
    local: str | Iterable[str] = (),
    others: Literal["average", "keep"] = "average",
    correction: int = 1,
) -> dict[str, Any]:
    """A new state dict with the batch norm statistics of all states' data together, and averages of the other tensors.

    If all states have the same weights, and each state's statistics are the moments of its own data (``recalibrate``
    measures these), the result has exactly the moments of the union of the data. If the weights differ, the values
    that the statistics describe come from different networks: the result has the moments of the mixture of these
    values, which the network with averaged weights does not produce. ``weights_agree`` says which of the two it is. In
    the second case measure the statistics of the averaged network: ``recalibrate(model, loader)``.

    =====================================  ===================================================================
    tensors                                in the result
    =====================================  ===================================================================
    running_mean, running_var              moments of the union or mixture, with the variance between states
    count, mean, var of an ``InputNorm``   moments of the union; their own counts are used, not ``counts``
    num_batches_tracked                    the largest of the states: a sum would grow with every round
    other floating and complex tensors     mean weighted by ``counts``; with ``others="keep"`` the first state's
    integers, bool, values of other types  the first state's
    =====================================  ===================================================================

    The first state is the first one with a count above 0. A tensor that has the same bits in all states is unchanged,
    so statistics that no state updated stay as they are. Names that share one tensor in every state share one in the
    result. Sums are computed in float64 and rounded once, to the type of the first state. Statistics of instance norm
    are averaged by ``counts`` if models are passed; in state dicts they have the names of batch norm and count as such.

    Args:
        states: State dicts or models, which are not changed. Models of one architecture have the same names. NumPy
            arrays in a state dict count as tensors.
        counts: For each state the number of values per channel behind its statistics (examples times positions). A
            state with count 0 is left out, whatever it contains. None: the states count alike, and no correction is
            made for the number of values: for soups, whose numbers of values are not known.
        local: Tensors that stay with their states (FedBN, Li et al. 2021) and that the result leaves out; load the
            result with ``strict=False``. A path, or several: all tensors at or below it. "statistics" in place of a
            path: running_mean, running_var and num_batches_tracked of all layers; "batch_norm": weight and bias of
            these layers too.
        others: "average" or "keep", for tensors that are no statistics.
        correction: 1 if running_var is unbiased, as torch's layers store it; 0 if it is biased, as Keras, Flax and
            detectron2's NaiveSyncBatchNorm store it. The result's variance is of the same kind.

    Returns:
        An ``OrderedDict`` with new tensors, on the devices of the first state's tensors.

    Raises:
        TypeError: If a state is neither a mapping nor a model, an argument has a wrong type, or a tensor is quantized
            or sparse.
        ValueError: If there are no states, or a state has dicts of tensors in it, as a whole checkpoint has; if the
            number of counts is not that of the states; if a count is negative, NaN, infinite, or above 0 and not above
            ``correction``; if all counts are 0; if names or shapes differ between states; if a statistic is NaN,
            infinite or a negative variance, or another tensor is NaN; if a result does not fit its type; if a path of
            ``local`` has no tensors; or if a tensor has no numbers.

    Example:
        >>> a, b = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
        >>> with torch.no_grad():
        ...     a.running_mean.fill_(0.0), b.running_mean.fill_(6.0)
        (tensor([0.]), tensor([6.]))
        >>> merge_statistics([a, b], [1000, 1000])["running_var"]  # the mean of both variances is 1
        tensor([10.0040])
    """
    return merged(states, counts, local=local, others=others, correction=correction)


def merged(
    states: Sequence[State], counts: Sequence[float] | None, *, local: str | Iterable[str], others: str,
    correction: int, names: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """As ``merge_statistics``; ``names`` are those of the states in messages, "state 0", "state 1", ... by default."""
    _check(others, correction)
    parties = parties_of(states, counts, correction, names)
    excluded = _excluded(parties, local)
    merger = _Merger(parties, keep=others == "keep", correction=0 if counts is None else int(correction))
    return merger.result(excluded)


def weights_agree(states: Sequence[State]) -> bool:
    """Whether all states have the same tensors, bit for bit, apart from the statistics of batch norm.

    Then merged statistics are those of the union of all data, otherwise of a mixture. Errors as ``merge_statistics``.
    """
    parties = parties_of(states, None, 1)
    require_same_names(parties, set())
    require_same_shapes(parties, set())
    names = [name for name in parties[0].tensors if name.rpartition(".")[2] != COUNTER]
    statistics = {name for group in statistics_names(names) for name in group.names.values()}
    return all(agree([party.tensors[name] for party in parties]) for name in names if name not in statistics)


def _check(others: object, correction: object) -> None:
    if others not in {"average", "keep"}:
        raise ValueError(f"others must be 'average' or 'keep', got {others!r}. Leave it out to average.")
    require_whole_number(correction, "correction", "Use 1 for torch's unbiased running_var, 0 for a biased one.")
    if correction not in {0, 1}:
        raise ValueError(f"correction must be 0 or 1, got {correction}. Use 1 for torch's unbiased running_var.")


def _excluded(parties: Sequence[Party], local: str | Iterable[str]) -> set[str]:
    names = dict.fromkeys(name for party in parties for name in party.tensors)
    return local_names(list(names), local)


@final
class _Merger:
    """Computes the tensors of the result, those of a layer's statistics together."""

    def __init__(self, parties: Sequence[Party], *, keep: bool, correction: int) -> None:
        self.parties, self.keep, self.correction = parties, keep, correction
        self.first = parties[0]

    def result(self, excluded: set[str]) -> dict[str, Any]:
        """The merged state dict."""
        require_same_names(self.parties, excluded)
        require_same_shapes(self.parties, excluded)
        names = [name for name in self._names() if name not in excluded]
        groups = {name: group for group in statistics_names(names) for name in group.names.values()}
        merged: OrderedDict[str, Any] = OrderedDict()
        copies: dict[tuple, str] = {}
        for name in names:
            values = [party.tensors[name] for party in self.parties if name in party.tensors]
            first_name = copies.setdefault(_memory(values, name), name)
            if first_name != name:
                merged[name] = merged[first_name]
            elif name not in merged:
                merged.update(self.merged(name, values, groups.get(name)))
        result: Any = OrderedDict((name, merged[name]) for name in names)
        if (metadata := getattr(self.first.tensors, "_metadata", None)) is not None:
            result._metadata = metadata.copy()
        return result

    def _names(self) -> list[str]:
        """The first state's names, then counters that only other states have."""
        return list(dict.fromkeys(name for party in self.parties for name in party.tensors))

    def merged(self, name: str, values: Sequence[Any], group: StatisticsNames | None) -> dict[str, Any]:
        """The result for a tensor; for a statistic of a layer, the results for all of its statistics."""
        if name.rpartition(".")[2] == COUNTER:
            return {name: _largest(values)}
        if group is not None and not group.is_complete:
            raise ValueError(
                f"{WHO} needs both statistics of a layer, got {name!r} of {self.first.name} alone. Save the whole "
                "state dict again, or put the layer into local=."
            )
        if group is not None and not all(agree(self._values(each)) for each in group.names.values()):
            return self._statistics(group)
        return {name: self._average(name, values, keep=self.keep and group is None)}

    def _values(self, name: str) -> list[Tensor]:
        return [party.tensors[name] for party in self.parties]

    def _statistics(self, group: StatisticsNames) -> dict[str, Tensor]:
        for party in self.parties:
            _require_statistics(party, group)
        if group.path in self.first.instance_norms:
            return {name: self._average(name, self._values(name), keep=False) for name in group.names.values()}
        own = group.names.get("count")
        correction = 0 if own else self.correction
        total = reduce(add, (self._moments(party, group, correction) for party in self.parties))
        mean, m2 = total.mean, total.m2
        if _is_complex(self.first, group):
            mean, m2 = torch.view_as_complex(mean.contiguous()), m2.sum(-1)
        var = m2 / (total.count - correction)
        if own:  # a feature without values keeps mean 0 and variance 1, as InputNorm stores it
            empty = total.count == 0
            mean, var = torch.where(empty, 0.0, mean), torch.where(empty, 1.0, var)
        found = {"mean": mean, "var": var, "count": total.count}
        return {name: self._rounded(name, found[role]) for role, name in group.names.items()}

    def _moments(self, party: Party, group: StatisticsNames, correction: int) -> Moments:
        mean, var = (_wide(party.tensors[group.names[role]]) for role in ("mean", "var"))
        count = _wide(party.tensors[group.names["count"]]) if "count" in group.names else party.count
        if mean.is_complex():  # E|x - m|^2 is the sum for both parts: the real part gets it, the imaginary part 0
            mean, var = torch.view_as_real(mean), torch.stack([var, torch.zeros_like(var)], -1)
        return Moments.from_var(count, mean, var, correction=correction)

    def _average(self, name: str, values: Sequence[Any], *, keep: bool) -> Any:
        first = values[0]
        if not isinstance(first, Tensor):
            return first
        if keep or not (first.is_floating_point() or first.is_complex()) or agree(values):
            return first.detach().clone()
        for party, value in zip(self.parties, values, strict=True):
            if bool(value.isnan().any()):
                raise ValueError(
                    f"{WHO} needs numbers in every tensor, got NaN in {name!r} of {party.name}. Leave this state out "
                    "by count 0, or go back to an earlier checkpoint of it."
                )
        total = sum(party.count for party in self.parties)
        terms = (_wide(value) * (party.count / total) for party, value in zip(self.parties, values, strict=True))
        return reduce(add, terms).to(first.dtype).to(first.device)

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        first = self.first.tensors[name]
        rounded = value.to(first.dtype)
        if not bool(rounded.isfinite().all()):
            raise ValueError(
                f"{WHO} needs statistics that fit {str(first.dtype).removeprefix('torch.')}, got {name!r} up to "
                f"{float(value.abs().max()):.3g}. Store statistics as float32: batchnorm fix, or layer.float()."
            )
        return rounded.to(first.device)


def _is_complex(party: Party, group: StatisticsNames) -> bool:
    return party.tensors[group.names["mean"]].is_complex()


def _require_statistics(party: Party, group: StatisticsNames) -> None:
    mean, var = (party.tensors[group.names[role]] for role in ("mean", "var"))
    if mean.shape != var.shape:
        raise ValueError(
            f"{WHO} needs as many variances as means in a layer, got {tuple(var.shape)} and {tuple(mean.shape)} in "
            f"{group.names['mean']!r} of {party.name}. Save the state dict of the model again."
        )
    for role, name in group.names.items():
        values = _wide(party.tensors[name])
        wrong = ~values.isfinite() if role == "mean" else ~(values.isfinite() & (values >= 0))
        if bool(wrong.any()):
            channels = wrong.flatten().nonzero().flatten().tolist()
            what = "finite means" if role == "mean" else "finite variances and counts of 0 or more"
            raise ValueError(
                f"{WHO} needs {what}, got {values.flatten()[channels[0]].item():g} in {name!r} of {party.name}, "
                f"channel {channels[0]} ({len(channels)} of {values.numel()} channels). Leave this state out by count "
                "0, or measure its statistics again: batchnorm.recalibrate(model, loader)."
            )


def _wide(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, where every type can be widened, in double precision."""
    return tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(values: Sequence[Any]) -> Any:
    """The largest counter: a number, or a tensor of the first one's type and shape."""
    largest = max(values, key=lambda value: float(value.max()) if isinstance(value, Tensor) else float(value))
    first = values[0]
    return largest.detach().to(first.device, first.dtype, copy=True) if isinstance(first, Tensor) else largest


def _memory(values: Sequence[Any], name: str) -> tuple:
    """A key that two names have in common if every state has one tensor under both."""
    if not all(isinstance(value, Tensor) and value.numel() for value in values):
        return (name,)
    return tuple((v.data_ptr(), v.dtype, tuple(v.shape), v.stride(), v.device) for v in values)
