"""A network compiled whole for one shape of input, by TorchInductor, its weights frozen into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ._tracing import export_mode
from .nn import MoDStage
from .nn.stage import PlainStage


def compiled(network: nn.Module, example: tuple[Tensor, ...], cuda_graph: bool = False) -> Callable:
    """``network`` as a function of inputs of the example's shapes, strides, dtypes and device, without gradients.

    Exported (fused ops stay ops) and then compiled, not by ``torch.compile``: that looks at every call whether
    each of some hundreds of parameters is still the one it was. Here nothing is looked at, and a later change of
    the network does not show. With ``cuda_graph`` a call's output is overwritten
    by the next one's.
    """
    options: dict[str, object] = {"freezing": True}
    if cuda_graph:
        options["triton.cudagraphs"] = True
    with torch.no_grad():
        with export_mode("fused"):
            program = torch.export.export(network, example)
        return torch._inductor.compile(program.module(), list(example), options=options)


@contextmanager
def plain_stages(network: nn.Module) -> Iterator[None]:
    """Inside, the MoD blocks of every :class:`MoDStage` pool for themselves."""
    stages = [module for module in network.modules() if type(module) is MoDStage]
    try:
        for stage in stages:
            stage.__class__ = PlainStage
        yield
    finally:
        for stage in stages:
            stage.__class__ = MoDStage
