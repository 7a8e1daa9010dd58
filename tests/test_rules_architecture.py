"""BN3: neighbours that make batch norm useless or wrong, by hand and as read from models."""

from dataclasses import replace

import pytest
import torch
from planted import images, trained
from small_networks import Written
from test_rules_batches import HEALTHY as WITHOUT_GRAPH
from test_rules_batches import MODULE, findings, the_finding
from torch import nn

import batchnorm as bn
from batchnorm.doctor import examine
from batchnorm.doctor.measuring.neighbours_in_code import graph_of
from batchnorm.kernels.activations import TABLE
from batchnorm.rules import RULES
from batchnorm.rules.rule_evidence import Graph, Structure

CODES = [code for code in RULES if code.startswith("BN3")]
HEALTHY = replace(WITHOUT_GRAPH, graph=Graph(calls={"bn": 1}), structure=Structure(training=False))


def graph(**known):
    return replace(HEALTHY, graph=Graph(**known))


SICK = {
    "BN301": (graph(biased={"bn": "conv"}), "'conv' before it has a bias"),
    "BN302": (graph(calls={"bn": 2}), "used at 2 places"),
    "BN303": (graph(behind_dropout={"bn": "drop"}), "'drop' is before it"),
    "BN304": (graph(behind_batch_norm={"bn": "first"}), "its input is the result of 'first'"),
}


@pytest.mark.parametrize("code", CODES)
def test_a_sick_place_is_found_and_a_healthy_one_is_not(code):
    evidence, measured = SICK[code]
    assert the_finding(code, evidence, "bn", measured).measured == measured
    assert findings(code, HEALTHY) == []


def test_a_bias_before_a_frozen_layer_has_an_effect():
    frozen = {"bn": replace(MODULE, training=False, frozen=True)}
    assert findings("BN301", replace(SICK["BN301"][0], modules=frozen)) == []
    model = bn.freeze(trained(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), data=[torch.randn(32, 3)])).train()
    x = torch.randn(8, 3)
    before = model(x)
    with torch.no_grad():
        model[0].bias += 1
    assert not torch.allclose(model(x), before)


def test_a_layer_under_two_names_counts_as_two_places():
    names = {"bn": ("bn", "other.bn")}
    evidence = replace(HEALTHY, graph=Graph(), structure=Structure(training=False, names=names))
    assert [finding.measured for finding in findings("BN302", evidence)] == ["used at 2 places"]


# -- as read from models -----------------------------------------------------------------------------------------


def conv(bias=True):
    return nn.Conv2d(3, 3, 1, bias=bias)


def norm():
    return nn.BatchNorm2d(3)


RELU = nn.functional.relu
BIASED = {
    "in a chain": (nn.Sequential(conv(), norm()), {"1": "0"}),
    "linear": (nn.Sequential(nn.Flatten(), nn.Linear(300, 3), nn.BatchNorm1d(3)), {"2": "1"}),
    "across modules": (nn.Sequential(nn.Sequential(conv()), nn.Sequential(norm())), {"1.0": "0.0"}),
    "in a forward": (Written(lambda m, x: m.b(m.c(x)), c=conv(), b=norm()), {"b": "c"}),
    "without bias": (nn.Sequential(conv(bias=False), norm()), {}),
    "behind an activation": (nn.Sequential(conv(), nn.ReLU(), norm()), {}),
    "also read elsewhere": (Written(lambda m, x: m.b(y := m.c(x)) + y, c=conv(), b=norm()), {}),
    "called elsewhere": (Written(lambda m, x: m.b(m.c(x)) + RELU(m.c(x)), c=conv(), b=norm()), {}),
    "batch norm first": (nn.Sequential(norm(), conv()), {}),
}
DROPPED = {
    "in a chain": (nn.Sequential(nn.Dropout(0.3), norm()), {"1": "0"}),
    "across modules": (nn.Sequential(nn.Sequential(conv(), nn.Dropout2d(0.3)), nn.Sequential(norm())), {"1.0": "0.1"}),
    "behind ReLU and pooling": (nn.Sequential(nn.Dropout(0.3), nn.ReLU(), nn.MaxPool2d(2), norm()), {"3": "0"}),
    **{
        f"behind {name}": (nn.Sequential(nn.Dropout(0.3), each.module(), norm()), {"2": "0"})
        for name, each in TABLE.items()
    },
    "as a function": (
        Written(lambda m, x: m.b(nn.functional.dropout(x, 0.3, m.training)), b=norm()),
        {"b": "F.dropout"},
    ),
    "a keyword": (Written(lambda m, x: m.b(m.act(input=m.d(x))), d=nn.Dropout(), act=nn.ReLU(), b=norm()), {}),
    "of nothing": (nn.Sequential(nn.Dropout(0.0), norm()), {}),
    "that never drops": (Written(lambda m, x: m.b(nn.functional.dropout(x, 0.3, False)), b=norm()), {}),
    "mixed by a convolution": (nn.Sequential(nn.Dropout(0.3), conv(), norm()), {}),
    "behind batch norm": (nn.Sequential(norm(), nn.Dropout(0.3)), {}),
}
TWICE = {
    "in a chain": (nn.Sequential(norm(), norm()), {"1": "0"}),
    "read elsewhere too": (Written(lambda m, x: m.b(y := m.a(x)) + y, a=norm(), b=norm()), {}),
    "a ReLU between": (nn.Sequential(norm(), nn.ReLU(), norm()), {}),
}
PLACES = [
    *((name, model, "biased", found) for name, (model, found) in BIASED.items()),
    *((name, model, "behind_dropout", found) for name, (model, found) in DROPPED.items()),
    *((name, model, "behind_batch_norm", found) for name, (model, found) in TWICE.items()),
]


@pytest.mark.parametrize(
    ("name", "model", "part", "found"), PLACES, ids=[f"{part} {name}" for name, _, part, _ in PLACES]
)
@pytest.mark.parametrize("example", [None, images(4)], ids=["by the code alone", "with an example"])
def test_what_stands_before_a_layer_is_read_from_the_code(name, model, part, found, example):
    assert getattr(graph_of(model, example), part) == found


def test_calls_are_counted_on_the_example_and_shared_layers_are_found():
    shared = norm()
    model = Written(lambda m, x: m.b(m.c(m.b(x))), b=shared, c=conv(bias=False))
    assert graph_of(model, images(4)).calls == {"b": 2}
    assert graph_of(model).calls is None
    assert [f.layer for f in examine(trained(model), example=images(4)).findings if f.code == "BN302"] == ["b"]
    two_names = trained(nn.Sequential(shared, conv(bias=False), shared))
    assert [f.layer for f in examine(two_names).findings if f.code == "BN302"] == ["0"]


def test_a_bias_before_batch_norm_has_no_effect_in_train_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(32, 3).double()
    before = model(x)
    with torch.no_grad():
        model[0].bias += 7
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("model", [nn.Linear(3, 2), nn.Sequential()])
def test_a_model_without_batch_norm_has_an_empty_graph(model):
    assert graph_of(model, torch.randn(2, 3)) == Graph()
