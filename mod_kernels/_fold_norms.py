"""Batch norms of a network in eval mode, folded into the convolutions before them."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ._compiled import plain_stages
from .foreign import FusedForeign
from .nn import FoldedNorm, MoDBlock
from .nn._hooks import is_untouched


class _Tracer(fx.Tracer):
    """Through everything but PyTorch's own layers and MoD blocks, which fold their norms themselves."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (MoDBlock, FusedForeign)) or super().is_leaf_module(module, name)


def fold_norms(network: nn.Module) -> tuple[int, str]:
    """Fold what can be folded, in place; how many norms, and why not the others if the network can't be traced.

    torch.fx says which norm reads which convolution's output and nothing else does; :func:`fuse_conv_bn_eval`
    folds. In a norm's place an identity is left, so that every module keeps its class and :class:`MoDStage` knows
    the blocks it knew. PyTorch's own ``fx.experimental.optimization.fuse`` would leave one flat graph.
    """
    try:
        with plain_stages(network):
            graph = _Tracer().trace(network)
    except Exception as error:  # whatever a network's own code raises when it is given a proxy
        return 0, f"torch.fx can't trace it: {type(error).__name__}: {' '.join(str(error).split())}"
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    folded = 0
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if node.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        if len(before.users) > 1 or calls[node.target] > 1 or calls[before.target] > 1:
            continue
        conv, norm = network.get_submodule(before.target), network.get_submodule(node.target)
        if _can_be_folded(conv, norm):
            _replace(network, before.target, fuse_conv_bn_eval(conv, norm))
            _replace(network, node.target, FoldedNorm())
            folded += 1
    return folded, ""


def _can_be_folded(conv: nn.Module, norm: nn.Module) -> bool:
    """By exact class: what a subclass computes is not known."""
    return (
        type(conv) is nn.Conv2d
        and type(norm) is nn.BatchNorm2d
        and norm.running_mean is not None
        and norm.running_var is not None
        and not (conv.training or norm.training)
        and is_untouched(conv)
        and is_untouched(norm)
    )


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
