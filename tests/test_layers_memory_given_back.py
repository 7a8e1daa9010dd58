"""Layers with tensors that gave their memory back, or whose class keeps it elsewhere: an error or the right answer."""

import forked
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import batchnorm as bn


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_tensor_without_memory_is_refused_and_ends_no_process(training: bool, half: bool) -> None:
    """In a process of its own: the kernels would read and write at address 0."""
    code = f"""
        import torch, batchnorm as bn
        for name in ("weight", "bias", "running_mean", "running_var", "input", "residual", "view"):
            layer = bn.BatchNorm1d(8).train({training})
            if {half}:
                layer.half()
            x, residual = torch.randn(2, 32, 8, dtype=torch.half if {half} else torch.float)
            if name == "view":  # as FSDP's: a part of one large tensor
                layer.weight = torch.nn.Parameter(torch.ones(99999, dtype=layer.weight.dtype)[9999:10007].detach())
            wrong = {{"input": x, "residual": residual, "view": layer.weight}}.get(name, getattr(layer, name, None))
            if name in ("input", "residual"):
                x, residual = x.clone(), residual.clone()
                wrong = x if name == "input" else residual
            wrong.untyped_storage().resize_(0)
            try:
                layer(x, residual)
            except RuntimeError as error:
                print(name, "that has given its memory back" in str(error), flush=True)
    """
    done = forked.run(code)
    names = ("weight", "bias", "running_mean", "running_var", "input", "residual", "view")
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (0, [f"{name} True" for name in names]), done.stderr


class Wrapped(torch.Tensor):
    """A tensor that keeps its numbers in another one, as quantized and distributed ones do."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, requires_grad=inside.requires_grad
        )

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            return value.inside if isinstance(value, cls) else value

        found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))
        return tree_map(lambda value: cls(value) if isinstance(value, Tensor) else value, found)


@pytest.mark.parametrize("what", ["parameters", "statistics"])
@pytest.mark.parametrize("training", [True, False])
def test_wrapped_parameters_and_statistics_count(training: bool, what: str) -> None:
    outputs = []
    x = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in (nn.BatchNorm1d, bn.BatchNorm1d):
        layer = kind(8, dtype=torch.float64).train(training)
        if what == "parameters":
            layer.weight = nn.Parameter(Wrapped(torch.full((8,), 3.0, dtype=torch.float64)))
            layer.bias = nn.Parameter(Wrapped(torch.full((8,), 2.0, dtype=torch.float64)))
        else:
            layer.running_mean = Wrapped(torch.full((8,), 0.5, dtype=torch.float64))
            layer.running_var = Wrapped(torch.full((8,), 4.0, dtype=torch.float64))
        y = layer(x)
        outputs.append(y.inside if isinstance(y, Wrapped) else y)
        if what == "statistics":
            outputs[-1] = outputs[-1], layer.running_mean.inside, layer.running_var.inside
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
