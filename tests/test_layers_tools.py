"""Layers under other people's tracers, exporters and compilers: what is recorded is torch's own operator."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import Counter

import forked
import onnx
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.kernels import ChannelStatistics, Layer, reference
from batchnorm.kernels.activations import NAMES
from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

OTHERS_WARNINGS = (
    "`torch.jit:DeprecationWarning",
    "You are using the legacy TorchScript:DeprecationWarning",
    "The feature will be removed:DeprecationWarning",
    "`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning",
    "Setting `training` to something other:DeprecationWarning",
    ":torch.jit.TracerWarning",
    "It is recommended that constant folding:UserWarning",
    "unclosed file:ResourceWarning",
    "Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning",
)
pytestmark = [pytest.mark.filterwarnings(f"ignore:{warning}") for warning in OTHERS_WARNINGS]
C = 5


def layer(training: bool = False, kind=BatchNorm2d, **options):
    made = kind(C, **options)
    for name in ("weight", "bias"):
        if getattr(made, name) is not None:
            nn.init.normal_(getattr(made, name))
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made.train(training)


def images(dtype=torch.float32, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, C, 6, 6).to(dtype)


def assert_normalized(y, x, norm, act=None, param=0.0, residual=None):
    """y is act(bn(x) + residual) within the rounding of x alpha + beta: alpha = gamma rstd, beta = b - mean alpha."""
    wide = [
        None if t is None else t.detach().double()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    ]
    mean, var, gamma, beta = wide
    alpha = (var + norm.eps).rsqrt() * (1 if gamma is None else gamma)
    size = (x.double().abs() + reference.along_channels(mean.abs(), x)) * reference.along_channels(alpha.abs(), x)
    size = size + (0 if beta is None else reference.along_channels(beta.abs(), x))
    extra = None if residual is None else residual.double()
    size = size + (0 if extra is None else extra.abs())
    expected = reference.normalize(
        x.double(), ChannelStatistics(mean, var), Layer(gamma, beta, norm.eps, act, param), extra
    )
    # alpha and beta take 4 roundings of float32, the result 2, storing in half precision one of its own for each step;
    # no activation here has a slope above 1.2
    eps = 8 * torch.finfo(torch.float32).eps + 3 * torch.finfo(x.dtype).eps
    assert y.dtype == x.dtype
    assert bool(((y.double() - expected).abs() <= 1.2 * eps * size).all())


def operators(graph) -> Counter:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def with_state(norm):
    """A function of the layer's tensors and an input, and the tensors."""
    state = {name: t.detach().clone() for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
    return lambda state, x: functional_call(norm, state, (x,)), state


# --- eval mode: one operator ------------------------------------------------------------------------------


def exported(norm, x, strict=False):
    program = torch.export.export(nn.Sequential(norm), (x,), strict=strict)
    return program.graph, program.module()


def strictly_exported(norm, x):
    return exported(norm, x, strict=True)


def decomposed(norm, x):
    program = torch.export.export(nn.Sequential(norm), (x,)).run_decompositions()
    return program.graph, program.module()


def made_fx(mode, **options):
    def record(norm, x):
        function, state = with_state(norm)
        graph = make_fx(function, tracing_mode=mode, **options)(state, x)
        return graph.graph, lambda x: graph(state, x)

    return record


def compiled(norm, x):
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph.graph)
        return graph

    run = torch.compile(nn.Sequential(norm), backend=keep, fullgraph=True)
    run(x)
    return graphs[0], run


RECORDERS = {
    "export": exported, "strict export": strictly_exported, "decomposed": decomposed, "compile": compiled,
    "make_fx real": made_fx("real"), "make_fx fake": made_fx("fake"), "make_fx symbolic": made_fx("symbolic"),
    "make_fx before dispatch": made_fx("real", pre_dispatch=True),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS.keys())
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"weight": False}, {"bias": False}], ids=str)
def test_an_eval_layer_is_recorded_as_one_operator_of_torchs(record, options):
    norm, x = layer(**options), images()
    with torch.no_grad():
        graph, run = record(norm, x)
        norms = {name: n for name, n in operators(graph).items() if "batch_norm" in name}
        others = {name for name in operators(graph) if "batch_norm" not in name and "getitem" not in name}
        assert list(norms.values()) == [1]
        assert {
            name for name in others if not any(word in name for word in ("sym_size", "detach", "aten.empty"))
        } == set()
        assert_normalized(run(x), x, norm)


@pytest.mark.slow
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cast", [True, False], ids=["layer cast", "layer float32"])
def test_types_that_torchs_operator_refuses_together_are_cast_around_it(record, dtype, cast):
    norm, x = layer(), images(dtype)
    norm = norm.to(dtype) if cast else norm
    with torch.no_grad():
        graph, run = record(norm, x)
        assert [n for name, n in operators(graph).items() if "batch_norm" in name] == [1]
        assert_normalized(run(x), x, norm)


@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS.keys())
@pytest.mark.parametrize("act", NAMES)
def test_an_activation_is_recorded_behind_the_operator(record, act):
    norm, x = layer(act=act), images()
    with torch.no_grad():
        graph, run = record(norm, x)
        assert [n for name, n in operators(graph).items() if "batch_norm" in name] == [1]
        assert_normalized(run(x), x, norm, act, norm.act_param)


def test_a_residual_is_one_addition_behind_the_operator():
    norm, x, residual = layer(act="relu"), images(), images()
    program = torch.export.export(norm, (x, residual))
    assert sorted(operators(program.graph)) == ["aten.add.Tensor", "aten.batch_norm.default", "aten.relu.default"]
    with torch.no_grad():
        assert_normalized(program.module()(x, residual), x, norm, "relu", residual=residual)


def test_a_residual_of_the_same_type_takes_no_cast_in_a_trace():
    x = images()
    traced = torch.jit.trace(layer(act="relu"), (x, x))
    assert {node.kind() for node in traced.graph.nodes()} & {"aten::to"} == set()


@pytest.mark.parametrize(
    ("kind", "shape"), [(BatchNorm1d, (4, C)), (BatchNorm1d, (4, C, 3)), (BatchNorm3d, (2, C, 2, 2, 3))], ids=str
)
def test_layers_of_every_rank_are_one_operator(kind, shape):
    norm, x = layer(kind=kind), torch.randn(shape)
    graph, run = exported(norm, x)
    assert operators(graph) == {"aten.batch_norm.default": 1}
    with torch.no_grad():
        assert_normalized(run(x), x, norm)


def test_a_trace_has_torchs_node():
    norm, x = layer(), images()
    traced = torch.jit.trace(norm, x)
    assert Counter(node.kind() for node in traced.graph.nodes())["aten::batch_norm"] == 1
    with torch.no_grad():
        assert_normalized(traced(x), x, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_trace_folds_the_layer_into_the_convolution(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    model = nn.Sequential(nn.Conv2d(3, C, 3), layer()).eval().to(dtype)
    with torch.no_grad():
        frozen = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
    assert "aten::batch_norm" not in {node.kind() for node in frozen.graph.nodes()}


class Watching(TorchDispatchMode):
    """Sees every operator and records none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def test_an_eval_layer_computes_digits_that_no_recorder_asked_to_give_up():
    """Outside of recorders values far from 0 keep their digits, whatever watches the operators."""
    norm, x = layer(), images() + 1e5
    norm.running_mean += 1e5
    with torch.no_grad():
        plain = norm(x)
        with Watching():
            watched = norm(x)
        stored = ChannelStatistics(norm.running_mean.double(), norm.running_var.double())
        expected = reference.normalize(x.double(), stored, Layer(norm.weight.double(), norm.bias.double(), norm.eps))
    for y in (plain, watched):
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


# --- train mode: recorded, and the statistics moved -------------------------------------------------------


def moved(norm, x):
    """Output and stored statistics of one step of a copy."""
    norm = copy.deepcopy(norm)
    return norm(x), dict(norm.named_buffers())


def assert_same_step(y, buffers, expected):
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(buffers, expected[1])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"act": "silu"}], ids=str)
def test_make_fx_records_a_step_in_train_mode(mode, options):
    norm, x = layer(True, **options), images()
    expected = moved(norm, x)
    function, state = with_state(norm)
    before = copy.deepcopy(state)
    graph = make_fx(function, tracing_mode=mode)(state, x)
    y = graph(before, x)
    assert_same_step(y, {name: before[name] for name in expected[1]}, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx_records_a_step_of_an_ensemble(mode):
    models = [layer(True) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = torch.randn(3, 4, C, 2, 2)
    step = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))
    graph = make_fx(step, tracing_mode=mode)(parameters, copy.deepcopy(buffers), x)
    expected_buffers = copy.deepcopy(buffers)
    expected = step(parameters, expected_buffers, x)
    torch.testing.assert_close(graph(parameters, buffers, x), expected)
    torch.testing.assert_close(buffers, expected_buffers)


def test_train_mode_runs_on_fake_tensors_alone():
    norm = layer(True)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False) as mode:
        state = {name: mode.from_tensor(t) for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
        y = functional_call(norm, state, (mode.from_tensor(images()),))
    assert y.shape == images().shape
    assert norm.num_batches_tracked == 0
    assert type(norm._skipped) is torch.Tensor


def test_aot_module_trains_as_the_layer_does():
    from torch._functorch.aot_autograd import aot_module
    from torch._functorch.compilers import nop

    norm, x = layer(True), images()
    expected = moved(norm, x)
    run = aot_module(norm, nop)
    y = run(x)
    y.sum().backward()
    assert_same_step(y, dict(norm.named_buffers()), expected)


def test_aot_export_takes_forward_and_backward_of_train_mode():
    from torch._functorch.aot_autograd import aot_export_module

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = layer(True)

        def forward(self, x):
            return (self.norm(x).pow(2).sum(),)

    graph, signature = aot_export_module(Loss(), [images()], trace_joint=True, output_loss_index=0)
    assert set(signature.buffers_to_mutate.values()) == {f"norm.{name}" for name, _ in Loss().norm.named_buffers()}
    assert operators(graph.graph)["batchnorm.train_backward.default"] == 1


@pytest.mark.parametrize("captured", [True, False], ids=["buffers captured", "buffers given"])
def test_functionalize_takes_a_step_in_train_mode(captured):
    norm, x = layer(True), images()
    expected = moved(norm, x)
    if captured:
        y, buffers = torch.func.functionalize(norm)(x), dict(norm.named_buffers())
    else:
        function, state = with_state(norm)
        y = torch.func.functionalize(function)(state, x)
        buffers = {name: state[name] for name in expected[1]}
    assert_same_step(y, buffers, expected)


@pytest.mark.parametrize("norm", [{}, {"act": "relu"}, {"momentum": 0.0}], ids=str)
def test_draft_export_takes_train_mode_also_when_nothing_moves(norm):
    program = torch.export.draft_export(nn.Sequential(layer(True, **norm)), (images(),))
    assert operators(program.graph)["batchnorm.train_forward.default"] == 1


def test_a_batch_that_moves_nothing_is_told_as_such_to_recorders():
    """A bad batch is skipped and counted by the operator, in the graph that make_fx has recorded too."""
    norm, x = layer(True), images()
    function, state = with_state(norm)
    graph = make_fx(function, tracing_mode="fake")(copy.deepcopy(state), x)
    before = copy.deepcopy(state)
    x[0, 0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN or infinity in the batch statistics of 1 of 5 channels"):
        graph(state, x)
    assert state["running_mean"][0] == before["running_mean"][0]
    assert not torch.equal(state["running_mean"][1:], before["running_mean"][1:])


@pytest.mark.slow
def test_a_trained_program_loads_in_a_process_that_imports_batchnorm_behind_torch(tmp_path):
    path = tmp_path / "train.pt2"
    torch.export.save(torch.export.export(nn.Sequential(layer(True)), (images(),)), path)
    code = f"import torch, batchnorm; print(type(torch.export.load({str(path)!r})).__name__)"
    done = forked.run(code)
    assert done.stdout.strip() == "ExportedProgram", done.stderr


@pytest.mark.slow
def test_the_compiler_is_not_loaded_for_our_operators():
    code = "import torch, sys, batchnorm.layers; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- ONNX -------------------------------------------------------------------------------------------------


def traced_to_onnx(model, x, **options):
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, **options)
    return onnx.load_from_string(file.getvalue()).graph


def test_onnx_gets_one_node_for_a_layer_in_eval_mode():
    graph = traced_to_onnx(layer(act="relu"), images())
    assert [node.op_type for node in graph.node] == ["BatchNormalization", "Relu"]


def test_onnx_export_in_train_mode_is_refused_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"ONNX export needs batch norm layers in eval mode.*Call model\.eval\(\)"):
        traced_to_onnx(layer(True), images(), training=torch.onnx.TrainingMode.TRAINING)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_onnx_export_takes_a_layer_without_stored_statistics(training):
    norm = BatchNorm2d(C, track_running_stats=False).train(training)
    kinds = {node.op_type for node in traced_to_onnx(norm, images()).node}
    assert "ReduceMean" in kinds


# --- subclasses and foreign constructions -----------------------------------------------------------------


class OwnActivation(BatchNorm2d):
    """A subclass as timm writes them: an activation module under our setting's name."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", [nn.ReLU(), nn.PReLU(), torch.relu], ids=["ReLU", "PReLU", "function"])
def test_a_subclass_may_have_an_act_of_its_own(act, training):
    norm, x = OwnActivation(C, act).train(training), images()
    expected = act(nn.BatchNorm2d(C).train(training)(x))
    torch.testing.assert_close(norm(x), expected)
    assert norm.act is act
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        torch.testing.assert_close(again.eval()(x), norm.eval()(x))
        assert again._act is None


@pytest.mark.parametrize("name", ["act", "act_param", "memory", "single_element"])
@pytest.mark.parametrize(
    "value",
    [nn.ReLU(), nn.Parameter(torch.zeros(2)), "save", None, 3],
    ids=["module", "parameter", "word", "None", "number"],
)
def test_a_subclass_may_use_the_name_of_any_setting(name, value):
    class Own(BatchNorm2d):
        def __init__(self):
            super().__init__(C)
            setattr(self, name, value)

    norm, x = Own(), images()
    assert getattr(norm, name) is value
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(C)(x))
    assert (norm._act, norm._memory, norm._single_element) == (None, None, "error")


def test_a_subclass_may_register_under_the_name_of_a_setting():
    class Own(BatchNorm2d):
        def __init__(self):
            super().__init__(C)
            self.register_buffer("memory", torch.ones(2))
            self.add_module("act", nn.ReLU())
            self.register_parameter("act_param", nn.Parameter(torch.zeros(1)))

    norm = Own()
    assert norm.memory.sum() == 2
    assert isinstance(norm.act, nn.ReLU)
    assert {"memory", "act_param"} < norm.state_dict().keys()
    torch.testing.assert_close(norm(images()).shape, images().shape)


def test_a_subclass_that_has_none_of_its_own_reads_the_settings():
    class Plain(BatchNorm2d):
        pass

    norm = Plain(C, act="leaky_relu", act_param=0.2, memory="save", single_element="population")
    assert (norm.act, norm.act_param, norm.memory, norm.single_element) == ("leaky_relu", 0.2, "save", "population")


def test_settings_of_a_layer_are_checked_when_they_are_assigned():
    norm = layer()
    norm.act = "leaky_relu"
    assert norm.act_param == 0.01
    norm.act_param = 0.3
    assert (norm._act, norm._act_param) == ("leaky_relu", 0.3)
    norm.act, norm.memory, norm.single_element = None, "save", "population"
    assert (norm.act, norm.act_param) == (None, 0.0)
    for name, value in (
        ("act", "tanh"),
        ("act", nn.ReLU()),
        ("act_param", 1.0),
        ("memory", 1),
        ("single_element", "x"),
    ):
        with pytest.raises((ValueError, TypeError)):
            setattr(norm, name, value)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_whose_class_was_assigned_runs(training):
    x, theirs = images(), nn.BatchNorm2d(C).train(training)
    expected = copy.deepcopy(theirs)(x)
    theirs.__class__ = BatchNorm2d
    torch.testing.assert_close(theirs(x), expected)
    assert (theirs.act, theirs.skipped_updates) == (None, 0)
    assert "BatchNorm2d" in repr(theirs.half().train().eval())


def test_a_layer_whose_class_was_assigned_counts_what_it_skips():
    theirs = nn.BatchNorm1d(2)
    theirs.__class__ = BatchNorm1d
    with pytest.warns(RuntimeWarning, match="NaN or infinity"):
        theirs(torch.tensor([[1.0, torch.nan], [2.0, 0.0]]))
    assert theirs.skipped_updates == 1


def test_a_subclass_that_skips_our_constructor_runs():
    class Skips(BatchNorm2d):
        def __init__(self, channels):
            nn.BatchNorm2d.__init__(self, channels)

    x = images()
    torch.testing.assert_close(Skips(C)(x), nn.BatchNorm2d(C)(x))


def test_a_pickle_from_before_settings_were_private_loads():
    norm = layer(act="elu", act_param=0.5, memory="save", single_element="population")
    state = norm.__getstate__() if hasattr(norm, "__getstate__") else dict(vars(norm))
    names = ("act", "act_param", "memory", "single_element")
    old = {key.removeprefix("_") if key[1:] in names else key: value for key, value in state.items()}
    assert {*names} < old.keys()
    again = BatchNorm2d.__new__(BatchNorm2d)
    again.__setstate__(old)
    x = images()
    assert [getattr(again, name) for name in names] == ["elu", 0.5, "save", "population"]
    torch.testing.assert_close(again(x), norm(x))
