"""BN6: several processes."""

from dataclasses import replace

import pytest
from test_rules_batches import HEALTHY as ONE_PROCESS
from test_rules_batches import MODULE, findings
from torch import nn

import batchnorm
from batchnorm.doctor.measuring.model_evidence import modules_of
from batchnorm.replicas import Difference, Replicas
from batchnorm.reporting.severity import Severity
from batchnorm.rules.phrases import measure_again
from batchnorm.rules.rule_evidence import InputsApart, Loop, Ranks, Structure

PARALLEL = Structure(training=True, wrappers=("DistributedDataParallel",), broadcasts_buffers=True)
HEALTHY = replace(ONE_PROCESS, structure=Structure(training=True))


def processes(structure=PARALLEL, loop=None, **settings):
    return replace(HEALTHY, structure=structure, loop=loop, modules={"bn": replace(MODULE, **settings)})


@pytest.mark.parametrize(
    ("evidence", "told"),
    [
        (processes(loop=Loop(batch_size=4)), "4 examples in a process"),
        (processes(loop=Loop(batch_size=31, world_size=2)), "31 examples"),
        (processes(), "an unknown number of examples"),
        (processes(HEALTHY.structure, Loop(batch_size=4, world_size=8)), "no synchronization in bn; 4 examples"),
        (processes(HEALTHY.structure, Loop(batch_size=4)), None),
        (processes(loop=Loop(batch_size=32)), None),
        (processes(is_sync=True), None),
        (processes(frozen=True), None),
        (HEALTHY, None),
    ],
)
def test_small_batches_of_processes_that_do_not_synchronize(evidence, told):
    found = findings("BN601", evidence)
    assert len(found) == (told is not None)
    assert told is None or told in found[0].measured


@pytest.mark.parametrize(
    ("evidence", "severity"),
    [
        (processes(kind="SyncBatchNorm", is_sync=True), Severity.ERROR),
        (processes(HEALTHY.structure, Loop(batch_size=32, world_size=2), is_sync=True), Severity.ERROR),
        (processes(HEALTHY.structure, Loop(batch_size=32), is_sync=True), Severity.INFO),
        (processes(HEALTHY.structure, is_sync=True), Severity.INFO),
        (processes(None, is_sync=True), Severity.INFO),
        (processes(is_sync=True, syncs_on_cpu=True), None),
        (processes(is_sync=True, device="cuda"), None),
        (processes(is_sync=True, device="xpu"), None),
        (processes(is_sync=True, frozen=True), None),
        (processes(), None),
    ],
)
def test_synchronized_layers_on_a_cpu_are_an_error_only_with_several_processes(evidence, severity):
    assert [finding.severity for finding in findings("BN602", evidence)] == ([] if severity is None else [severity])


@pytest.mark.parametrize(
    ("broadcasts", "settings", "fires"),
    [
        (False, {}, True),
        (True, {}, False),
        (None, {}, False),
        (False, {"is_sync": True}, False),
        (False, {"frozen": True}, False),
    ],
)
def test_processes_with_statistics_of_their_own(broadcasts, settings, fires):
    found = findings("BN603", processes(replace(PARALLEL, broadcasts_buffers=broadcasts), **settings))
    assert bool(found) is fires
    assert not found or found[0].layer == ""


def test_layers_of_this_package_synchronize_on_a_cpu():
    assert not findings("BN602", processes(is_sync=True, syncs_on_cpu=True))


@pytest.mark.parametrize("code", ["BN601", "BN603"])
def test_the_cure_is_to_convert_with_sync(code):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    evidence = {"BN601": {"world_size": 2, "batch_size": 4}, "BN603": {}}[code]
    structure = Structure(training=True, wrappers=("DistributedDataParallel",), broadcasts_buffers=False)

    def found(model):
        modules, loop = modules_of(model), Loop(**evidence) if evidence else None
        return findings(code, replace(HEALTHY, structure=structure, modules=modules, loop=loop))

    (finding,) = found(model)
    assert "batchnorm.convert(model, sync=True)" in finding.remedy
    assert not found(batchnorm.convert(model, sync=True))


def test_the_cure_of_sync_on_a_cpu_is_ours():
    model = nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4))
    (finding,) = findings("BN602", replace(HEALTHY, modules=modules_of(model)))
    assert "batchnorm.convert(model, sync=True)" in finding.remedy
    assert not findings("BN602", replace(HEALTHY, modules=modules_of(batchnorm.convert(model, sync=True))))


def compared(*differences, structure=PARALLEL, inputs=None, **settings):
    ranks = Ranks(Replicas((0, 1), 1, differences), inputs or {})
    return replace(processes(structure, Loop(batch_size=64, world_size=2), **settings), ranks=ranks)


def statistics(in_sd, what="running_mean"):
    return Difference("bn", what, ("version 1", "version 2"), 0.5, in_sd)


def test_layers_that_differ_between_ranks_are_an_error_with_what_each_rank_has():
    (found,) = findings("BN604", compared(Difference("bn", "eps", ("1e-05", "0.001"))))
    assert (found.layer, found.severity) == ("bn", Severity.ERROR)
    assert found.measured == "eps: 1e-05 on rank 0; 0.001 on rank 1"
    (found,) = findings("BN604", compared(Difference("", "layer 2 in order", ("'bn'", "no layer"))))
    assert found.measured == "layer 2 in order: 'bn' on rank 0; no layer on rank 1"
    assert not findings("BN604", compared(statistics(3.0)))


@pytest.mark.parametrize(("in_sd", "fires"), [(0.3, True), (0.1, False), (float("nan"), True), (None, False)])
def test_statistics_that_differ_between_ranks_are_told_in_sd(in_sd, fires):
    found = findings("BN605", compared(statistics(in_sd), statistics(0.02, "running_var")))
    assert bool(found) is fires
    assert not fires or found[0].measured == f"running_mean {in_sd:.2g} sd apart on ranks 0, 1"


def test_buffers_that_are_not_broadcast_are_told_with_what_is_measured():
    unshared = replace(PARALLEL, broadcasts_buffers=False)
    for differences, words in [
        ((), "; equal on all ranks so far"),
        ((statistics(0.04),), "; up to 0.04 sd apart (bn)"),
        ((statistics(0.04), statistics(float("nan"), "running_var")), "; up to nan sd apart (bn)"),
    ]:
        (found,) = findings("BN603", compared(*differences, structure=unshared))
        assert found.measured == "broadcast_buffers=False, statistics in bn" + words


@pytest.mark.parametrize(
    ("in_sd", "examples", "settings", "fires"),
    [
        (0.3, 512, {}, True),  # 4 sqrt(2/512) = 0.25
        (0.24, 512, {}, False),
        (0.21, 10_000, {}, True),
        (0.19, 10_000, {}, False),
        (0.3, 512, {"is_sync": True}, False),
        (0.3, 512, {"frozen": True}, False),
    ],
)
def test_ranks_with_other_data_are_found_whatever_the_batch_size(in_sd, examples, settings, fires):
    found = findings("BN601", compared(inputs={"bn": InputsApart(in_sd, examples)}, **settings))
    assert bool(found) is fires
    assert not fires or f"its inputs differs between ranks by {in_sd:.2g} sd in bn" in found[0].measured


@pytest.mark.parametrize("evidence", [processes(), processes(HEALTHY.structure, Loop(world_size=2))])
def test_several_processes_measure_again_together(evidence):
    assert measure_again(evidence) == 'batchnorm.recalibrate(model, loader, group="all") on all ranks'
    assert measure_again(HEALTHY) == "batchnorm.recalibrate(model, loader)"
