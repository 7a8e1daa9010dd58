"""The fixtures for other people's tests: what passes, what fails, what is said, and that nothing heavy is loaded."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.integrations.invariance import dependence, rounding

pytest_plugins = ["pytester"]

MODELS = """
    import torch, batchnorm as bn
    from torch import nn

    def healthy():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
        bn.recalibrate(model, [torch.randn(256, 3, 8, 8)])
        return model.eval()

    def data():
        torch.manual_seed(1)
        return [torch.randn(64, 3, 8, 8) for _ in range(4)]
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs a test file of somebody who has the plugin, whether or not this installation has its entry point."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    bn.examine(nn.BatchNorm1d(2))  # what is loaded inside is unloaded afterwards, and operators cannot be made twice
    dependence(nn.Linear(2, 2), torch.randn(2, 2))

    def run_it(test: str) -> pytest.RunResult:
        # the process that runs this test has the plugin loaded already
        loaded = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
        pytester.makeini(f"[pytest]\nfilterwarnings =\n    error\n    {loaded}")
        pytester.makepyfile(models=MODELS, test_theirs="from models import *\n" + test)
        return pytester.runpytest_inprocess("-p", "batchnorm.integrations.pytest", "-q")

    return run_it


def test_a_healthy_model_passes_with_and_without_data(run) -> None:
    result = run("""
def test_it(assert_batchnorm_healthy):
    assert_batchnorm_healthy(healthy())
    assert_batchnorm_healthy(healthy(), data(), fail_on="warning")
""")
    result.assert_outcomes(passed=1)


def test_a_sick_model_fails_with_what_was_found_and_what_to_do(run) -> None:
    result = run("""
def test_it(assert_batchnorm_healthy):
    model = healthy()
    model[1].running_var[2] = -1
    assert_batchnorm_healthy(model)
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*Sequential has * of batch norm:*", "*BN103 *  1: * (limit: *)*", "      *", "      *"]
    )
    result.stdout.no_fnmatch_line("*def check*")


def test_findings_can_be_ignored_and_warnings_taken_seriously(run) -> None:
    result = run("""
import pytest

def sick():
    model = healthy()
    model[1].running_var[2] = -1
    return model

def test_codes(assert_batchnorm_healthy):
    assert_batchnorm_healthy(sick(), ignore=["BN103", "BN102"])
    assert_batchnorm_healthy(sick(), ignore="BN1")
    assert_batchnorm_healthy(sick(), ignore="negative-variance")

def test_warnings(assert_batchnorm_healthy):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0.0)).train()
    assert_batchnorm_healthy(model, fail_on="info")

def test_typing_errors(assert_batchnorm_healthy):
    with pytest.raises(ValueError, match="no rule 'BN999'"):
        assert_batchnorm_healthy(healthy(), ignore="BN999")
    with pytest.raises(ValueError, match="fail_on must be info, warning, error, got 'errors'"):
        assert_batchnorm_healthy(healthy(), fail_on="errors")
""")
    result.assert_outcomes(passed=2, failed=1)


def test_the_model_stays_as_it_was(run) -> None:
    result = run("""
import copy

def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]

def test_it(assert_batchnorm_healthy, assert_batch_invariant):
    model = healthy().train()
    bn.freeze(model)
    bn.unfreeze(model[1])
    (tensors, modes), state = bits(model), torch.get_rng_state()
    assert_batch_invariant(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert_batchnorm_healthy(model, [torch.ones(8, 3, 8, 8)], ignore="BN")
    after, modes_after = bits(model)
    assert all(torch.equal(tensors[k], after[k]) for k in tensors) and modes == modes_after
    assert torch.equal(state, torch.get_rng_state())
""")
    result.assert_outcomes(passed=1)


def test_an_answer_that_depends_on_its_batch_fails(run) -> None:
    result = run("""
def test_it(assert_batch_invariant):
    assert_batch_invariant(healthy(), data()[0])

def test_sick(assert_batch_invariant):
    model = healthy()
    model[1] = nn.BatchNorm2d(8, track_running_stats=False)
    assert_batch_invariant(model, data()[0])
""")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*the answer to example 0 depends on its batch of 64: it changes by up to *",
            "*without stored statistics*: '1'.*",
        ]
    )


def test_pytest_loads_it_without_torch(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("""
        import sys

        def test_it(assert_batchnorm_healthy, assert_batch_invariant):
            assert not {"torch", "numpy", "click"} & set(sys.modules)
    """)
    pytester.runpytest_subprocess("-p", "batchnorm.integrations.pytest").assert_outcomes(passed=1)


def test_importing_it_loads_nothing_heavy() -> None:
    program = (
        "import sys, batchnorm.integrations.pytest; sys.exit(bool({'torch', 'numpy', 'click'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- invariance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 8, 32])
def test_rounding_is_no_dependence(depth: int, dtype: torch.dtype) -> None:
    layers = [part for _ in range(depth) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    bn.recalibrate(model, [torch.randn(256, 64)])
    assert dependence(model.to(dtype), torch.randn(16, 64, dtype=dtype)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_part_that_depends_is_found(dtype: torch.dtype) -> None:
    """One layer of 16 uses the batch's statistics of 256 examples, with which its answers differ by a few percent."""

    class Normalizing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - x.mean(0) * (len(x) > 1)) / 1.0

    layers = [part for _ in range(15) for part in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())]
    model = nn.Sequential(*layers, Normalizing(), nn.Linear(64, 10))
    bn.recalibrate(model, [torch.randn(256, 64)])
    assert "depends on its batch of 256" in dependence(model.to(dtype), torch.randn(256, 64, dtype=dtype))


def test_the_bound_is_that_of_sums() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(100, 2))
    assert rounding(model, torch.float32) == pytest.approx((27 + 100 + 3**0.5) * 2**-23)


def test_limits_of_ones_own_count() -> None:
    class Leaky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1e-3 * len(x)

    x = torch.randn(4, 3)
    assert "it changes by up to 0.003" in dependence(Leaky(), x)
    assert dependence(Leaky(), x, rtol=0.0, atol=0.01) == ""


def test_a_model_that_cannot_answer_one_example_is_told_with_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    told = dependence(model, torch.randn(5, 3))
    assert "one example cannot be answered alone in eval mode: Expected more than 1 value" in told
    assert "without stored statistics, layers normalize by the batch in eval mode: '1'" in told


def test_examples_and_answers_can_be_of_any_kind() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, scale: torch.Tensor, bias: float) -> dict[str, object]:
            y = self.line(x) * scale
            return {"y": y, "parts": (y.sum(1), y.mean(), "text")}

    batch = {"x": torch.randn(5, 3), "scale": torch.tensor(2.0), "bias": 1.0}
    assert dependence(Named(), batch) == ""
    assert dependence(nn.Linear(3, 2), (torch.randn(5, 3), torch.zeros(5))) == ""


def test_a_model_that_writes_to_its_input_is_not_blamed() -> None:
    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0) + 1

    x = torch.randn(6, 3)
    before = x.clone()
    assert dependence(Writing(), x) == ""
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("model", "examples", "message"),
    [
        (nn.Linear(3, 2), torch.randn(1, 3), r"needs a batch of 2 examples or more, got 1\. Pass more examples"),
        (nn.Linear(3, 2), "text", r"needs a batch of 2 examples or more, got 0\. Pass more examples"),
        (nn.Flatten(0), torch.randn(2, 3), r"needs an output with a first axis of 2 examples, got none\. Wrap"),
    ],
)
def test_what_cannot_be_compared_is_refused(model: nn.Module, examples: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dependence(model, examples)
