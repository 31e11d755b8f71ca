"""What kind of tracing is going on, and what an export is to become."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

EXPORT_MODES = ("portable", "fused")

# Process-wide, like the backend that was asked for.
_export_mode = "portable"


@contextmanager
def export_mode(mode: str) -> Iterator[None]:
    """What ``torch.export`` makes of this package's ops inside the ``with``.

    ``"portable"``, which holds where nothing is said: plain ATen, for ONNX and every other runtime.
    ``"fused"``: the ops stay, as they do under ``torch.compile``, for AOTInductor. Such a graph runs where
    mod_kernels is imported (or its library loaded and its schemas defined), on the device it was exported on.
    Export under ``torch.no_grad()``: with gradients the block is several ops. Process-wide, not per thread.

    Raises:
        ValueError: mode is neither of the two.
    """
    global _export_mode
    if mode not in EXPORT_MODES:
        raise ValueError(f"export mode must be one of {', '.join(map(repr, EXPORT_MODES))}, got {mode!r}")
    before, _export_mode = _export_mode, mode
    try:
        yield
    finally:
        _export_mode = before


def as_leaf(module: nn.Module, x: fx.Proxy, *rest: Any) -> fx.Proxy:
    """The call of ``module`` as one node of the graph that ``torch.fx`` is tracing."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *rest), {})


def exporting() -> bool:
    """Whether ``torch.export`` is tracing (strict or not) and is to get plain ATen.

    ``torch.compiler.is_exporting()``, but right under ``torch.compile`` too: torch 2.11's Dynamo takes that
    function for True wherever it traces it.
    """
    return torch.compiler._is_exporting_flag and _export_mode == "portable"
