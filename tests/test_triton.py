"""The Triton kernels: triton_cases.py on an interpreted CPU and on this machine's GPU, and what the compiler says.

The interpreter stands in for the compiler only where TRITON_INTERPRET was set before Triton was imported, so the cases
run in a process of their own. pytest does not collect them here, where they could only be skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with GPU builds of torch; `pip install triton` tests it on a CPU")

from triton_cases import EPS, case

from batchnorm.kernels import triton as kernels
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer

KERNELS = [
    "forward_whole", "normalize_part", "measure_whole", "measure_part", "merge", "backward_whole", "sum_part",
    "backward_part",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("interpret", ["1", "0"] if torch.cuda.is_available() else ["1"])
def test_every_case_passes(interpret):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/triton_cases.py"],
        env=os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    outcome = done.stdout.rstrip().rpartition("\n")[2].partition(" in ")[0]
    # the one of 2^31 values needs a large GPU
    assert outcome in {"188 passed, 1 skipped", "189 passed"}, done.stdout[-5000:] + done.stderr[-2000:]


def test_tensors_on_the_cpu_are_left_to_others():
    assert not kernels.supports(torch.randn(4, 6, 5, 5))


@pytest.mark.slow
def test_without_triton_the_module_imports_and_supports_nothing():
    program = """
import sys, torch
sys.modules["triton"] = None
from batchnorm.kernels import triton
assert not triton.supports(torch.randn(4, 6))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # with which CPU tensors would be taken
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
def test_a_few_channels_fill_a_gpu(layout):
    x = torch.empty(64, 3, 112, 112, device="meta").to(memory_format=layout)
    cut = kernels._cut(x, kernels._WHOLE)
    assert cut.parts * -(-3 // cut.c) >= 2 * 132  # multiprocessors of an H100


@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("hip", "gfx942", 64)], ids=["A100", "MI300"])
@pytest.mark.parametrize(
    ("shape", "dtype", "act", "param"),
    [
        ((32, 64, 7, 7), torch.bfloat16, "gelu", 0.0),
        ((32, 64, 56, 56), torch.float32, "elu", 1.0),
        ((8192, 1), torch.float64, "leaky_relu", 0.01),
        ((3, 5, 1), torch.float64, None, 0.0),
    ],
)
def test_kernels_compile_with_offsets_of_64_bits(tmp_path, monkeypatch, shape, dtype, act, param, target):
    """The interpreter takes more than the compiler does; offsets of 32 bits would end at 2^31 values."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = {}
    for name in KERNELS:
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name), target, seen))
    x, weight, bias, residual, grad = case(shape, dtype, device="cpu")
    layer = Layer(weight, bias, EPS, act, param)
    forward = ForwardPass(x, kernels.train_forward(x, layer, residual)[1], layer, residual)
    kernels.train_backward(grad, forward)
    kernels.measure(x)
    sums, g = kernels.sum_gradients(grad, forward)
    kernels.input_gradient(grad, forward, sums, g)
    kernels.normalize(x, ChannelStatistics(weight, weight), Layer(weight, None, EPS, act, param))
    assert len(seen) == (6 if kernels._cut(x, kernels._WHOLE).parts == 1 else 5)
    addresses = [line for code in seen.values() for line in code.splitlines() if "tt.addptr" in line]
    assert addresses
    assert not any("xi32>" in line for line in addresses)


class Compiled:
    """A kernel that is compiled for a GPU that need not be there, where it would be launched."""

    def __init__(self, kernel, target, seen):
        self.kernel, self.target, self.seen = kernel, target, seen

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **options):
        import triton
        from triton.backends.compiler import GPUTarget

        pairs = list(zip(self.kernel.params, arguments, strict=True))
        constants = {(p.num,): a for p, a in pairs if p.is_constexpr or a is None or (type(a) is int and a == 1)}
        signature = {p.name: "constexpr" if (p.num,) in constants else signature_of(p, a) for p, a in pairs}
        source = triton.compiler.ASTSource(self.kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget(*self.target), options=options)
        self.seen[self.kernel.__name__] = compiled.asm["ttir"]


def signature_of(parameter, argument):
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return "*" + names[argument.dtype] if isinstance(argument, torch.Tensor) else parameter.annotation_type or "i32"
