"""One row of results: everyone who can compute a case, in the same rounds, each as a multiple of the memory limit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peers.worker import arrays

from batchnorm import bench, paired_timing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from goals import Entry
    from peers import Peer

AGREES = 0.02  # bfloat16 has two and a half digits


def layer_row(entry: Entry, peers: Sequence[Peer], *, compiled: bool, **limits: Any) -> dict[str, Any]:
    """Our layer against torch's, compiled where asked, and the peers."""
    case = bench.CASES[entry.case]
    inputs = bench.CaseInputs.of(entry.shape, entry.dtype, channels_last=entry.channels_last)
    field = bench.contestants(case, inputs) | _more_of_torch(entry, inputs, compiled=compiled)
    present, absent = _prepared(entry, peers)
    with paired_timing.others([peer.pid for peer in peers]) as busy:
        run = paired_timing.race(field | present, **limits)
    parts = {"limit": case.limit}
    if entry.channels_last and case.reread:
        parts["floor"] = {**case.limit, "read": case.reread}
    named = [name for name in run.seconds if name not in {"copy", "triad", "read"}]
    return {
        "case": entry.case,
        "words": case.words,
        "shape": list(entry.shape),
        "dtype": entry.dtype,
        "channels_last": entry.channels_last,
        "bytes": entry.bytes,
        **{name: {"is": _spelled(sum_), "ms": 1e3 * run.time(sum_).median} for name, sum_ in parts.items()},
        "rounds": len(run.seconds["ours"]),
        **busy,
        "contestants": {name: times(run, name, parts) for name in named}
        | {name: {"not measured": why} for name, why in absent.items()},
    }


def times(run: paired_timing.Race, name: str, parts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Milliseconds, the ratio of this time to ours, and its multiples of limits, each with quartiles over rounds."""
    own = {name: 1}
    result: dict[str, Any] = {"ms": _spread(run.time(own), 1e3)}
    if name != "ours":
        result["ratio"] = _spread(run.ratio(own, {"ours": 1}))
    return result | {f"to_{limit}": _spread(run.ratio(own, sum_)) for limit, sum_ in parts.items()}


def _spread(spread: paired_timing.Spread, unit: float = 1.0) -> dict[str, float]:
    return {"median": unit * spread.median, "low": unit * spread.low, "high": unit * spread.high}


def _spelled(sum_: Mapping[str, int]) -> str:
    return " + ".join(name if times == 1 else f"{times} {name}" for name, times in sum_.items())


def _more_of_torch(entry: Entry, inputs: bench.CaseInputs, *, compiled: bool) -> dict[str, paired_timing.Contestant]:
    """torch.nn's layer with sum and ReLU in place, and the whole compiled, before anything is timed."""
    case = bench.CASES[entry.case]
    field = {}
    if case.relu:
        layer = bench.layers(entry.shape, entry.dtype, case)["torch"]
        run = bench.composed(case, layer, inplace=True)
        field["torch in place"] = paired_timing.timed(bench.call(case, run, list(layer.parameters()), inputs))
    if compiled:
        torch._dynamo.reset()  # cases are different functions to us, but one code object to the compiler
        layer = bench.layers(entry.shape, entry.dtype, case)["torch"]
        run = torch.compile(bench.composed(case, layer), fullgraph=True, dynamic=False)
        field["torch.compile"] = paired_timing.timed(bench.call(case, run, list(layer.parameters()), inputs))
    return field


def question(entry: Entry) -> dict[str, Any]:
    """The case as the pipe carries it."""
    case = bench.CASES[entry.case]
    flags = {name: getattr(case, name) for name in ("train", "relu", "residual", "backward")}
    where = {"shape": list(entry.shape), "dtype": entry.dtype, "channels_last": entry.channels_last}
    return {"case": entry.case, **where, **flags}


def _prepared(entry: Entry, peers: Sequence[Peer]) -> tuple[dict[str, paired_timing.Contestant], dict[str, str]]:
    """Peers that compute the case, and why the others do not; a wrong result is a reason, too."""
    present, absent, asked = {}, {}, question(entry)
    expected: dict[str, float] = {}
    for peer in peers:
        if peer.missing:
            absent[peer.name] = f"not installed: {peer.missing}"
            continue
        answer = peer.prepare(asked)
        if "unsupported" in answer:
            absent[peer.name] = answer["unsupported"]
            continue
        expected = expected or _means(asked)
        if wrong := [k for k, value in expected.items() if not abs(answer["means"][k] - value) <= AGREES * value]:
            absent[peer.name] = f"its {' and '.join(wrong)} differ from torch's"
        else:
            present[peer.name] = peer.round
    return present, absent


def _means(asked: Mapping[str, Any]) -> dict[str, float]:
    """Mean absolute y and gradient of x for the inputs that peers use, computed by torch.nn in float32."""
    case = bench.CASES[asked["case"]]
    given = [torch.from_numpy(values) for values in arrays({**asked, "channels_last": False})]
    inputs = bench.CaseInputs(given[0].requires_grad_(), given[1].requires_grad_(), given[2])
    layer = bench.layers(asked["shape"], "float32", case)["torch"]
    run = bench.composed(case, layer)
    y = run(inputs.x, inputs.residual) if case.residual else run(inputs.x)
    found = {"y": y.detach()}
    if case.backward:
        found["dx"] = torch.autograd.grad(y, inputs.x, inputs.grad)[0]
    return {name: values.abs().double().mean().item() for name, values in found.items()}
