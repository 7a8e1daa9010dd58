"""One table of activations, and all that has to agree with it: kernels, surgery, oracle, documents."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import oracle_activations
import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, convert
from batchnorm.kernels import Layer, cpu, reference, torch_batch_norm, triton, triton_blocks
from batchnorm.kernels.activations import NAMES, TABLE, activate, derivative, has_parameter, parameter

ROOT = Path(__file__).parents[1]
names = pytest.mark.parametrize("name", NAMES)
UNKNOWN = Layer(torch.ones(3), torch.zeros(3), 1e-5, "softsign", 0.0)
X = torch.randn(4, 3)


def test_the_numbers_are_those_of_the_compiled_kernels():
    native = pytest.importorskip("batchnorm._native", reason="built without a compiler")
    assert dict(enumerate(native.activations())) == {0: "none"} | {row.number: name for name, row in TABLE.items()}


def test_the_numbers_are_those_of_the_kernels_source():
    source = (ROOT / "native" / "arithmetic.hpp").read_text(encoding="utf-8")
    (listed,) = re.findall(r"enum class Act : int \{ (.*?) \}", source)
    (named,) = re.findall(r"ACTS\[\] = \{(.*?)\}", source)
    assert listed.split(", ") == re.findall(r'"(\w+)"', named) == ["none", *NAMES]
    assert [row.number for row in TABLE.values()] == list(range(1, len(TABLE) + 1))


def test_each_formula_of_the_kernels_source_has_a_case_for_each_that_has_no_loop_of_its_own():
    source = (ROOT / "native" / "activations.hpp").read_text(encoding="utf-8")
    loops = [name.lower() for name in re.findall(r"^struct (\w+) \{\n    template", source, re.MULTILINE)]
    assert loops == ["identity", "relu"]
    switches = re.findall(r"switch \(layer\.act\) \{(.*?)default:", source, re.DOTALL)
    assert len(switches) == source.count("switch (") == 4  # values and gradients, of float and of double
    for cases in switches:
        assert re.findall(r"case Act::(\w+):", cases) == [name for name in NAMES if name not in loops]


@pytest.mark.parametrize("function", ["_activate", "_derivative"])
def test_triton_has_a_formula_for_each(function):
    tree = ast.parse(Path(triton_blocks.__file__).read_text(encoding="utf-8"))
    (body,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    asked = [node for node in ast.walk(body) if isinstance(node, ast.Compare) and ast.unparse(node.left) == "act"]
    compared = [node.comparators[0].value for node in asked if isinstance(node.ops[0], ast.Eq)]
    assert sorted(compared) == sorted(NAMES)


def test_the_tests_oracle_has_each():
    assert oracle_activations.NAMES == NAMES
    assert {name: row.default for name, row in TABLE.items() if row.parameter} == oracle_activations.PARAMETERS


@names
def test_torchs_module_and_functions_compute_what_the_table_says(name):
    row, p = TABLE[name], torch.linspace(-5, 5, 101, dtype=torch.float64)
    y = activate(p, name, row.default)
    torch.testing.assert_close(row.module()(p), y)
    for function in row.functions:
        torch.testing.assert_close(function(p.clone()), y)
    for method in row.methods:
        torch.testing.assert_close(getattr(p.clone(), method)(), y)
    torch.testing.assert_close(y.numpy(), oracle_activations.value(p.numpy(), name, row.default))
    slope = oracle_activations.slope(p.numpy(), name, row.default)
    torch.testing.assert_close(derivative(p, name, row.default).numpy(), slope)
    module = row.module()
    for option, value in row.options.items():
        assert getattr(module, option) == value


@names
def test_surgery_finds_each_and_puts_it_back(name):
    written = TABLE[name].module()
    model = convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), written), fuse=True)
    assert model[1].act == name
    assert model[1].act_param == TABLE[name].default
    for function in TABLE[name].functions:
        fused = convert(Applying(function), fuse=True)
        assert fused.norm.act == name


class Applying(nn.Module):
    """A layer and a function behind it."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.function = nn.BatchNorm1d(3), function

    def forward(self, x):
        return self.function(self.norm(x))


def test_documents_name_each():
    for text in (BatchNorm1d.__doc__, (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")):
        assert all(f'"{name}"' in text or f"`{name}`" in text for name in NAMES), [n for n in NAMES if n not in text]


# --- unknown ones -----------------------------------------------------------------------------------------

refused = pytest.raises(ValueError, match=r"act must be None or one of relu, leaky_relu, .*got 'softsign'")


@pytest.mark.parametrize("kernel", [reference, pytest.param(
    cpu, marks=pytest.mark.skipif(cpu.INSTRUCTION_SET is None, reason="built without a compiler")
)], ids=["reference", "native"])  # fmt: skip
def test_a_kernel_refuses_an_activation_that_is_not_in_the_table(kernel):
    for call in oracle_activations.calls(kernel, X, X, UNKNOWN):
        with refused:
            call()


def test_torchs_batch_norm_refuses_it_too():
    with refused:
        torch_batch_norm.train(X, UNKNOWN, None, None)
    with refused:
        torch_batch_norm.normalize(X, reference.measure(X), UNKNOWN)


def test_triton_refuses_it_before_a_kernel_is_launched():
    with refused:
        triton._numbers(UNKNOWN)


@pytest.mark.parametrize("number", [-1, len(TABLE) + 1, 1000])
def test_the_compiled_kernels_refuse_a_number_that_they_do_not_have(number):
    native = pytest.importorskip("batchnorm._native", reason="built without a compiler")
    described, _kept = cpu._described(X, *reference.measure(X), UNKNOWN._replace(act=None))
    wrong = (*described[:9], number, 0.0)
    for call in (native.train, native.normalize, native.backward, native.sum_gradients, native.input_gradient):
        with pytest.raises(ValueError, match=r"act needs a number of activations\(\)"):
            call(*wrong, *_zeros(call)[len(wrong) :])


def _zeros(function):
    """A zero of its type for each argument of a function of the compiled module."""
    types = re.findall(r"arg\d*: (\w+)", function.__doc__.partition("->")[0])
    return [{"int": 0, "float": 0.0, "bool": False}[name] for name in types]


@pytest.mark.parametrize("act", ["relu6", "RELU", "", 3, ["relu"]])
def test_a_layer_refuses_it_when_it_is_made(act):
    with pytest.raises(ValueError, match="act must be None or one of relu"):
        BatchNorm1d(3, act=act)


@names
def test_a_parameter_is_refused_where_none_is_taken(name):
    if has_parameter(name):
        assert parameter(name, 0.25) == 0.25
        return
    with pytest.raises(ValueError, match=r"act_param belongs to leaky_relu or elu, got 0\.25"):
        parameter(name, 0.25)
