"""A model is examined or treated with each state of a checkpoint in turn.

A file may hold several states that fit one model: its weights and their averages, or a network and its target. Each
state is loaded. A state that does not fit is named with the reason. Layers of the first state have their names in the
model; layers of other states have their names in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from batchnorm.checkpoint import Checkpoint
from batchnorm.checkpoint.model_loading import chosen, load_weights
from batchnorm.checkpoint.stored import below, is_below
from batchnorm.doctor.diagnosis import Diagnosis
from batchnorm.doctor.diagnosis_value import LayerRow, order
from batchnorm.doctor.examination import Selection, examine
from batchnorm.doctor.mending.remedies import Change
from batchnorm.doctor.mending.treatment import differences, treat
from batchnorm.rules.finding import Finding

_FOREIGN = "BN115"  # statistics of other weights; found only in a file with all its states, not in a loaded model


@final
@dataclass(frozen=True, slots=True)
class Treated:
    """The result for one state: findings before and after, and changes. All layers have their names in the file."""

    state: str
    found: tuple[Finding, ...]
    left: tuple[Finding, ...]
    changes: Mapping[str, Change]
    eps: Mapping[str, float]


@final
@dataclass(frozen=True, slots=True)
class Loading:
    """The states of a file: states to load into a model, states that were not asked for, and states that do not fit."""

    file: Checkpoint
    loaded: tuple[str, ...]
    model: str
    not_asked: tuple[str, ...] = ()
    unfit: tuple[str, ...] = ()

    @property
    def others(self) -> dict[str, str]:
        """The states that are not loaded, and why."""
        not_asked = dict.fromkeys(self.not_asked, "another state was asked for")
        return not_asked | dict.fromkeys(self.unfit, f"it does not fit {self.model}")

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that say which states are loaded, if there are several."""
        if len(self.file.states) < 2:
            return ()
        each = ", each by itself" if len(self.loaded) > 1 else ""
        lines = [f"loaded into the model{each}: {', '.join(self.loaded)}"]
        return (*lines, *(f"not loaded: {name}: {reason}" for name, reason in self.others.items()))

    def named(self, state: str, layer: str) -> str:
        """The name of a layer: in the model for the first loaded state, in the file for other states.

        If ``layer`` is "" and the state is not the first, the name is the state's.
        """
        return layer if state == self.loaded[0] else self.in_file(state, layer) if layer else state

    def in_file(self, state: str, layer: str) -> str:
        """A layer's name in the file."""
        paths = self.file.states[state].layers if state else {}
        return paths.get(layer, layer if len(self.file.states) < 2 else below(state, layer))


def loading(network: nn.Module, path: str, state: str = "") -> Loading:
    """Load the states of a file one by one, to see which fit the model. Afterwards the model has one of them.

    Args:
        network: The model.
        path: A checkpoint of torch.save or safetensors.
        state: Load only this state; "" for all.

    Raises:
        ValueError: If there is no such state, or no state fits.
    """
    file, first = chosen(network, path, state)
    model = type(network).__name__
    if state or len(file.states) < 2:
        load_weights(network, path, state)
        return Loading(file, (first,), model, not_asked=tuple(name for name in file.states if name != first))
    unfit: list[str] = []
    for name in file.states:
        try:
            load_weights(network, path, name)
        except ValueError:
            unfit.append(name)
    if len(unfit) == len(file.states):
        load_weights(network, path)  # raises an error that names the file
    return Loading(file, tuple(name for name in file.states if name not in unfit), model, unfit=tuple(unfit))


def examined(
    network: nn.Module, path: str, state: str, look: Callable[[], Diagnosis], selection: Selection
) -> Diagnosis:
    """One diagnosis of a model with all states that fit. A finding that two states share is reported once.

    States that do not fit are examined as a file alone.

    Args:
        network: The model. Afterwards it has the last state that fits.
        path: A checkpoint.
        state: Only this state; all states if it is "".
        look: Called to examine the model with each state.
        selection: Which rules run.
    """
    plan = loading(network, path, state)
    diagnoses = {name: _with(network, path, name, look) for name in plan.loaded}
    first, *others = diagnoses.items()
    findings, rows = list(first[1].findings), list(first[1].layers)
    reported = {(f.code, f.layer, f.measured) for f in findings}
    for name, diagnosis in others:
        new = (f for f in diagnosis.findings if (f.code, f.layer, f.measured) not in reported)
        findings += [replace(finding, layer=plan.named(name, finding.layer)) for finding in new]
        rows += [replace(row, name=plan.named(name, row.name)) for row in diagnosis.layers]
    in_file, more = _of_file(plan, selection, diagnoses) if len(plan.file.states) > 1 else ([], [])
    results = [diagnosis for _, diagnosis in diagnoses.items()]
    return replace(
        first[1],
        findings=order([*findings, *in_file]),
        layers=(*rows, *more),
        not_checked={code: why for diagnosis in reversed(results) for code, why in diagnosis.not_checked.items()},
        checked=tuple(code for code in first[1].checked if all(code in result.checked for result in results)),
        seconds=sum(result.seconds for result in results),
        silenced=sum(result.silenced for result in results),
        states=plan.loaded if state else tuple(plan.file.states),
        notes=plan.notes,
    )


def _with(network: nn.Module, path: str, state: str, look: Callable[[], Diagnosis]) -> Diagnosis:
    load_weights(network, path, state)
    return look()


def _of_file(
    plan: Loading, selection: Selection, diagnoses: Mapping[str, Diagnosis]
) -> tuple[list[Finding], list[LayerRow]]:
    """Findings and rows of states that do not fit; and findings of foreign statistics (BN115) that no data refute."""
    diagnosis = examine(plan.file.path, selection=selection)
    unfit = {layer for name in plan.unfit for layer in plan.file.states[name].layers.values()}
    findings = [finding for finding in diagnosis.findings if finding.layer in unfit]
    for finding in diagnosis.findings:
        if finding.code == _FOREIGN:
            mine = [name for name in plan.loaded if foreign_layers(plan, name, [finding])]
            if mine and not any(_shows_a_fit(diagnoses[name]) for name in mine):
                findings.append(finding)
    return findings, [row for row in diagnosis.layers if row.name in unfit]


def _shows_a_fit(diagnosis: Diagnosis) -> bool:
    """Whether the stored statistics were compared with data, and agree with them."""
    return "BN116" in diagnosis.checked and not any(f.code == "BN116" for f in diagnosis.findings)


def foreign_layers(plan: Loading, state: str, findings: Iterable[Finding]) -> list[Finding]:
    """Findings of foreign statistics (BN115) about a state, one for each of its layers, by the names in the model."""
    if not state:
        return []
    return [
        replace(finding, layer=layer)
        for finding in findings
        if finding.code == _FOREIGN
        for layer, name in plan.file.states[state].layers.items()
        if finding.layer == state or (finding.layer and is_below(finding.layer, name))
    ]


def treated(
    network: nn.Module, plan: Loading, data: Iterable[object] | None, foreign: Iterable[Finding], *, unsafe: bool,
    selection: Selection, name: str,
) -> Iterator[Treated]:  # fmt: skip
    """The results of examining and treating each state that fits. Foreign statistics are measured again.

    Args:
        network: The model.
        plan: The states to load.
        data: Batches that can be read several times, or None.
        foreign: Findings in the file; only findings of foreign statistics (BN115) are used.
        unsafe: As for ``treat``.
        selection: As for ``examine``.
        name: As for ``examine``.
    """
    for state in plan.loaded:
        load_weights(network, plan.file.path, state)
        diagnosis = examine(network, data, selection=selection, name=name)
        copied = foreign_layers(plan, state, foreign) if data is not None else []
        diagnosis = replace(diagnosis, findings=(*diagnosis.findings, *copied))
        mended = treat(network, diagnosis, data, unsafe=unsafe)
        changes = differences(network, mended, diagnosis.findings, measured=data is not None)
        yield Treated(
            state=state,
            found=tuple(_in_file(plan, state, diagnosis.findings)),
            left=tuple(_in_file(plan, state, examine(mended, data, selection=selection, name=name).findings)),
            changes={
                plan.in_file(state, name): changes[layer] for name, layer in _names(network, plan, state, changes)
            },
            eps={plan.in_file(state, row.name): row.eps for row in diagnosis.layers if row.eps},
        )


def _names(network: nn.Module, plan: Loading, state: str, layers: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every name of some layers in the file, with the name in ``layers``. A shared layer has several names."""
    modules = {network.get_submodule(layer): layer for layer in layers}
    paths = plan.file.states[state].layers if state else {}
    for name, module in network.named_modules(remove_duplicate=False):
        if module in modules and (name in paths or name == modules[module]):
            yield name, modules[module]


def _in_file(plan: Loading, state: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Findings by names in the file. If the file has several states, a finding about a whole state gets its name."""
    state_name = state if len(plan.file.states) > 1 else ""
    for finding in findings:
        yield replace(finding, layer=plan.in_file(state, finding.layer) if finding.layer else state_name)
