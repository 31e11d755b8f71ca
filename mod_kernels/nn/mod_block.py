"""The MoD block as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from .. import _add_relu_mod_block, _autograd, _checks, _training, functional
from .._layout import OTHER, layout_of
from .._tracing import as_leaf, exporting
from ..spec import MoDSpec
from ._folding import fold, watched, why_not_fusible
from ._hooks import is_untouched
from ._spec_cache import SpecCache
from .conv_blocks import NarrowConvBlock
from .selector import ChannelSelector


class MoDBlock(nn.Module):
    """The block of arXiv 2409.17016: k channels per sample are chosen, processed, scaled and added to x.

    ``y = x``, then ``y[:, P] += scores * conv_block(x[:, index])``; the other channels pass through bit for bit.
    Each step runs on the best backend, with gradients. After :func:`mod_kernels.accelerate` the whole block is
    one op wherever it is in eval mode and no gradient is needed.

    Args:
        channels: C.
        conv_block: any module from (N, k, H, W) to the same.
        k: channels processed, 1 <= k <= C.
        reduction: C over the selector's hidden width.
        position: where the result is added: ``"first"`` k channels (the paper), ``"last"`` k, or
            ``"original"``, the channels that were chosen.
        bias: biases in the selector; the paper has none.
        overwrite_input: let the block write into x where no gradient is needed, x is dense, and no export is
            going on. Right where nothing else reads x, as inside a sequential stage.

    Raises:
        ValueError: k is not between 1 and C, position is none of the three, or conv_block is one of this package's
            and made for another k.
    """

    def __init__(
        self,
        channels: int,
        conv_block: nn.Module,
        k: int,
        reduction: int = 16,
        position: str = "first",
        bias: bool = False,
        overwrite_input: bool = False,
    ) -> None:
        super().__init__()
        _checks.where(position)
        if isinstance(conv_block, NarrowConvBlock) and conv_block.k != k:
            raise ValueError(f"conv_block must take the k={k} channels that are chosen, it takes {conv_block.k}")
        self.channels, self.k, self.position = channels, k, position
        self.overwrite_input = overwrite_input
        self.selector = ChannelSelector(channels, k, reduction, bias)
        self.conv_block = conv_block
        self._fused: SpecCache | None = None  # set by mod_kernels.accelerate

    def forward(self, x: Tensor, pooled: Tensor | None = None, overwrite_input: bool = False) -> Tensor:
        """x (N, C, H, W) to the same.

        ``pooled`` (N, C), the means of x's planes, saves the pass that pools. ``overwrite_input`` allows this call
        what the attribute of that name allows all of them.
        """
        if isinstance(x, fx.Proxy):  # torch.fx can't follow the choices below
            return as_leaf(self, x, pooled, overwrite_input)
        spec = self._spec_for(x, pooled) if self._fused is not None else None
        overwrite_input = overwrite_input or self.overwrite_input
        if spec is not None:
            if overwrite_input and _may_be_overwritten(x):
                return functional.mod_block_(x, spec, pooled)
            return functional.mod_block(x, spec, pooled)
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be (N, C={self.channels}, H, W), got shape {tuple(x.shape)}")
        x, gathered, scores, index = self._select_gather(x, pooled)
        z = self._convolve(gathered)
        if overwrite_input and _may_be_overwritten(x) and not _autograd.needed(x, z, scores):
            return functional.fuse_channels_(x, z, scores, index, self.position)
        return functional.fuse_channels(x, z, scores, index, self.position)

    def after_ending(self, out: Tensor, identity: Tensor | None, relu: bool) -> Tensor | None:
        """``self(relu(out + identity))``, both written into ``out``; None where that can't be.

        For :class:`mod_kernels.nn.MoDStage`, which knows that nothing else reads out (and where there may be no
        identity, or no ReLU). In inference one op, of an engine that has it. In training, with the ReLU, one map
        is kept for the backward where the ending and the block by themselves would keep two.
        """
        if self._fused is not None and _add_relu_mod_block.may_be_served(out.device.type):
            spec = None if _autograd.needed(identity) else self._spec_for(out, None)
            if spec is not None:
                return _add_relu_mod_block.add_relu_mod_block_(out, identity, relu, spec)
        if not relu:
            return None
        # Not left to `needed`: going through the parameters costs as much as a whole kernel takes.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not self._selects_plainly():
            return None
        if not _autograd.needed(out, identity, *self.selector.parameters()) or out._is_view():
            return None
        selector = self.selector.parts()
        engine = _training.serving(out, selector, self.k, self.position, None, _training.Pair.OPS)
        if engine is None:
            return None
        pair = _training.Pair(engine, self.position)
        x, gathered, scores, index = pair.begin(out, identity, selector, self.k)
        return pair.end(x, self._convolve(gathered), scores, index)

    def _select_gather(self, x: Tensor, pooled: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x to be fused into, the gathered channels, scores and index."""
        if (
            torch.is_grad_enabled()
            and self._selects_plainly()
            and _autograd.needed(x, pooled, *self.selector.parameters())
            and not exporting()
        ):
            selector = self.selector.parts()
            engine = _training.serving(x, selector, self.k, self.position, pooled, _training.BLOCK_OPS)
            if engine is not None:
                return _training.select_gather(engine, x, selector, self.k, pooled)
        scores, index = self.selector(x, pooled)
        return x, functional.gather_channels(x, index), scores, index

    def _selects_plainly(self) -> bool:
        """Whether the selector may be run in parts: it is this package's own, and nobody looks on."""
        return type(self.selector) is ChannelSelector and is_untouched(self.selector)

    def _convolve(self, gathered: Tensor) -> Tensor:
        z = self.conv_block(gathered)
        if z.shape != gathered.shape:
            raise ValueError(
                f"conv_block must keep the shape of its input {tuple(gathered.shape)}, got {tuple(z.shape)}"
            )
        return z

    def spec(self) -> MoDSpec:
        """The block in eval mode as plain tensors: BN folded, detached, as the weights are now.

        Raises:
            ValueError: the block is not of a kind that can be folded; says why.
        """
        reason = why_not_fusible(self)
        if reason:
            raise ValueError(f"this MoDBlock has no spec: {reason}")
        fc1, fc2, convs = self.selector.fc1, self.selector.fc2, self.conv_block.folded()
        return MoDSpec(
            fc1.weight.detach(),
            fc2.weight.detach(),
            self.selector.k,
            convs.kind,
            convs.weights,
            convs.biases,
            None if fc1.bias is None else fc1.bias.detach(),
            None if fc2.bias is None else fc2.bias.detach(),
            self.position,
            convs.final_relu,
        )

    def _spec_for(self, x: Tensor, pooled: Tensor | None) -> MoDSpec | None:
        """The folded spec if this call may run as one op."""
        if self.training or exporting():  # an export keeps the parts, in plain ATen
            return None
        if torch.is_grad_enabled() and _autograd.needed(x, pooled, *self.parameters()):
            return None
        if torch.compiler.is_compiling():
            # Versions and addresses can't be traced: the fold is part of the graph, so it is never stale.
            return fold(self)
        if forward_ad._current_level >= 0:  # a fold has no tangents
            return None
        return self._fused.get(self, fold, watched)

    def _drop_folded(self) -> None:
        if self._fused is not None:
            self._fused.clear()

    # The cache checks itself at each call; these let go of memory at once, and answer writes it can't see.

    def train(self, mode: bool = True) -> MoDBlock:
        self._drop_folded()
        return super().train(mode)

    def _apply(self, fn: Callable, recurse: bool = True) -> MoDBlock:
        self._drop_folded()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_folded()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        text = f"channels={self.channels}, k={self.k}, position={self.position!r}"
        text += ", overwrite_input=True" if self.overwrite_input else ""
        return text + (", accelerated" if self._fused is not None else "")


def _may_be_overwritten(x: Tensor) -> bool:
    # What requires a gradient though none is recorded is kept by someone who will run the block again:
    # torch.utils.checkpoint with use_reentrant=True.
    return not x.requires_grad and not exporting() and layout_of(x) != OTHER
