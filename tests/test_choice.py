"""Which kernels run, told by an environment variable that is read at import: so each case is a process of its own."""

import importlib.util
from pathlib import Path

import forked
import pytest

from batchnorm.kernels import cpu

SAY = """
import torch
from batchnorm.kernels import choice
x = torch.randn(4, 3, 5, 5)
names = [choice.kernel_for(t).__name__.rpartition(".")[2] for t in (x, x[..., ::2], x[:0], x.to("meta"))]
print(*names)
"""


def run(forced):
    return forked.run(SAY, environment={"BATCHNORM_KERNELS": forced})


def test_the_table_gives_plain_cpu_tensors_to_the_native_kernels_where_they_were_built():
    fast = "reference" if cpu.INSTRUCTION_SET is None else "cpu"
    assert run("").stdout.split() == [fast, "reference", "reference", "reference"]


def test_the_reference_can_be_forced():
    assert run("reference").stdout.split() == ["reference"] * 4


def test_the_native_kernels_can_be_demanded():
    done = run("native")
    if cpu.INSTRUCTION_SET is None:
        assert "Install a C++ compiler and reinstall batchnorm" in done.stderr
    else:
        assert done.stdout.split()[0] == "cpu"


@pytest.mark.parametrize("forced", ["cuda", "Native"])
def test_an_unknown_choice_is_refused(forced):
    assert f"BATCHNORM_KERNELS must be 'reference', 'native' or 'triton', got '{forced}'" in run(forced).stderr


def test_a_gpu_prefers_our_kernels_from_the_size_on_from_which_all_measured_cases_were_faster():
    path = Path(__file__).parents[1] / "benchmarks" / "bench_gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", path)
    bench_gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_gpu)

    def row(size, low, case="train forward + backward", dtype="float32"):
        what = {"device": "GPU", "dtype": dtype, "layout": "planes", "shape": [size, 2], "case": case}
        return what | {"ratio_quartiles": [low, 9]}

    rows = [row(8, 1.1), row(4, 1.2), row(4, 1.1, "train forward"), row(2, 0.9), row(1, 1.5), row(4, 0.1, "eval")]
    assert bench_gpu.faster(rows) == {"GPU": {"float32 planes": 8}}
    assert bench_gpu.faster([row(8, 0.9), row(4, 2.0)]) == {}
    assert bench_gpu.faster([row(8, 1.5), row(8, 1.0, "train forward")]) == {}
