"""The second reading of other people's files, and the judges of the doctor's findings, on files made for it."""

import hashlib
import json
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from batchnorm.rules import Finding, Severity

ACCEPTANCE = Path(__file__).parents[1] / "acceptance"
sys.path.append(str(ACCEPTANCE))

import independent  # noqa: E402
import judges  # noqa: E402
import precision  # noqa: E402


def finding(code, layer, channels=(), measured="", remedy="", severity=Severity.WARNING):
    return Finding(layer, measured, "", "", remedy, channels=tuple(channels), code=code, severity=severity)


def verdict(found, path, name, code, channels=(), **words):
    named = {name: layer for layer in found for name in layer.names}
    return precision.verdict_of(finding(code, name, channels, **words), found, named.get(name), path)[0]


def saved(tmp_path, norm, **changes):
    state = norm.state_dict()
    with torch.no_grad():
        for key, value in changes.items():
            state[key].copy_(torch.as_tensor(value))
    torch.save({"model": OrderedDict((f"body.bn.{key}", value) for key, value in state.items())}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def names(path):
    return [line.partition("#")[0].partition("==")[0].split()[-1] for line in precision.lines(path)]


def test_a_third_of_the_names_is_held_out_by_their_hash():
    held_out, tuning = names(ACCEPTANCE / "held_out.txt"), names(ACCEPTANCE / "tuning.txt")
    for name, is_held_out in [(n, True) for n in held_out] + [(n, False) for n in tuning]:
        assert (int(hashlib.sha256(name.lower().encode()).hexdigest(), 16) % 3 == 0) is is_held_out, name
    assert set(names(ACCEPTANCE / "requirements-tuning.txt")) <= set(tuning)
    assert len(held_out) > len(tuning) / 4


def test_a_package_that_is_held_out_is_not_opened(tmp_path):
    (tmp_path / names(ACCEPTANCE / "held_out.txt")[-1].replace("-", "_")).mkdir()
    with pytest.raises(SystemExit, match="held out"):
        list(precision.files([tmp_path]))


def test_the_second_reading_of_a_torch_file(tmp_path):
    [layer] = independent.layers(saved(tmp_path, nn.BatchNorm2d(3), running_var=[1.0, 2.0, 3.0], num_batches_tracked=7))
    assert layer.names == ("model.body.bn", "body.bn")
    assert layer.var.tolist() == [1, 2, 3]
    assert (layer.count, layer.eps, layer.channels) == (7, None, 3)


def test_an_object_beside_the_state_is_not_made(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state": nn.BatchNorm1d(2).state_dict(), "trap": Trap()}, tmp_path / "a.pt")
    [layer] = independent.layers(tmp_path / "a.pt")
    assert layer.channels == 2
    assert not (tmp_path / "ran").exists()


def test_a_denormal_is_no_fault_beside_eps_and_one_without(tmp_path):
    path = saved(tmp_path, nn.BatchNorm1d(2), running_var=[5.6e-45, 1.0])
    [layer] = independent.layers(path)
    assert verdict([layer], path, "body.bn", "BN104", [0]) == "false"
    assert verdict([layer], path, "body.bn", "BN104", [0], severity=Severity.INFO) == "true"
    without = independent.replace(layer, eps=0.0)
    assert verdict([without], path, "body.bn", "BN104", [0]) == "true"


@pytest.mark.parametrize(("version", "expected"), [(None, "false"), (2, "true")])
def test_a_missing_counter_is_what_strict_loading_says(tmp_path, version, expected):
    state = OrderedDict((k, v) for k, v in nn.BatchNorm2d(2).state_dict(prefix="bn.").items() if "tracked" not in k)
    if version:
        state._metadata = OrderedDict({"": {"version": 1}, "bn": {"version": version}})
    torch.save(state, tmp_path / "a.pt")
    found = independent.layers(tmp_path / "a.pt")
    assert verdict(found, tmp_path / "a.pt", "bn", "BN112") == expected


def test_a_dead_channel_varies_less_than_the_others_or_is_cut_off_by_a_relu():
    gamma, beta = np.array([1.0, 1e-5, 1.0, 1e-5]), np.array([0.0, 0.0, -3.0, 2.0])
    layer = independent.Layer(("bn",), gamma, beta, np.zeros(4), np.ones(4), eps=1e-5)
    behind = independent.replace(layer, readers=frozenset({"Relu"}))
    path = Path("a.onnx")
    assert verdict([layer], path, "bn", "BN106", [1], remedy="prune them") == "true"
    assert verdict([layer], path, "bn", "BN106", [0, 1]) == "unjudged"
    assert verdict([behind], path, "bn", "BN106", [0, 1]) == "false"
    assert verdict([behind], path, "bn", "BN106", [2]) == "true"
    assert verdict([behind], path, "bn", "BN106", [3], remedy="prune them") == "useless"
    assert judges.rarely_active(behind) == [2]


def test_few_updates_are_disproved_by_a_small_variance(tmp_path):
    path = saved(tmp_path, nn.BatchNorm1d(2), running_var=[0.5, 1.0], num_batches_tracked=3)
    assert verdict(independent.layers(path), path, "body.bn", "BN114") == "false"
    path = saved(tmp_path, nn.BatchNorm1d(2), running_var=[0.8, 1.0], num_batches_tracked=3)
    assert verdict(independent.layers(path), path, "body.bn", "BN114") == "true"


def test_two_heads_on_one_trunk_share_statistics_and_one_layer_at_two_places_shares_all(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    def judged(second, gamma):
        tensors = {name: np.ones(3, np.float32) for name in ("g", "g2", "b", "m", "v")}
        nodes = [
            helper.make_node("Relu", ["x"], ["y"]),
            helper.make_node("BatchNormalization", ["x", "g", "b", "m", "v"], ["first"], name="first"),
            helper.make_node("BatchNormalization", [second, gamma, "b", "m", "v"], ["second"], name="second"),
        ]
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 4]) for n in ("x", "first", "second")]
        kept = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], kept)
        onnx.save(helper.make_model(graph), str(tmp_path / "a.onnx"))
        found = independent.layers(tmp_path / "a.onnx")
        return verdict(found, tmp_path / "a.onnx", "first", "BN302")

    assert judged("x", "g2") == "false"
    assert judged("y", "g") == "true"


def test_a_row_is_as_true_as_its_best_finding():
    rows = [
        {"package": "a", "file": "b", "code": code, "row": "c", "verdict": said}
        for code, said in (("BN104", "false"), ("BN104", "true"), ("BN105", "false"), ("BN105", "useless"))
    ]
    assert precision.printed(rows) == {"true": 1, "useless": 1}
    assert precision.cell(precision.printed(rows)) == "2 / 0 / 1 / 0"


def test_judgements_come_back_from_the_file_as_they_were():
    row = precision.Judged("a", "b.pt", "BN104", "info", "bn", "x", "batchnorm fix", "Machines differ.", "true", "so")
    columns = {"before": {"commit": "c", "findings": [precision.asdict(row), precision.asdict(row)]}}
    text = precision.packed(columns)
    assert text.count("Machines differ.") == 1
    assert precision.unpacked(json.loads(text)) == columns
