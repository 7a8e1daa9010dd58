"""Layers with a residual and an activation: values, derivatives of any order, transforms and what is refused."""

from __future__ import annotations

import copy
import itertools

import oracle
import oracle_activations
import pytest
import torch
import torch.nn.functional as F
from layouts import LAYOUTS, channels_last, contiguous, sliced
from test_layers import CASES, DTYPES, cases, made, modes
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from batchnorm import kernels
from batchnorm.kernels import Layer, cpu, reference
from batchnorm.kernels.activations import NAMES, has_parameter, parameter
from batchnorm.kernels.interface import ForwardPass
from batchnorm.layers import BatchNorm1d, BatchNorm2d

# forward mode makes torch load formulas of its own that still use the deprecated torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

acts = pytest.mark.parametrize("act", NAMES)
THEIRS = {name: getattr(F, name) for name in NAMES}
EPS = 1e-5


def check_against_the_oracle(layer, x, residual, **backward):
    """y and the gradients of x, residual, gamma and beta stay within rounding of the oracle."""
    stored = None if layer.training else [oracle.exact(s) for s in (layer.running_mean, layer.running_var)]
    inputs = [t for t in (x, residual, layer.weight, layer.bias) if t is not None]
    for t in inputs:
        t.requires_grad_()
    y = layer(x) if residual is None else layer(x, residual=residual)
    grad = torch.randn(x.shape).to(y.dtype)
    assert y.dtype == (x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    found = iter(torch.autograd.grad(y, inputs, grad, **backward))
    exact = [oracle.exact(t) for t in (x, grad, residual, layer.weight, layer.bias)]
    expected, bound = oracle_activations.fused(*exact, layer.eps, layer.act, layer.act_param, y.dtype, stored)
    oracle.assert_within(y, expected.y, bound.y)
    oracle.assert_within(next(found), expected.d_x, bound.d_x)
    if residual is not None:
        oracle.assert_within(next(found), expected.d_residual, bound.d_residual)
    if layer.weight is not None:
        oracle.assert_within(next(found), expected.d_gamma, bound.d_gamma)
    if layer.bias is not None:
        oracle.assert_within(next(found), expected.d_beta, bound.d_beta)


# --- values and gradients ---------------------------------------------------------------------------------


@cases
@acts
@modes
def test_every_activation_type_and_layout_agrees_with_the_oracle(cls, shape, act, training):
    for dtype, layout, with_residual in itertools.product(DTYPES, LAYOUTS, [True, False]):
        layer = made(cls, 3, dtype=dtype, act=act).train(training)
        residual = layout(torch.randn(shape).to(dtype)) if with_residual else None
        check_against_the_oracle(layer, layout((2 + 3 * torch.randn(shape)).to(dtype)), residual)


@cases
@modes
def test_a_residual_without_an_activation_agrees_with_the_oracle(cls, shape, training):
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        layer = made(cls, 3, dtype=dtype).train(training)
        check_against_the_oracle(layer, layout((2 + 3 * torch.randn(shape)).to(dtype)), torch.randn(shape).to(dtype))


@acts
@modes
@pytest.mark.parametrize("options", [{"bias": False}, {"weight": False}, {"affine": False}], ids=str)
def test_activations_need_neither_gamma_nor_beta(act, training, options):
    for shape, with_residual in itertools.product([(6, 3, 5, 7), (40, 3, 1, 1)], [True, False]):
        layer = made(BatchNorm2d, 3, act=act, **options).train(training)
        check_against_the_oracle(layer, 1 + torch.randn(shape), torch.randn(shape) if with_residual else None)


@modes
@pytest.mark.parametrize(
    ("act", "param"),
    [("leaky_relu", 0.0), ("leaky_relu", 0.3), ("leaky_relu", -0.5), ("leaky_relu", 2.0), ("elu", 0.5), ("elu", 3.0),
     ("elu", 0.0), ("elu", -1.0)],
)  # fmt: skip
def test_the_parameter_of_an_activation_is_torchs(act, param, training):
    for dtype, with_residual in itertools.product([torch.float64, torch.float32], [True, False]):
        layer = made(BatchNorm1d, 3, dtype=dtype, act=act, act_param=param).train(training)
        x, residual = torch.randn(16, 3, dtype=dtype), torch.randn(16, 3, dtype=dtype) if with_residual else None
        check_against_the_oracle(layer, x, residual)
        plain = copy.deepcopy(layer)
        plain.act = None
        p = plain(x) if residual is None else plain(x) + residual
        torch.testing.assert_close(layer(x, residual=residual), THEIRS[act](p, param))


@acts
@modes
def test_a_residual_and_an_input_of_different_layouts_agree_with_the_oracle(act, training):
    for one, other in itertools.permutations([contiguous, channels_last, sliced], 2):
        layer = made(BatchNorm2d, 3, act=act).train(training)
        check_against_the_oracle(layer, one(torch.randn(4, 3, 5, 2)), other(torch.randn(4, 3, 5, 2)))


@acts
@modes
def test_first_gradients_that_may_be_differentiated_again_are_as_exact(act, training):
    for dtype, with_residual in itertools.product(DTYPES, [True, False]):
        layer = made(BatchNorm1d, 3, dtype=dtype, act=act).train(training)
        x, residual = torch.randn(40, 3).to(dtype), torch.randn(40, 3).to(dtype) if with_residual else None
        check_against_the_oracle(layer, x, residual, create_graph=True)


@acts
@modes
def test_large_planes_and_rows_agree_with_the_oracle(act, training):
    for x in (torch.randn(2, 3, 70, 90), channels_last(torch.randn(3, 33, 20, 20))):
        layer = made(BatchNorm2d, x.shape[1], act=act).train(training)
        for residual in (None, torch.randn_like(x)):
            check_against_the_oracle(layer, x, residual)


@pytest.mark.skipif(cpu.INSTRUCTION_SET is None, reason="built without a compiler")
@acts
def test_the_kernels_and_the_specification_agree(act):
    x, r, gamma, beta, grad = torch.randn(9, 5, 7), torch.randn(9, 5, 7), *torch.randn(2, 5), torch.randn(9, 5, 7)
    param = parameter(act, None)
    layer = Layer(gamma, beta, EPS, act, param)
    found, _ = cpu.train_forward(x, layer, r)
    for kernel in (cpu, reference):
        y, statistics = kernel.train_forward(x, layer, r)
        gradients = kernel.train_backward(grad, ForwardPass(x, statistics, layer, r))
        values = [oracle.exact(t) for t in (x, grad, r, gamma, beta)]
        expected, bound = oracle_activations.fused(*values, EPS, act, param, torch.float32)
        oracle.assert_within(y, expected.y, bound.y)
        for one, value, allowed in zip(gradients, expected[1:], bound[1:], strict=True):
            oracle.assert_within(one, value, allowed)
        constant = kernel.normalize(x, statistics, layer, r)
        assert torch.equal(constant, found) or kernel is reference


# --- kinks, and values that are not finite ----------------------------------------------------------------


@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [contiguous, sliced], ids=["native", "reference"])
def test_derivatives_at_the_kinks_are_torchs(act, dtype, layout):
    p = torch.tensor([-3.0, -0.0, 0.0, 3.0], dtype=dtype)[:, None].requires_grad_()
    layer = BatchNorm1d(1, act=act, dtype=dtype).eval()  # mean 0 and z = 0, so the residual is p
    y, expected = layer(layout(torch.zeros(4, 1, dtype=dtype)), residual=p), THEIRS[act](p)
    torch.testing.assert_close(y, expected)
    (found,), (theirs,) = (torch.autograd.grad(v.sum(), p) for v in (y, expected))
    torch.testing.assert_close(found, theirs)


@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_nan_and_the_rest_is_not_touched(act, dtype):
    layer = BatchNorm1d(2, act=act, dtype=dtype).eval()
    x = torch.randn(20, 2, dtype=dtype)
    expected, x[3, 1] = layer(x.clone()), torch.nan
    y = layer(x)
    assert y[3, 1].isnan()
    assert y.isnan().sum() == 1
    assert torch.equal(y[:, 0], expected[:, 0])
    with pytest.warns(RuntimeWarning, match="1 of 2 channels"):
        y = layer.train()(x)
    assert y[:, 1].isnan().all()
    assert y[:, 0].isfinite().all()


@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_far_out_have_the_limits_of_the_activation(act, dtype):
    """Up to 1e37, which float32 squares to infinity: a(p) is 0, or its asymptote, and a' is that one's slope."""
    far = torch.tensor([10.0, 88, 89, 1e3, 1e6, 1e15, 1e30, 1e37], dtype=dtype)
    r = torch.cat([far, -far])[:, None].requires_grad_()
    y = BatchNorm1d(1, act=act, dtype=dtype).eval()(torch.zeros_like(r), residual=r)
    (d_r,) = torch.autograd.grad(y.sum(), r)
    wide = oracle.exact(r)
    left = {"leaky_relu": 0.01 * wide, "elu": -1.0 + 0 * wide}.get(act, 0 * wide)
    slopes = {"leaky_relu": 0.01}
    # what is left of silu at -10 is 10 exp(-10)
    off = 5e-4 if act in {"silu", "elu"} else 0
    u = torch.finfo(dtype).eps
    for found, right, wrong in ((y, wide, left), (d_r, 1 + 0 * wide, slopes.get(act, 0.0) + 0 * wide)):
        expected = torch.from_numpy(wrong).where(r.detach() < 0, torch.from_numpy(right))
        assert ((found - expected).abs() <= off + 4 * u * expected.abs() + 1e-20).all(), (found, expected)


@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinity_gives_what_torch_gives_or_the_limit(act, dtype):
    r = torch.tensor([[torch.inf], [-torch.inf]], dtype=dtype)
    y = BatchNorm1d(1, act=act, dtype=dtype).eval()(torch.zeros_like(r), residual=r)
    limit = {"leaky_relu": -torch.inf, "elu": -1.0}.get(act, 0.0)
    theirs = THEIRS[act](r)
    for found, expected, other in zip(y, theirs, (torch.inf, limit), strict=True):
        assert found.equal(expected) or found == other or (found.isnan() and expected.isnan())


# --- derivatives of higher order, transforms and compilers ------------------------------------------------


def fixed(act, shape=(3, 2, 2)):
    """Values whose p is nowhere near a kink: finite differences step 1e-6."""
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in (shape, (2,), (2,), shape)]


@acts
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_first_and_second_derivatives_agree_with_finite_differences(act, residual):
    def of_batch(x, gamma, beta, r):
        return kernels.train(x, Layer(gamma, beta, EPS, act, parameter(act, None)), r if residual else None)

    x, gamma, beta, r = fixed(act)
    inputs = (x, gamma, beta, r if residual else r.detach())
    assert gradcheck(of_batch, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(of_batch, inputs, check_batched_grad=True)


@acts
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_derivatives_of_eval_mode_agree_with_finite_differences(act, residual):
    layer = made(BatchNorm1d, 2, dtype=torch.float64, act=act).eval()

    def frozen(x, gamma, beta, r):
        state = {"weight": gamma, "bias": beta}
        return torch.func.functional_call(layer, state, (x,), {"residual": r if residual else None})

    x, gamma, beta, r = fixed(act)
    inputs = (x, gamma, beta, r if residual else r.detach())
    assert gradcheck(frozen, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(frozen, inputs, check_batched_grad=True)


@acts
@modes
def test_functional_derivatives_are_the_recorded_ones(act, training):
    layer = made(BatchNorm1d, 3, dtype=torch.float64, act=act, track_running_stats=not training).train(training)
    x, r = torch.randn(2, 6, 3, dtype=torch.float64)

    def loss(x, r):
        return layer(x, residual=r).pow(3).sum()

    tracked = [t.clone().requires_grad_() for t in (x, r)]
    expected = torch.autograd.grad(loss(*tracked), tracked)
    for found, value in zip(torch.func.grad(loss, (0, 1))(x, r), expected, strict=True):
        torch.testing.assert_close(found, value)
    _, tangent = torch.func.jvp(loss, (x, r), (x, r))
    torch.testing.assert_close(tangent, sum((e * t).sum() for e, t in zip(expected, (x, r), strict=True)))


@acts
@modes
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (1, 2)], ids=str)
def test_ensembles_with_a_residual_are_their_models_one_by_one(act, training, in_dims):
    layer = made(BatchNorm1d, 3, dtype=torch.float64, act=act, track_running_stats=not training).train(training)
    x, r = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    x, r = (t[0] if dim is None else t for t, dim in zip((x, r), in_dims, strict=True))
    each = [(x if in_dims[0] is None else x[i], r if in_dims[1] is None else r[i]) for i in range(4)]
    given = [t if dim is None else t.movedim(0, dim).requires_grad_() for t, dim in zip((x, r), in_dims, strict=True)]
    together = torch.vmap(lambda x, r: layer(x, residual=r), in_dims)(*given)
    apart = torch.stack([layer(a, residual=b) for a, b in each])
    torch.testing.assert_close(together, apart)
    (weight,) = torch.autograd.grad(together.pow(3).sum(), layer.weight)
    torch.testing.assert_close(weight, torch.autograd.grad(apart.pow(3).sum(), layer.weight)[0])
    inside = torch.vmap(torch.func.grad(lambda x, r: layer(x, residual=r).pow(3).sum(), (0, 1)), in_dims)(
        *(t.detach() for t in given)
    )
    for found, dim in zip(inside, (0, 1), strict=True):
        one_by_one = []
        for pair in each:
            pair = [t.detach().clone().requires_grad_() for t in pair]
            one_by_one.append(torch.autograd.grad(layer(pair[0], residual=pair[1]).pow(3).sum(), pair)[dim])
        torch.testing.assert_close(found, torch.stack(one_by_one))


class Block(nn.Module):
    """A layer between two others, with a shortcut."""

    def __init__(self, act, **options) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv1d(3, 3, 1), made(BatchNorm1d, 3, act=act, **options)

    def forward(self, x):
        return self.bn(self.first(x), residual=x)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "silu"])
@modes
def test_a_compiled_block_equals_the_eager_one(act, training):
    block, x = Block(act).train(training).double(), torch.randn(4, 3, 5, dtype=torch.float64)
    other = copy.deepcopy(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), other(x)
    torch.testing.assert_close(found, expected)
    for y in (found, expected):
        y.pow(3).sum().backward()
    for (name, a), b in zip(block.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(block.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("act", ["leaky_relu", "gelu"])
@modes
def test_an_exported_block_equals_the_eager_one(act, training):
    block, x = Block(act).train(training), torch.randn(4, 3, 5)
    other = copy.deepcopy(block)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    larger = torch.randn(7, 3, 5)
    torch.testing.assert_close(program.module()(larger), other(larger))


@modes
def test_torch_fx_takes_a_layer_with_a_residual_whole(training):
    block, x = Block("relu").train(training), torch.randn(4, 3, 5)
    traced = torch.fx.symbolic_trace(copy.deepcopy(block))
    (node,) = (node for node in traced.graph.nodes if node.target == "bn")
    assert node.op == "call_module"
    assert [argument.name for argument in node.all_input_nodes] == ["first", "x"]
    torch.testing.assert_close(traced(x), block(x))


OPERATORS = {
    "residual": ("relu", torch.randn(5, 3, 2), True),
    "smooth": ("gelu", torch.randn(5, 3, 2, dtype=torch.float64), True),
    "leaky": ("leaky_relu", channels_last(torch.randn(2, 3, 4, 5)), True),
    "alone": ("silu", torch.randn(4, 6, 8)[::2, ::2, ::2], False),
    "bfloat16": ("hardswish", torch.randn(5, 3, 2, dtype=torch.bfloat16), True),
    "no activation": (None, torch.randn(5, 3, 2), True),
}


@pytest.mark.slow
@pytest.mark.parametrize(("act", "x", "with_residual"), OPERATORS.values(), ids=OPERATORS)
def test_the_operators_pass_opcheck(act, x, with_residual):
    x, gamma, beta, r, grad = (
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for t in (x, torch.randn(x.shape[1]), torch.randn(x.shape[1]), torch.randn_like(x), torch.randn_like(x))
    )
    r, param = r if with_residual else None, parameter(act, None)
    torch.library.opcheck(kernels.train_forward, (x, gamma, beta, EPS, act, param, r))
    mean, var = reference.measure(x.detach())
    arguments = (grad, x, mean, var, gamma, EPS, beta, act, param)
    torch.library.opcheck(kernels.train_backward, (*arguments, r))
    if act in {"relu", "leaky_relu"}:
        y = kernels.train_forward(x, gamma, beta, EPS, act, param, r)[0].detach()
        torch.library.opcheck(kernels.train_backward, (*arguments, None, y))


# --- types ------------------------------------------------------------------------------------------------

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float16),
]


@modes
@pytest.mark.parametrize(("of_x", "of_residual"), PAIRS, ids=str)
def test_a_residual_of_another_type_promotes_as_torchs_sum_does(of_x, of_residual, training):
    for act in (None, "relu", "silu"):
        layer = made(BatchNorm1d, 3, act=act).train(training)
        x, r = torch.randn(20, 3).to(of_x), torch.randn(20, 3).to(of_residual)
        check_against_the_oracle(layer, x, r)
        assert layer(x, residual=r).dtype == (x + r).dtype


@modes
def test_autocast_keeps_the_type_of_the_convolution_and_promotes_with_a_wide_shortcut(training):
    conv, layer = nn.Conv2d(3, 3, 1), made(BatchNorm2d, 3, act="silu").train(training)
    x = torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = conv(x)
        narrow, wide = layer(inside, residual=inside.detach()), layer(inside, residual=x)
    assert inside.dtype == narrow.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    wide.sum().backward()
    assert layer.weight.grad.dtype == conv.weight.grad.dtype == torch.float32


# --- wrong arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["tanh", "ReLU", ""])
def test_an_unknown_activation_is_refused(act):
    with pytest.raises(ValueError, match=rf"act must be None or one of relu, leaky_relu, .*, got '{act}'\. Apply"):
        BatchNorm1d(3, act=act)


@pytest.mark.parametrize("act", [None, *(name for name in NAMES if not has_parameter(name))])
def test_a_parameter_is_refused_where_the_activation_has_none(act):
    with pytest.raises(ValueError, match=rf"act_param belongs to leaky_relu or elu, got 0.1 with act={act!r}\. Leave"):
        BatchNorm1d(3, act=act, act_param=0.1)


@pytest.mark.parametrize("memory", ["less", True, ""])
def test_another_word_for_memory_is_refused(memory):
    with pytest.raises(ValueError, match=f"memory must be None or 'save', got {memory!r}. Leave it out"):
        BatchNorm1d(3, memory=memory)


@pytest.mark.parametrize(
    ("residual", "got"),
    [
        (torch.randn(4, 1), r"\(4, 1\) on cpu"),
        (torch.randn(3), r"\(3,\) on cpu"),
        (torch.randn(4, 3, 1), r"\(4, 3, 1\) on cpu"),
        (torch.empty(4, 3, device="meta"), r"\(4, 3\) on meta"),
        (1.0, "float"),
        ([[1.0]], "list"),
    ],
    ids=["narrow", "one axis", "another axis", "elsewhere", "a number", "a list"],
)
@modes
def test_a_residual_that_does_not_fit_is_refused(residual, got, training):
    layer = BatchNorm1d(3).train(training)
    expected = rf"BatchNorm1d needs a residual of the input's shape \(4, 3\) on cpu, got .*{got}.*\. Expand the"
    with pytest.raises((ValueError, TypeError), match=expected):
        layer(torch.randn(4, 3), residual=residual)
    assert layer.num_batches_tracked == 0


def test_a_complex_residual_is_refused():
    """Its imaginary part would be lost."""
    with pytest.raises(TypeError, match="residual"):
        BatchNorm1d(3)(torch.randn(4, 3), residual=torch.randn(4, 3, dtype=torch.complex64))


# --- what a layer is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({"act": "relu"}, "track_running_stats=True, act='relu')"),
        ({"act": "leaky_relu"}, "act='leaky_relu', act_param=0.01)"),
        ({"act": "leaky_relu", "act_param": 0.0}, "act='leaky_relu', act_param=0.0)"),
        ({"act": "elu", "act_param": 0.5, "memory": "save"}, "act='elu', act_param=0.5, memory='save')"),
    ],
    ids=str,
)
def test_a_layer_prints_its_activation(options, ending):
    assert repr(BatchNorm1d(3, **options)).endswith(ending)


@cases
def test_the_state_has_torchs_five_keys_and_copies_keep_the_activation(cls, shape):
    layer = made(cls, 3, act="elu", act_param=0.5, memory="save")
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(layer.state_dict()) == keys
    twin = copy.deepcopy(layer)
    x = torch.randn(shape)
    assert torch.equal(twin(x), layer(x))
    assert (twin.act, twin.act_param, twin.memory) == ("elu", 0.5, "save")


@acts
def test_the_stored_statistics_are_those_without_a_residual_and_an_activation(act):
    plain = made(BatchNorm1d, 3)
    fused = made(BatchNorm1d, 3, act=act)
    fused.load_state_dict(plain.state_dict())
    for _ in range(2):
        x = torch.randn(8, 3)
        plain(x)
        fused(x, residual=torch.randn(8, 3))
    for (name, a), b in zip(plain.named_buffers(), fused.buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("cls", "shape"), [CASES["1d with length"]], ids=["1d"])
@acts
def test_empty_batches_pass_with_a_residual(cls, shape, act):
    layer, x = made(cls, 3, act=act), torch.empty(0, *shape[1:], requires_grad=True)
    r = torch.empty_like(x).requires_grad_()
    y = layer(x, residual=r)
    y.sum().backward()
    assert y.shape == x.grad.shape == r.grad.shape == x.shape
    assert not layer.weight.grad.any()
    assert layer.num_batches_tracked == 0
