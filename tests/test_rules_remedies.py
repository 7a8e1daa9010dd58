"""A remedy is possible for its target: that of each rule, for files of every kind, for models, and for addresses."""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from planted import FAULTS, batches, diagnosis_of, trained
from test_rules_architecture import SICK as PLACES
from test_rules_batches import MODULE
from test_rules_batches import SICK as BATCHES
from test_rules_state import SICK as STATES
from test_rules_statistics import SICK as STATISTICS
from torch import nn

import batchnorm as bn
from batchnorm.checkpoint.stored import Checkpoint
from batchnorm.cli.fix_command import fix
from batchnorm.doctor import examine
from batchnorm.rules import RULES, Fix

SICK = {
    code: parts[0] if isinstance(parts, tuple) else parts
    for table in (STATISTICS, BATCHES, PLACES, STATES)
    for code, parts in table.items()
}
FILES = {
    "onnx": "my model.onnx",
    "safetensors": "my model.safetensors",
    "pt": "my model.pt",
    "pickle": "m.pkl",
    "pt2": "m.pt2",
}
WRITTEN = {"safetensors", "pt"}


def as_file(evidence, form):
    file = evidence.file or Checkpoint("", form, evidence.stored, {"": evidence.stored})
    return replace(evidence, target=FILES[form], file=replace(file, format=form), modules=None)


def test_a_pickled_module_is_saved_again_by_its_own_code():
    evidence = as_file(SICK["BN103"], "pt")
    (found,) = RULES["BN103"].findings(replace(evidence, file=replace(evidence.file, is_whole=True)))
    assert (found.fixable, found.remedy) == (Fix.NO, "load the model, mend it, and save it again")


def as_model(evidence, target):
    modules = evidence.modules or dict.fromkeys(evidence.stored, MODULE)
    return replace(evidence, target=target, file=None, modules=modules)


def commands(remedy):
    return re.findall(r"batchnorm fix .*", remedy)


def parsed(command):
    """The options of a command as the command line takes them."""
    context = fix.make_context("fix", shlex.split(command)[2:])
    return context.params


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("code", [code for code in SICK if RULES[code].needs in {("stored",), ("file",)}])
def test_a_file_is_mended_if_it_can_be_written_and_made_anew_if_not(code, form):
    evidence = as_file(SICK[code], form)
    for finding in RULES[code].findings(evidence):
        for command in commands(finding.remedy):
            assert form in WRITTEN, finding.remedy
            options = parsed(command)
            # numbers of data need the model; a file alone is given alone
            is_alone = options["target"] == FILES[form] and not options["data"]
            assert is_alone or (":" in options["target"] and options["weights"] == FILES[form])
        if form not in WRITTEN:
            assert finding.fixable is Fix.NO


@pytest.mark.parametrize("code", SICK)
def test_a_model_in_memory_is_no_target_of_a_command(code):
    for finding in RULES[code].findings(as_model(SICK[code], "MobileNetV2")):
        assert not commands(finding.remedy)


@pytest.mark.parametrize("code", SICK)
def test_an_address_keeps_its_weights_and_settings(code):
    target = "model.py:make --weights 'my model.pt' --set width=3"
    for finding in RULES[code].findings(as_model(SICK[code], target)):
        for command in commands(finding.remedy):
            options = parsed(command)
            assert (options["target"], options["weights"], options["given"]) == (
                "model.py:make",
                "my model.pt",
                ("width=3",),
            )


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_remedy_calls_is_there(name):
    for finding in diagnosis_of(name).findings:
        for call in re.findall(r"batchnorm\.(\w+)", finding.remedy):
            assert hasattr(bn, call), finding.remedy
        for path in re.findall(r"torch(?:\.\w+)+", finding.remedy):
            found = torch
            for part in path.split(".")[1:]:
                found = getattr(found, part)


def test_a_half_precision_onnx_file_is_not_told_to_be_trained_further():
    assert RULES["BN108"].findings(as_file(SICK["BN108"], "onnx")) == []
    assert RULES["BN108"].findings(as_file(SICK["BN108"], "pt"))


def test_the_cure_of_unsynchronized_layers_keeps_their_activations():
    """torch's convert_sync_batchnorm would lose them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), bn.BatchNorm2d(8, act="relu"))
    (found,) = [f for f in examine(model, batch_size=4, world_size=8).findings if f.code == "BN601"]
    assert found.remedy.startswith("batchnorm.convert(model, sync=True)")
    converted = bn.convert(model, sync=True)
    assert not [f for f in examine(converted, batch_size=4, world_size=8).findings if f.code == "BN601"]
    assert converted[1].act == "relu"


def test_a_recalibration_is_told_for_training_data_only():
    model = trained()
    with torch.no_grad():
        model.body[1].running_mean += 2 * model.body[1].running_var.sqrt()
    found = [finding for finding in examine(model, batches()).findings if finding.code in {"BN116", "BN209"}]
    assert {finding.code for finding in found} == {"BN116", "BN209"}
    assert all(finding.remedy.startswith("if these are training data: ") for finding in found)
