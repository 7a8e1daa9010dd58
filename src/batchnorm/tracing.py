"""torch.fx: traces a model around our modules, as around torch.nn's, not through them.

torch.fx keeps a module whole if its class is in torch.nn. Our modules request it themselves.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError


def call_whole(module: nn.Module, *inputs: Any) -> Any:
    """The call of ``module`` as one node, if torch.fx is tracing a model that holds it; else None."""
    if not any(isinstance(x, Proxy) for x in inputs):
        return None
    tracer: Any = next(x for x in inputs if isinstance(x, Proxy)).tracer
    if tracer.root is module:
        raise TraceError(f"torch.fx traces models that hold a {type(module).__name__}, got one alone. Wrap it in one.")
    return tracer.create_proxy(
        "call_module", tracer.path_of_module(module), tuple(x for x in inputs if x is not None), {}
    )
