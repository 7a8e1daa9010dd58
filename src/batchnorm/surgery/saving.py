"""memory="save" for a whole model: set on each layer where it is safe, with hooks around the model's forward.

With ``memory="save"``, a layer with a leaky ReLU writes its result over its input. So it gets this setting only if the
code shows that nothing else reads the input. Results of other layers are computed again in the backward pass. This
needs the context ``batchnorm.memory.saving`` around the model's forward: one hook enters it, another hook leaves it.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from batchnorm.layers import batch_norms
from batchnorm.population import preserve_state
from batchnorm.population.tensor_trees import Batch
from batchnorm.surgery.dataflow import Flow, flows, registrations, static_callers
from batchnorm.surgery.patterns import has_input_of_its_own, is_ours


def save_memory(model: nn.Module) -> None:
    """Change the model in place: its layers store less for the backward pass."""
    layers: list[Any] = [layer for layer in batch_norms(model).values() if is_ours(layer)]
    writing = [layer for layer in layers if layer._act == "leaky_relu"]
    safe = _with_inputs_of_their_own(model) if writing else set()
    for layer in layers:
        if layer not in writing or layer in safe:
            layer.memory = "save"
    if enter_saving not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(enter_saving)
        model.register_forward_hook(leave_saving, always_call=True)


def stop_saving(model: nn.Module) -> None:
    """Change the model in place: remove the hooks of ``save_memory`` from all its modules."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in {enter_saving, leave_saving}]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


def _with_inputs_of_their_own(model: nn.Module) -> set[nn.Module]:
    """Layers called at one place, on the result of a convolution or linear layer that nothing else reads."""
    with preserve_state(model):
        known, _ = flows(model)
        callers, registered = static_callers(model, known), registrations(model)
    return {
        layer
        for flow in known.values()
        for layer in _alone(flow)
        if registered[layer] == 1 and callers[layer] == {flow.module}
    }


def _alone(flow: Flow) -> list[nn.Module]:
    nodes = [node for node in flow.graphs[True].nodes if node.op == "call_module"]  # only train mode overwrites inputs
    calls = Counter(flow.called(node) for node in nodes)
    modules = [flow.called(node) for node in nodes if has_input_of_its_own(flow, node)]
    return [module for module in modules if module is not None and calls[module] == 1]


class _Open(threading.local):
    """The open ``saving`` blocks of this thread, each with the model whose forward opened it."""

    def __init__(self) -> None:
        self.blocks: list[tuple[nn.Module, AbstractContextManager[None]]] = []


_open = _Open()

# the hooks are module-level functions, which pickle and deepcopy can store; a compiler plans memory itself


def enter_saving(module: nn.Module, args: tuple[Batch, ...]) -> None:
    """A forward pre-hook that enters ``saving``."""
    if torch.compiler.is_compiling():
        return
    from batchnorm.memory import saving

    leave_saving(module, args, None)  # if Ctrl-C ended the last forward, its hook was not called
    block = saving()
    block.__enter__()
    _open.blocks.append((module, block))


def leave_saving(module: nn.Module, args: tuple[Batch, ...], output: Batch) -> None:  # noqa: ARG001 - a hook's arguments
    """A forward hook that leaves ``saving``; it is also called if the forward raises."""
    if not torch.compiler.is_compiling() and _open.blocks and _open.blocks[-1][0] is module:
        _open.blocks.pop()[1].__exit__(None, None, None)
