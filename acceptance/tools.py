"""`python acceptance/tools.py [FOLDER [TOOL ...]]`: what other people's tools make of our layers and of torch.nn's.

Each tool runs on four arms of one small model: torch.nn's layers, ours, ours with fused activations, and the last
after ``for_export``. Packages that torch does not bring (onnxscript, timm, opacus, torchao, fvcore) are taken from the
folder, where they were unpacked without their dependencies. Writes tools.json: for each tool what it found in each arm,
and beside a number of nodes how far the result is from the model's own, in units of float32's or bfloat16's eps of its
largest value. A tool that raises is written down with the first line of its error. With names of tools only these run,
and nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import logging
import pkgutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import batchnorm as bn

HERE = Path(__file__).parent
TOOLS = []


def main(packages: str | None, names: list[str]) -> None:
    if packages:
        sys.path.append(packages)
    _stand_in_for_torchvision()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True
    table = {}
    for tool in TOOLS:
        if not names or tool.__name__ in names:
            row = table[tool.__name__] = {arm: outcome(tool, arm) for arm in ARMS}
            print(f"{tool.__name__:34}" + "".join(f"| {row[arm]:38.38} " for arm in ARMS), flush=True)
    if names:
        return
    fresh = HERE / "tools.json.new"
    fresh.write_text(json.dumps({"torch": torch.__version__, "tools": table}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(HERE / "tools.json")


def outcome(tool, arm: str) -> str:
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return str(tool(ARMS[arm]))
    except Exception as error:  # noqa: BLE001 - what a tool raises is its result
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return f"{type(error).__name__}: {lines[0][:160]}"


def tool(function):
    TOOLS.append(function)
    return function


def tools(**variants):
    """Makes a tool of each name from one function, with what the name stands for as arguments behind the arm."""

    def register(function):
        for name, arguments in variants.items():
            tool(functools.partial(function, **arguments)).__name__ = name
        return function

    return register


# --- the model and its arms ---


class Block(nn.Module):
    """A residual block, written as most are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def written(residual: bool = True) -> nn.Sequential:
    """A network with statistics that are not those of an empty layer."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    middle = [Block(8)] if residual else [nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*stem, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def example(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def fused(model):
    return bn.convert(model, fuse=True, example=example())


def exported(model):
    return bn.for_export(fused(model))


ARMS = {"torch.nn": copy.deepcopy, "ours": bn.convert, "ours, fused": fused, "after for_export": exported}


def apart(got, expected) -> str:
    """The largest difference in eps of the largest value."""
    eps = torch.finfo(expected.dtype).eps
    return f"{float((got.double() - expected.double()).abs().max() / expected.double().abs().max() / eps):.0f} eps"


def nodes(graph, *words: str) -> int:
    calls = [node for node in graph.nodes if node.op.startswith("call")]
    return sum(not words or any(word in str(node.target) for word in words) for node in calls)


def norms(graph) -> str:
    return f"{nodes(graph)} ops, {nodes(graph, 'batch_norm', 'train_forward')} of batch norm"


# --- tracers ---


@tools(functional_call_fake_train={"train": True}, functional_call_fake_eval={"train": False})
def fake_state(arm, train: bool):
    model, x = arm(written()).train(train), example()
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        state = {k: mode.from_tensor(v) for k, v in [*model.named_parameters(), *model.named_buffers()]}
        return tuple(functional_call(model, state, (mode.from_tensor(x),)).shape)


@tools(
    make_fx_fake_train={"mode": "fake", "train": True},
    make_fx_symbolic_train={"mode": "symbolic", "train": True},
    make_fx_fake_eval={"mode": "fake", "train": False},
    make_fx_symbolic_eval={"mode": "symbolic", "train": False},
)
def made_fx(arm, mode: str, train: bool):
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = arm(written()).train(train), example()
    state = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    graph = make_fx(lambda state, x: functional_call(model, state, (x,)), tracing_mode=mode)(state, x)
    expected = copy.deepcopy(model)(x)
    return f"{norms(graph.graph)}, {apart(graph(state, x), expected)}"


@tools(aot_module_train={"train": True}, aot_module_eval={"train": False})
def through_aot(arm, train: bool):
    from torch._functorch.aot_autograd import aot_module
    from torch._functorch.compilers import nop

    model, x = arm(written()).train(train), example()
    expected = copy.deepcopy(model)(x)
    got = aot_module(model, nop)(x)
    got.sum().backward()
    return apart(got, expected)


@tool
def aot_export_joint_train(arm):
    from torch._functorch.aot_autograd import aot_export_module

    class Loss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return (self.model(x).sum(),)

    graph, _ = aot_export_module(Loss(arm(written()).train()), [example()], trace_joint=True, output_loss_index=0)
    return f"{nodes(graph.graph)} ops"


@tools(functionalize_train={"train": True}, functionalize_eval={"train": False})
def functionalized(arm, train: bool):
    model, x = arm(written()).train(train), example()
    expected = copy.deepcopy(model)(x)
    return apart(torch.func.functionalize(model)(x), expected)


# --- exporters ---


@tool
def draft_export_train(arm):
    from torch.export import draft_export

    program = draft_export(arm(written()).train(), (example(),))
    return norms(program.graph)


@tool
def export_then_decompose(arm):
    model, x = arm(written()), example()
    program = torch.export.export(model, (x,)).run_decompositions()
    core = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    foreign = [name for name in core if torch.Tag.core not in _tags(name)]
    return f"{norms(program.graph)}, {len(foreign)} not core, {apart(program.module()(x), model(x))}"


def _tags(name: str):
    _, operator, *overload = name.split(".") if name.count(".") else ("", name)
    packet = getattr(torch.ops.aten, operator, None)
    return getattr(packet, (overload or ["default"])[0]).tags if packet else ()


@tool
def export_strict(arm):
    model, x = arm(written()), example()
    program = torch.export.export(model, (x,), strict=True)
    return f"{norms(program.graph)}, {apart(program.module()(x), model(x))}"


@tool
def symbolic_trace_keeps_leaves(arm):
    graph = torch.fx.symbolic_trace(arm(written())).graph
    return f"{sum(node.op == 'call_module' for node in graph.nodes)} modules, {nodes(graph)} calls"


@tool
def train_pt2_in_a_new_process(arm):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.pt2"
        torch.export.save(torch.export.export(arm(written()).train(), (example(),)), path)
        code = f"import torch, batchnorm; print(type(torch.export.load({str(path)!r})).__name__)"
        done = subprocess.run(
            [sys.executable, "-c", _same_package() + code], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1][:160]


def _same_package() -> str:
    """For an arm that is an older checkout: the new process takes the package that this one has."""
    folder = str(Path(bn.__file__).parents[1])
    finders = "sys.meta_path[:] = [f for f in sys.meta_path if 'kbuild' not in type(f).__name__.lower()]"
    return f"import sys; {finders}; sys.path.insert(0, {folder!r}); "


@tools(
    onnx_dynamo={"train": False, "dynamo": True, "optimize": False},
    onnx_dynamo_optimized={"train": False, "dynamo": True},
    onnx_torchscript={"train": False, "dynamo": False},
    onnx_dynamo_train={"train": True, "dynamo": True},
    onnx_torchscript_train={"train": True, "dynamo": False, "training": torch.onnx.TrainingMode.TRAINING},
)
def onnx_operators(arm, train: bool, **options) -> str:
    import onnx

    model, file = arm(written()).train(train), io.BytesIO()
    if not options["dynamo"]:
        torch.onnx.export(model, (example(),), file, **options)
        graph = onnx.load_from_string(file.getvalue()).graph
    else:
        graph = torch.onnx.export(model, (example(),), verbose=False, **options).model_proto.graph
    kinds = Counter(node.op_type for node in graph.node if node.op_type not in {"Constant", "Identity"})
    return f"{sum(kinds.values())} nodes, {kinds['BatchNormalization']} of batch norm"


@tool
def pt2e_quantization(arm):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    try:
        from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    except ImportError:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
    model, x = arm(written(residual=False)), example(64)
    program = torch.export.export(model, (x,)).module()
    prepared = prepare_pt2e(program, XNNPACKQuantizer().set_global(get_symmetric_quantization_config()))
    prepared(x)
    converted = convert_pt2e(prepared)
    error = float((converted(x) - model(x)).abs().max())
    return f"{nodes(converted.graph)} calls, error {error:.3f}"


# --- compilers and their passes ---


@tools(jit_freeze_float32={"dtype": torch.float32}, jit_freeze_bfloat16={"dtype": torch.bfloat16})
def frozen_jit(arm, dtype) -> str:
    model, x = arm(written()).to(dtype), example().to(dtype)
    with torch.no_grad():
        expected = model(x)
        graph = torch.jit.optimize_for_inference(torch.jit.trace(model, x))
        kinds = Counter(node.kind() for node in graph.graph.nodes())
        return f"{kinds['aten::batch_norm']} of 3 unfolded, {apart(graph(x), expected)}"


@tools(
    inductor_freezing_float32={"dtype": torch.float32, "freezing": True},
    inductor_freezing_bfloat16={"dtype": torch.bfloat16, "freezing": True},
    efficient_conv_bn_eval={"dtype": torch.float32, "efficient_conv_bn_eval_fx_passes": True},
)
def inductor(arm, dtype, **options) -> str:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    model, x = arm(written(residual=False)).to(dtype), example().to(dtype)
    seen = []

    def count(graph):
        seen.append(graph)
        return graph

    counters.clear()
    with torch.no_grad(), config.patch(**options):
        expected = model(x)
        got = torch.compile(model)(x)
    found = {key: n for key, n in counters["inductor"].items() if "bn" in key or "fold" in key}
    return f"{found or 'nothing'}, {apart(got, expected)}"


@tool
def jit_trace(arm):
    model, x = arm(written()), example()
    graph = torch.jit.trace(model, x)
    kinds = Counter(node.kind() for node in graph.inlined_graph.nodes())
    return f"{kinds['aten::batch_norm']} aten::batch_norm, {apart(graph(x), model(x))}"


@tool
def fvcore_flops(arm):
    from fvcore.nn import FlopCountAnalysis

    model = arm(written())
    counted = FlopCountAnalysis(model, example()).unsupported_ops_warnings(False)
    return f"batch norm {counted.by_operator().get('batch_norm', 0):.0f}"


# --- tools that go by class ---


@tool
def ao_fuse_modules(arm):
    from torch.ao.quantization import fuse_modules

    model, x = arm(written(residual=False)), example()
    got = fuse_modules(copy.deepcopy(model), [["0", "1", "2"], ["3", "4", "5"]])
    return f"{_layers(got)} layers left, {apart(got(x), model(x))}"


@tool
def ao_fuse_fx(arm):
    from torch.ao.quantization.quantize_fx import fuse_fx

    model, x = arm(written()), example()
    got = fuse_fx(copy.deepcopy(model))
    return f"{_layers(got)} layers left, {apart(got(x), model(x))}"


@tool
def ao_prepare_fx(arm):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = arm(written()), example(64)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
    prepared(x)
    error = float((convert_fx(prepared)(x) - model(x)).abs().max())
    return f"{_layers(prepared)} layers left, error {error:.3f}"


@tool
def fx_experimental_fuse(arm):
    from torch.fx.experimental.optimization import fuse

    model, x = arm(written()), example()
    got = fuse(model)
    return f"{_layers(got)} layers left, {apart(got(x), model(x))}"


def _layers(model) -> int:
    return len(bn.find(model))


def _stand_in_for_torchvision() -> None:
    """timm and Lightning import torchvision, whose compiled part may be built for another torch; nothing calls it."""
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it has loaded its own
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")


def swapped(arm, convert) -> str:
    """A conversion of classes: whether the model still computes what it did."""
    model, x = arm(written()), example()
    expected = model(x)
    return apart(convert(copy.deepcopy(model)).eval()(x), expected)


@tools(
    convert_sync_batchnorm={"converter": "torch.nn:SyncBatchNorm.convert_sync_batchnorm"},
    timm_convert_sync_batchnorm={"converter": "timm.layers:convert_sync_batchnorm"},
    timm_convert_splitbn={"converter": "timm.layers:convert_splitbn_model"},
    timm_freeze_batch_norm_2d={"converter": "timm.layers:freeze_batch_norm_2d"},
)
def converted(arm, converter: str) -> str:
    return swapped(arm, pkgutil.resolve_name(converter))


@tool
def fuse_conv_bn_eval(arm):
    def convert(model):
        model[0], model[1] = torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
        return model

    return swapped(arm, convert)


@tool
def to_mkldnn(arm):
    from torch.utils.mkldnn import to_mkldnn as convert

    model, x = arm(written(residual=False))[:6], example()
    got = convert(copy.deepcopy(model))(x.to_mkldnn())
    return apart(got.to_dense(), model(x))


@tool
def opacus_validator(arm):
    from opacus.validators import ModuleValidator

    return f"{len(ModuleValidator.validate(arm(written()).train(), strict=False))} errors named"


@tool
def lightning_sync_batchnorm(arm):
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    return swapped(arm, TorchSyncBatchNorm().apply)


if __name__ == "__main__":
    if not hasattr(bn, "for_export"):
        del ARMS["after for_export"]
    main(sys.argv[1] if len(sys.argv) > 1 else None, sys.argv[2:])
