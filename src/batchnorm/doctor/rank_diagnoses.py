"""examine on several ranks: each measures on its own data, their copies are compared, and all get one diagnosis.

Before each exchange the ranks tell each other whether one of them failed, so that no rank waits for one that raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.diagnosis_value import order
from batchnorm.doctor.measuring.live_layers import layers_of
from batchnorm.processes import group_named
from batchnorm.processes.collectives import of_all_ranks
from batchnorm.processes.membership import members, ranks_as_words, values_by_rank
from batchnorm.processes.stored_differences import differences_in_sd
from batchnorm.replicas.differences import compare_layers
from batchnorm.rules.finding import Finding
from batchnorm.rules.rule_evidence import Evidence, InputsApart, Loop, Ranks

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from batchnorm.rules.rule_evidence import MeasuredLayer

_T = TypeVar("_T")
_Moments = tuple[int, list[float], list[float]]  # examples, and the mean and variance of each channel


def of_ranks(
    model: nn.Module, group: ProcessGroup | Literal["all"], collect: Callable[[], tuple[Evidence, str]],
    judge: Callable[[Evidence, str], Diagnosis],
) -> Diagnosis:  # fmt: skip
    """One diagnosis of the model's copies on all ranks of a group; every rank must call this and gets the same.

    Args:
        model: The copy of this rank.
        group: The process group; "all" for all processes, which is this one without an initialized process group.
        collect: Returns the evidence about this rank's copy, and a description of its data.
        judge: Applies the rules to evidence.

    Raises:
        TypeError: If ``group`` is no process group.
        ValueError: If this rank is not in the group, no process group is initialized, or ``group`` is another word.
        RuntimeError: If ``collect`` or ``judge`` raised on another rank, or an exchange failed.
        Exception: What ``collect`` or ``judge`` raised on this rank.
    """
    everyone = group_named(group)
    ranks = [0] if everyone is None else members(everyone)
    if everyone is None or len(ranks) == 1:
        evidence, words = collect()
        return judge(replace(evidence, unknown={**evidence.unknown, "ranks": "the group has one process"}), words)
    (evidence, words), _ = _agreed(collect, lambda _: None, ranks, everyone)
    replicas = compare_layers(layers_of(model), ranks, everyone, "examine")
    moments = of_all_ranks(_moments(evidence.measured), everyone, "examine", "the measurements")
    loop = replace(evidence.loop or Loop(), world_size=len(ranks))
    evidence = replace(evidence, ranks=Ranks(replicas, _apart(moments)), loop=loop)
    _, diagnoses = _agreed(lambda: judge(evidence, words), lambda diagnosis: diagnosis, ranks, everyone)
    return merged(diagnoses, ranks)


def _agreed(
    work: Callable[[], _T], shared: Callable[[_T], object], ranks: Sequence[int], group: ProcessGroup
) -> tuple[_T, list[Any]]:
    """The result of ``work`` here, and ``shared`` of the results of all ranks, if no rank raised."""
    try:
        result, error = work(), None
    except Exception as raised:  # noqa: BLE001 - raised again when the other ranks know
        result, error = None, raised
    own = (f"{type(error).__name__}: {error}", None) if error else ("", shared(result))  # type: ignore[arg-type]
    answers = of_all_ranks(own, group, "examine", "the results")
    if error is not None:
        raise error
    failed = {rank: words for rank, (words, _) in zip(ranks, answers, strict=True) if words}
    if failed:
        rank, words = next(iter(failed.items()))
        raise RuntimeError(f"examine failed on {ranks_as_words([*failed])}; on rank {rank}: {words}")
    return result, [value for _, value in answers]  # type: ignore[return-value]


def _moments(measured: Mapping[str, MeasuredLayer] | None) -> dict[str, _Moments]:
    return {name: (each.examples, list(each.mean), list(each.var)) for name, each in (measured or {}).items()}


def _apart(of_ranks: Sequence[Mapping[str, _Moments]]) -> dict[str, InputsApart]:
    """How far the inputs of layers differ that every rank measured with the same number of channels."""
    found = {}
    for name in of_ranks[0]:
        rows = [own[name] for own in of_ranks if name in own]
        if len(rows) < len(of_ranks) or len({len(row[1]) for row in rows}) > 1:
            continue
        means, variances = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (1, 2))
        by_means, _ = differences_in_sd(means, variances, 0.0)
        counted = by_means[by_means.isfinite()]  # without channels that are constant on all ranks
        if len(counted):
            found[name] = InputsApart(float(counted.square().mean().sqrt()), min(row[0] for row in rows))
    return found


def merged(diagnoses: Sequence[Diagnosis], ranks: Sequence[int]) -> Diagnosis:
    """One diagnosis: a finding says on which ranks it is, unless it is the same on all of them."""
    by_rank = dict(zip(ranks, diagnoses, strict=True))
    first = diagnoses[0]
    not_checked = _not_checked(by_rank)
    return replace(
        first,
        findings=order(_findings(by_rank)),
        checked=tuple(code for code in first.checked if code not in not_checked),
        not_checked=not_checked,
        data=_on_ranks({rank: each.data for rank, each in by_rank.items()}) if any(d.data for d in diagnoses) else "",
        seconds=max(each.seconds for each in diagnoses),
        silenced=max(each.silenced for each in diagnoses),
        notes=(
            f"examined on {ranks_as_words(ranks)}; the table of layers is that of rank {ranks[0]}",
            *dict.fromkeys(note for each in diagnoses for note in each.notes),
        ),
    )


def _findings(by_rank: Mapping[int, Diagnosis]) -> Iterator[Finding]:
    """The findings of all ranks; those of one rule and layer are joined, the first of each rank with the first."""
    joined: dict[tuple[str, str, int], dict[int, Finding]] = {}
    for rank, diagnosis in by_rank.items():
        seen: Counter[tuple[str, str]] = Counter()
        for finding in diagnosis.findings:
            key = finding.code, finding.layer
            joined.setdefault((*key, seen[key]), {})[rank] = finding
            seen[key] += 1
    for of_ranks in joined.values():
        worst = max(of_ranks.values(), key=lambda finding: finding.severity)
        measured = {rank: finding.measured for rank, finding in of_ranks.items()}
        is_everywhere = len(measured) == len(by_rank) and len({*measured.values()}) == 1
        yield worst if is_everywhere else replace(worst, measured=_on_ranks(measured))


def _not_checked(by_rank: Mapping[int, Diagnosis]) -> dict[str, str]:
    codes = dict.fromkeys(code for each in by_rank.values() for code in each.not_checked)
    reasons = {
        code: {rank: each.not_checked[code] for rank, each in by_rank.items() if code in each.not_checked}
        for code in codes
    }
    return {
        code: next(iter(why.values()))
        if len(why) == len(by_rank) and len({*why.values()}) == 1
        else _on_ranks(why)
        for code, why in reasons.items()
    }  # fmt: skip


def _on_ranks(words: Mapping[int, str]) -> str:
    """Words with the ranks that have them: "2 of 8 channels on ranks 0, 2; 1 of 8 channels on rank 1"."""
    return values_by_rank([*words], [each or "nothing" for each in words.values()])
