"""torch.fx: a traced model calls our modules, as it calls torch.nn's; their code is not traced.

torch.fx does not trace into a module if its class is in torch.nn. Our modules ask for the same by ``call_whole``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def call_whole(module: nn.Module, *inputs: object, **options: object) -> Any:
    """The call of ``module`` as one node, if torch.fx traces a model that contains it; None if torch.fx does not trace.

    Raises:
        TraceError: If ``module`` itself is the model that torch.fx traces.
    """
    if not any(isinstance(x, Proxy) for x in inputs):
        return None
    tracer: Any = next(x for x in inputs if isinstance(x, Proxy)).tracer
    if tracer.root is module:
        kind = type(module).__name__
        raise TraceError(f"torch.fx needs a model that contains {kind}, got {kind} itself. Wrap it: nn.Sequential(it).")
    return tracer.create_proxy(
        "call_module",
        tracer.path_of_module(module),
        tuple(x for x in inputs if x is not None),
        {name: value for name, value in options.items() if value is not None},
    )
