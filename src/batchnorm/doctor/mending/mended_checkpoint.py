"""Mend a checkpoint: plan the changes, then write the new file. Only writing a file of torch.save needs torch.

Every copy of the model in the file is treated, averaged copies too. Everything outside of batch norm layers keeps its
bits: weights, optimizer states, counters of epochs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, final

from batchnorm import checkpoint
from batchnorm.checkpoint import Checkpoint, Stored
from batchnorm.checkpoint.averaged_copies import Copy, Entry, Keys, entries, find_copies, find_layers
from batchnorm.checkpoint.formats import detection, safetensors_file, torch_legacy, torch_zip
from batchnorm.checkpoint.states_in_file import with_state
from batchnorm.doctor.diagnosis_value import order
from batchnorm.doctor.examination import Selection, looks, parts
from batchnorm.doctor.mending.remedies import EPS, TENSORS, Change, changed, is_same, prescribe
from batchnorm.doctor.mending.tensor_edit import Edit
from batchnorm.files.whole import replacing
from batchnorm.rules import RULES
from batchnorm.rules.bn1_stored_statistics import HALF
from batchnorm.rules.finding import Finding
from batchnorm.rules.rule_evidence import Evidence

Writer = Callable[[Path, BinaryIO, Sequence[Edit], Mapping[Keys, str]], None]
_READERS = {"pt": torch_zip.read, "legacy": torch_legacy.read, "safetensors": safetensors_file.read}
# what DataParallel, DistributedDataParallel, torch.compile and DeepSpeed put in front of every name
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")


@final
@dataclass(frozen=True, slots=True)
class MendingPlan:
    """The changes that mend a file.

    Keys of ``changes`` are the names of layers: names in the model for the first copy in the file, for further copies
    names in the file.
    """

    file: Checkpoint
    after: Checkpoint
    changes: Mapping[str, Change]
    prefixes: Mapping[Keys, str]  # keys that lead to a dict: the prefix to remove from its names
    findings: tuple[Finding, ...]
    left: tuple[Finding, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the file would stay as it is."""
        return not self.changes and not self.prefixes


def plan(
    path: str | os.PathLike[str], *, unsafe: bool = False, selection: Selection | None = None,
    live: Mapping[str, Change] | None = None, eps: Mapping[str, float] | None = None, state: str = "",
) -> MendingPlan:  # fmt: skip
    """The changes that mend a checkpoint without data, and the findings that would be left.

    Args:
        path: A file of torch.save or safetensors.
        unsafe: Also apply remedies that change eval outputs.
        selection: Which rules run.
        live: Changes that were made in models with the file's states; keys are the layers' names in the file.
        eps: The eps of layers, as a model has it; the file's eps or 1e-5 for other layers.
        state: Only layers of this state change; layers of all states if it is "".

    Raises:
        ValueError: As ``checkpoint.read``; or if the file is an ONNX model or a plain pickle, or lacks the state or a
            layer of ``live``.
    """
    file = mendable(path)
    if state:
        file, state = with_state(file, state)
    model_eps = eps or {}
    file = _with_layers(file, lambda name, stored: replace(stored, eps=model_eps.get(name, stored.eps)))
    found, layers = _findings(file, selection), file.every
    names = set(file.states[state].layers.values()) if state else layers.keys()
    changes = prescribe(
        {name: layers[name] for name in layers if name in names}, found, lambda n: layers[n].eps or EPS, unsafe=unsafe
    )
    changes |= _of_models(file, found, live or {})
    wraps = not state and any(finding.code == "BN507" for finding in found)
    prefixes = _prefixes(*structure(Path(file.path))) if wraps else {}
    after = _with_layers(file, lambda name, stored: changes[name].after if name in changes else stored)
    after = replace(after, prefix=_without_wrappers(file.prefix) if prefixes else file.prefix)
    return MendingPlan(
        file=file, after=after, changes=changes, prefixes=prefixes, findings=found, left=_findings(after, selection)
    )


_UNMENDABLE = {
    "onnx": ("ONNX model", "Fix the checkpoint that the file was made from, and export it again."),
    "pickle": ("plain pickle", "Load the file, and save its tensors with torch.save(state, path)."),
}


def mendable(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path; a ValueError if ``fix`` cannot write files of its format."""
    file = checkpoint.read(path)
    if file.format in _UNMENDABLE:
        kind, remedy = _UNMENDABLE[file.format]
        raise ValueError(f"fix needs a file of torch.save or safetensors, got the {kind} {file.path}. {remedy}")
    return file


def _of_models(file: Checkpoint, found: Sequence[Finding], live: Mapping[str, Change]) -> dict[str, Change]:
    """Changes that were made in models, each joined with the safe changes of its layer in the file."""
    layers, joined = file.every, {}
    for name, change in live.items():
        if name not in layers:
            raise ValueError(
                f"{file.path} has no layer {name!r} of the model; it has {', '.join(list(layers)[:3])}. "
                "Give a checkpoint of this model."
            )
        safe = prescribe({name: layers[name]}, found, lambda _, change=change: change.eps, unsafe=False)
        joined[name] = _joined(safe.get(name), change, layers[name])
    return joined


def write(plan: MendingPlan, output: Path) -> None:
    """Write the whole mended file or nothing. The original is not changed, unless it is ``output``.

    The new file is read again and compared with the plan before it gets its name.

    Raises:
        ValueError: If torch does not load the file as tensors and plain values, or the new file differs from the plan.
        OSError: If ``output`` cannot be written.
        ModuleNotFoundError: If the file is one of torch.save, and torch is not installed.
    """
    source = Path(plan.file.path)
    edits = list(_edits(plan, *structure(source)))
    with replacing(output, like=source) as file:
        writer_of(plan.file)(source, file, edits, plan.prefixes)
        file.flush()
        _verify(plan, file.name)


def writer_of(file: Checkpoint) -> Writer:
    """The function that writes a copy of a file with edits and without prefixes of names."""
    if file.format == "safetensors":
        from batchnorm.doctor.mending import safetensors_files as files
    else:
        from batchnorm.doctor.mending import torch_files as files
    return files.write


def _verify(plan: MendingPlan, written: str) -> None:
    remedy = "Nothing was written. Load the file, correct that layer, and save it again with torch.save(state, path)."
    try:
        now = checkpoint.read(written)
    except ValueError as error:
        reason = str(error).removeprefix(f"{written}: ")
        raise ValueError(f"{plan.file.path}: a mended copy could not be read: {reason} {remedy}") from error
    if [*map(list, now.copies.values())] != [*map(list, plan.after.copies.values())]:
        raise ValueError(f"{plan.file.path}: a mended copy had other layers. {remedy}")
    new, old = now.every, plan.after.every
    for after, (name, before) in zip(new.values(), old.items(), strict=True):
        if not is_same(after, before):
            raise ValueError(f"{plan.file.path}: layer {name!r} of a mended copy did not read as written. {remedy}")


def _with_layers(file: Checkpoint, change: Callable[[str, Stored], Stored]) -> Checkpoint:
    copies = {
        copy: {name: change(file.named(copy, name), stored) for name, stored in layers.items()}
        for copy, layers in file.copies.items()
    }
    return replace(file, layers=next(iter(copies.values()), {}), copies=copies)


def _findings(file: Checkpoint, selection: Selection | None) -> tuple[Finding, ...]:
    """The findings in every copy, also in copies that repeat another."""
    rules = [rule for rule in RULES.values() if selection is None or selection.takes(rule.code)]
    evidence = Evidence(file.path, file.every, file=file)
    results = (each for copy, part in parts(evidence, equal=True) for each in looks(copy, part, rules))
    found = [finding for _, findings, _ in results for finding in findings]
    found = [finding for finding in found if selection is None or not selection.silences(finding)]
    # fix removes only prefixes of wrappers; "state_dict." belongs to the file, "model." to a model in a model
    wraps = _without_wrappers(file.prefix) != file.prefix
    return order(finding for finding in found if finding.code != "BN507" or wraps)


def _joined(change: Change | None, live: Change, stored: Stored) -> Change:
    """The change of a layer in the file, joined with the numbers of the same layer that changed in the model."""
    after = stored if change is None else change.after
    new: dict[str, Any] = {key: getattr(live.after, key) for key in TENSORS if changed(live.before, live.after, key)}
    if live.before.num_batches_tracked != live.after.num_batches_tracked:
        new["num_batches_tracked"] = live.after.num_batches_tracked
    # measured values do not fit into half precision
    dtypes = {key: "float32" if key in new and dtype in HALF else dtype for key, dtype in after.dtypes.items()}
    words = tuple(dict.fromkeys((*(change.words if change else ()), *live.words)))
    return Change(
        layer=live.layer, before=stored, after=replace(after, **new, dtypes=dtypes), words=words, eps=live.eps
    )


def structure(path: Path) -> tuple[list[Copy], list[Entry]]:
    """The copies of the model in a file, with the keys of their layers; and all tensors of the file."""
    with path.open("rb") as file:
        kind = detection.of(file)
        file.seek(0)
        tensors = list(entries(_READERS[kind](file)[0]))
    return find_copies(find_layers(tensors), tensors), tensors


def _prefixes(copies: Sequence[Copy], tensors: Sequence[Entry]) -> dict[Keys, str]:
    """Keys that lead to a dict with layers: the wrappers' prefix, if all names in the dict begin with it."""
    prefixes = {}
    for path in {layer.path for copy in copies for layer in copy.layers.values()}:
        names = [entry.key for entry in tensors if entry.path == path]
        prefix = _wrappers(names[0])
        if prefix and all(name.startswith(prefix) for name in names):
            prefixes[path] = prefix
    return prefixes


def _wrappers(name: str) -> str:
    """The wrappers' prefix at the beginning of a name; "" if there is none."""
    length = 0
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w, length)), ""):
        length += len(wrapper)
    return name[:length]


def _without_wrappers(prefix: str) -> str:
    """A path in the file without wrappers: "state_dict." for "state_dict.module."."""
    words = [f"{word}." for word in prefix.split(".") if word]
    return "".join(word for word in words if word not in _WRAPPERS)


def _edits(plan: MendingPlan, copies: Sequence[Copy], tensors: Sequence[Entry]) -> Iterator[Edit]:
    # names as they are in the file: if the layer has no name, its weight is "weight" or ".weight"
    names = {(entry.path, entry.words): entry.key.removesuffix(entry.leaf) for entry in tensors}
    places = {
        plan.file.named(name, layer): (*found.path, names[found.path, found.words])
        for name, copy in zip(plan.file.copies, copies, strict=True)
        for layer, found in copy.layers.items()
    }
    for path, change in plan.changes.items():
        *keys, base = places[path]
        for leaf in (*TENSORS, "num_batches_tracked"):
            yield from _edit(change, leaf, (*keys, f"{base}{leaf}"))


def _edit(change: Change, leaf: str, key: Keys) -> Iterator[Edit]:
    old, new = getattr(change.before, leaf), getattr(change.after, leaf)
    dtype = change.after.dtypes.get(leaf, "")
    if leaf == "num_batches_tracked":
        if old != new:
            yield Edit(key, dtype or "int64", None, count=new)
        return
    channels = tuple(changed(change.before, change.after, leaf))
    if channels or dtype != change.before.dtypes.get(leaf, ""):
        yield Edit(key, dtype, new, channels)
