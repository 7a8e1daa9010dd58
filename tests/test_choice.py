"""Which kernels run, told by an environment variable that is read at import: so each case is a process of its own."""

import os
import subprocess
import sys

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
    environment = os.environ | {"BATCHNORM_KERNELS": forced}
    return subprocess.run([sys.executable, "-c", SAY], env=environment, capture_output=True, text=True, check=False)


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
