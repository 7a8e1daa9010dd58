"""The native kernels against the reference in float64: every type, layout, plane size and lane remainder."""

import threading
import warnings

import forked
import pytest
import torch

from batchnorm.kernels import cpu, reference
from batchnorm.kernels.interface import ChannelStatistics, ForwardPass, Layer
from batchnorm.kernels.running_statistics import Running

native = pytest.importorskip("batchnorm._native", reason="built without a compiler: the reference runs, and is tested")

EPS = 1e-5
PLAIN = Layer(eps=EPS)
SHAPES = [
    (7, 5),
    (300, 33),
    (1000, 144),
    (2, 1),
    (8, 6, 7),
    (5, 3, 1, 1),
    (8, 6, 7, 7),
    (4, 3, 23, 23),
    (3, 2, 50, 50),
    (3, 17, 5, 3, 4),
]
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture(params=native.instruction_sets())
def instruction_set(request):
    native.use(request.param)
    yield request.param
    native.use(native.instruction_sets()[0])


def test_only_an_instruction_set_that_the_processor_runs_can_be_used():
    with pytest.raises(ValueError, match="one of instruction_sets"):
        native.use("mmx")


def case(shape, dtype, *, channels_last=False, mean=3.0):
    x = (torch.randn(shape, dtype=torch.float64) * 2 + mean).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = reference.wide_dtype(dtype)
    weight, bias = torch.rand(shape[1], dtype=wide) + 0.5, torch.randn(shape[1], dtype=wide)
    return x, weight, bias, torch.randn_like(x)


def close(actual, expected, dtype, *, count, terms=1.0):
    """Within the rounding of the result's own type at its largest value, and of sums of ``count`` values in lanes.

    The latter is at the size of the ``terms`` that are added up, which may cancel.
    """
    wide = ROUNDOFF[reference.wide_dtype(dtype)]
    largest = expected.abs().max()
    allowed = ROUNDOFF[dtype] * largest + wide * (16 + count**0.5) * max(float(largest), float(terms))
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward_and_eval_equal_the_reference_in_float64(instruction_set, shape, channels_last, dtype):
    x, weight, bias, grad = case(shape, dtype, channels_last=channels_last)
    assert cpu.supports(x)
    count = x.numel() // shape[1]
    layer, wide = Layer(weight, bias, EPS), Layer(weight.double(), bias.double(), EPS)
    y, statistics = cpu.train_forward(x, layer)
    y_, statistics_ = reference.train_forward(x.double(), wide)
    (mean, var), (mean_, var_) = statistics, statistics_
    close(y, y_, dtype, count=count)
    # deviations are rounded at their own size, whatever the mean is; up to 64 are added (8 is the root of that) before
    # they go to float64
    furthest = (x.double() - reference.along_channels(mean_, x)).abs().max()
    summed = ROUNDOFF[reference.wide_dtype(dtype)]
    merged = 2 * ROUNDOFF[torch.float64] * mean_.abs()
    assert ((mean - mean_).abs() <= 8 * summed * furthest + merged).all()
    # a guess is kept while (guess - mean)^2 is below 3 var: sums of squares around it are up to 4 var
    assert ((var - var_).abs() <= 4 * (16 + count**0.5) * summed * var_).all()
    assert y.stride() == x.stride()

    found = cpu.train_backward(grad, ForwardPass(x, statistics, layer))[:3]
    expected = reference.train_backward(grad.double(), ForwardPass(x.double(), statistics_, wide))[:3]
    # d_x = slope (g - mean g - z mean gz): each term is at most slope |g| (1 + z^2)
    z = reference.train_forward(x.double(), PLAIN)[0]
    terms = (weight.double() * (var_ + EPS).rsqrt()).max() * grad.double().abs().max() * (1 + z.square().max())
    close(found[0], expected[0], dtype, count=count, terms=terms)
    for sums, sums_ in zip(found[1:], expected[1:], strict=True):
        # a sum's rounding grows with the sum of magnitudes, not with the sum
        scale = grad.double().abs().amax() * count * (3 + weight.max())
        assert ((sums.double() - sums_).abs() <= 16 * ROUNDOFF[sums.dtype] * scale).all()

    close(
        cpu.normalize(x, statistics, layer),
        reference.normalize(x.double(), statistics, wide),
        dtype,
        count=1,
    )


@pytest.mark.parametrize("channels_last", [False, True])
def test_values_far_from_zero_keep_the_digits_that_their_format_has(instruction_set, channels_last):
    x, *_ = case((32, 16, 28, 28), torch.float32, channels_last=channels_last, mean=1e5)
    y, _ = cpu.train_forward(x, PLAIN)
    expected, _ = reference.train_forward(x.double(), PLAIN)
    assert (y.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_first_image_of_zeros_and_an_outlier_do_not_spoil_the_statistics():
    x = torch.randn(16, 4, 40, 40) + 1000
    x[0] = 0
    x[3, 1, 5, 5] = 1e6
    _, (mean, var) = cpu.train_forward(x, PLAIN)
    _, (mean_, var_) = reference.train_forward(x.double(), PLAIN)
    assert ((mean - mean_).abs() <= 1e-6 * var_.sqrt()).all()
    assert ((var - var_).abs() <= 1e-6 * var_).all()


def test_nan_and_infinity_stay_in_their_channel(instruction_set):
    x = torch.randn(8, 3, 9, 9)
    x[2, 0, 1, 1], x[1, 1, 0, 0] = torch.nan, torch.inf
    y, _ = cpu.train_forward(x, PLAIN)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isnan().any()
    assert y[:, 2].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(64, 48, 30, 30), (64, 48, 7, 7), (5000, 100)], ids=str)
def test_results_have_the_same_bits_for_any_number_of_threads(shape, channels_last):
    x, weight, bias, grad = case(shape, torch.float32, channels_last=channels_last)
    layer = Layer(weight, bias, EPS)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, statistics = cpu.train_forward(x, layer)
            results.append([y, *statistics, *cpu.train_backward(grad, ForwardPass(x, statistics, layer))[:3]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(32, 19), (32, 19, 7, 7), (32, 3, 33, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_example_has_the_same_bits_alone_and_in_any_batch(instruction_set, shape, dtype):
    x, weight, bias, _ = case(shape, dtype)
    statistics = ChannelStatistics(torch.randn(shape[1]), torch.rand(shape[1]) + 0.1)
    layer = Layer(weight, bias, EPS)
    whole = cpu.normalize(x, statistics, layer)
    for i in (0, 1, 31):
        assert torch.equal(cpu.normalize(x[i : i + 1].clone(), statistics, layer), whole[i : i + 1])


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_running_statistics_move_as_the_reference_moves_them(instruction_set, bad, dtype, momentum):
    def moved(kernel):
        stored = [torch.zeros(37, dtype=dtype), torch.ones(37, dtype=dtype), torch.tensor(4), torch.tensor(2)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel.update_running(Running(*stored, momentum), ChannelStatistics(mean, var), 9)
        return stored

    mean, var = torch.randn(37, dtype=torch.float64), torch.rand(37, dtype=torch.float64)
    if bad is not None:
        mean[3], var[5] = bad, bad
    for found, expected in zip(moved(cpu), moved(reference), strict=True):
        torch.testing.assert_close(found, expected, rtol=4 * ROUNDOFF[dtype], atol=4 * ROUNDOFF[dtype])


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_tensors_that_start_anywhere_in_memory_are_read_right(instruction_set, offset):
    x = torch.randn(4 * 6 * 19 + offset)[offset:].view(4, 6, 19)
    y, _ = cpu.train_forward(x, PLAIN)
    expected, _ = reference.train_forward(x.double(), PLAIN)
    close(y, expected, torch.float32, count=76)


def test_a_gradient_of_another_layout_or_type_is_taken():
    x, weight, bias, grad = case((4, 6, 5, 5), torch.float32)
    layer = Layer(weight, bias, EPS)
    forward = ForwardPass(x, cpu.train_forward(x, layer)[1], layer)
    expected = cpu.train_backward(grad, forward)[:3]
    for other in (grad.to(memory_format=torch.channels_last), grad.double()):
        found = cpu.train_backward(other, forward)[:3]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_kernels_do_not_know_is_left_to_the_reference():
    x = torch.randn(4, 6, 5, 5)
    assert not cpu.supports(x[..., ::2])
    assert not cpu.supports(x[:0])
    assert not cpu.supports(x.to("meta"))
    assert not cpu.supports(x[0, 0, 0])
    with pytest.raises(ValueError, match=r"need a contiguous or channels_last x, got strides \(150, 25, 5, 2\)"):
        cpu.train_forward(x[..., ::2], PLAIN)


def test_four_python_threads_at_once_give_the_single_thread_bits():
    x, weight, bias, _ = case((32, 64, 28, 28), torch.float32)
    layer, wrong = Layer(weight, bias, EPS), []

    def step():
        y, statistics = cpu.train_forward(x, layer)
        return y, *statistics

    expected = step()

    def work():
        for _ in range(5):
            found = step()
            wrong.extend(1 for a, b in zip(found, expected, strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_finishes_after_the_parent_ran_in_parallel():
    program = """
import os, sys, torch
from batchnorm.kernels import Layer, cpu
torch.set_num_threads(2)
x = torch.randn(64, 64, 28, 28)
cpu.train_forward(x, Layer())
child = os.fork()
if child == 0:
    cpu.train_forward(x, Layer())
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = forked.run(program)
    assert done.returncode == 7, done.stderr


@pytest.mark.slow
def test_forked_workers_of_a_data_loader_train_with_the_bits_of_the_parent():
    program = """
import warnings, torch
import batchnorm as bn
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "This process .* is multi-threaded, use of fork", DeprecationWarning)
given = torch.randn(2, 4, 64, 64, 28, 28)
class Steps:
    def __len__(self):
        return 4
    def __getitem__(self, i):
        x, grad, layer = given[0, i].detach().requires_grad_(), given[1, i], bn.BatchNorm2d(64)
        y = layer(x)
        y.backward(grad)
        return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
torch.set_num_threads(2)
expected = [Steps()[i] for i in range(4)]
# one worker with the single thread that it is given, one with two; without batches, as torch joins them in parallel
settings = {"num_workers": 2, "batch_size": None, "worker_init_fn": lambda worker: torch.set_num_threads(worker + 1)}
loader = torch.utils.data.DataLoader(Steps(), multiprocessing_context="fork", timeout=60, **settings)
for found, right in zip(loader, expected, strict=True):
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
"""
    done = forked.run(program)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gradient_of_fewer_examples_is_refused_although_its_strides_agree():
    x, weight, *_ = case((4, 6, 5, 5), torch.float32)
    layer = Layer(weight, None, EPS)
    forward = ForwardPass(x, cpu.train_forward(x, layer)[1], layer)
    with pytest.raises((ValueError, RuntimeError)):
        cpu.train_backward(torch.randn(3, 6, 5, 5), forward)


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    x, weight, bias, grad = case((8, 6, 5, 5), torch.float32)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    assert not cpu.supports(negated)
    layer = Layer(weight, bias, EPS)
    forward = ForwardPass(x, cpu.train_forward(x, layer)[1], layer)
    expected = cpu.train_backward(-grad, forward)[:3]
    found = cpu.train_backward(torch._neg_view(grad), forward)[:3]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# -- padding --------------------------------------------------------------------------------------------------


def runs(outer, inner):
    """Valid positions with runs of all lengths, at the ends of lines too, and lines without any."""
    valid = torch.rand(outer, inner) > torch.linspace(0, 1, outer).unsqueeze(1)
    valid[0], valid[-1] = True, False
    return valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", [None, "relu", "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 1), (9, 3, 17), (4, 2, 40), (3, 2, 5000), (70, 33), (9, 1), (600, 20)])
def test_valid_positions_are_summed_and_written_as_the_reference_does(
    shape, dtype, act, with_residual, instruction_set
):
    """All halves of both passes; NaN in the padding of every input, and no value behind the tensors is touched."""
    guard = 64
    positions = runs(shape[0], shape[2] if len(shape) == 3 else 1)
    valid = positions if len(shape) == 3 else positions[:, 0].contiguous()

    def tensor():
        memory = torch.full((torch.Size(shape).numel() + guard,), 7.0, dtype=dtype)
        x = memory[:-guard].view(shape)
        x.copy_(torch.where(valid.unsqueeze(1), torch.randn(shape) * 2 + 1, torch.nan))
        return x

    x, grad, residual = tensor(), tensor(), tensor() if with_residual else None
    layer = Layer(torch.rand(shape[1]) + 0.5, torch.randn(shape[1]), 1e-5, act, 0.0)
    if dtype == torch.float64:
        layer = layer._replace(weight=layer.weight.double(), bias=layer.bias.double())
    found, right = cpu.measure(x, valid), reference.measure(x, valid)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for mine, theirs in zip(found, right, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    pairs = []
    for kernel in (cpu, reference):
        y = kernel.normalize(x, right, layer, residual, valid)
        forward = ForwardPass(x, right, layer, residual=residual, valid=valid)
        sums, g = kernel.sum_gradients(grad, forward)
        pairs.append((y, g, kernel.input_gradient(grad, forward, sums / valid.sum(), g), sums))
    for mine, theirs in zip(*pairs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            size = theirs.abs().max().item() + 1
            assert torch.allclose(mine.double(), theirs.double(), rtol=0, atol=tolerance * size)
    for mine in pairs[0][:3]:
        if mine is not None:
            assert not mine.movedim(1, -1)[~valid].any()
    for t in (x, grad):
        assert (t.as_strided((guard,), (1,), t.numel()) == 7).all()
