"""A stage of alternating blocks in which a standard block's ending pools for the MoD block after it."""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import _autograd, functional
from .._layout import OTHER, layout_of
from .._tracing import exporting
from ._endings import Ending, parts_of
from ._hooks import is_untouched
from .mod_block import MoDBlock


class MoDStage(nn.Sequential):
    """A ``nn.Sequential``, with the same keys and the same numbers, that saves the MoD blocks a pass over x.

    Where a standard block stands before a :class:`MoDBlock`, its ending also takes the mean of every plane as it
    writes it (:func:`mod_kernels.functional.add_relu_pool_`), and the MoD block gets them. Standard blocks are
    torchvision's own: ``BasicBlock`` and ``Bottleneck`` (``relu(out + identity)``), ``InvertedResidual`` with a
    shortcut and ``CNBlock`` (``out + identity``), and an in-place ``nn.ReLU`` after a batch norm, as in VGG. Every
    other block, and any block that has hooks, a replaced ``forward`` or a compiled one, is called as it is.

    In training a MoD block behind such an ending writes into the ending's map, and its output is kept for the
    backward: writing into that output is refused there, where a ``nn.Sequential`` would allow it.

    Where ``owns_maps`` is set, in inference a MoD block writes into its input too, but for the stage's own and the
    output of a block with a forward hook. Right where no block keeps what it returns, and no module inside one has
    a hook that keeps it. Called by itself, outside the stage, a block writes as its own ``overwrite_input`` says.
    """

    owns_maps = False

    def forward(self, x: Tensor) -> Tensor:
        if exporting() or _has_any_global_hook() or isinstance(x, fx.Proxy):
            return super().forward(x)
        blocks, pooled, done, given = list(self), None, False, x
        for before, block, following in zip([None, *blocks], blocks, [*blocks[1:], None], strict=False):
            parts = parts_of(block, before) if _takes_pooled(following) else None
            if done:  # with the block before
                done = False
            elif parts is not None:
                x, pooled, done = _finish(parts(block, x), following)
            else:
                mine = x is not given and not before._forward_hooks
                x, pooled = self._called(block, x, pooled, mine), None
        return x

    def _called(self, block: nn.Module, x: Tensor, pooled: Tensor | None, mine: bool) -> Tensor:
        if mine and self.owns_maps and _takes_pooled(block):
            return block(x, pooled, True)
        return block(x) if pooled is None else block(x, pooled)

    def __getitem__(self, index: int | slice) -> nn.Module:
        found = super().__getitem__(index)
        if isinstance(index, slice):
            found.owns_maps = self.owns_maps
        return found


class PlainStage(MoDStage):
    """A :class:`MoDStage` whose MoD blocks pool for themselves."""

    def forward(self, x: Tensor) -> Tensor:
        given = x
        for before, block in zip([None, *self], self, strict=False):
            x = self._called(block, x, None, x is not given and not before._forward_hooks)
        return x


def _finish(ending: Ending, following: MoDBlock) -> tuple[Tensor, Tensor | None, bool]:
    """The block's output, the means of its planes for ``following``, False; or following's, None, True.

    None and False: ``following`` pools for itself. So where autocast left the two in different dtypes; and in
    training without a ReLU, where its backward is one pass over the map, to which the ending would add another.
    """
    out, identity, relu, _ = ending
    fits = identity is None or (identity.dtype == out.dtype and identity.shape == out.shape)
    if not fits or layout_of(out) == OTHER or (not relu and _autograd.needed(out, identity)):
        return ending.plainly(), None, False
    # Into out, as torchvision does.
    y = following.after_ending(out, identity, relu)
    if y is not None:
        return y, None, True
    return *functional.add_relu_pool_(out, identity, relu), False


def _takes_pooled(block: nn.Module | None) -> bool:
    return type(block) is MoDBlock and is_untouched(block)
