"""The stages of a network: runs of equal-shaped blocks in a row of modules that are called one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from . import _hosts
from .nn import MoDStage


class Unit(NamedTuple):
    """One block: the ``width`` modules of its row from ``place`` on.

    ``kind``: what it is, in words. ``why_not``: why it can't be narrowed, if it keeps its channels. ``like``: a
    tensor of the dtype and on the device that a replacement has to have.
    """

    place: int
    width: int
    kind: str
    channels_in: int
    channels_out: int
    stride: int
    padded: bool  # so that nothing but a stride changes the size of a map
    training: bool
    like: Tensor
    why_not: Callable[[], str]
    narrow: Callable[[int], nn.Module] | None

    def keeps_shape(self) -> bool:
        return self.channels_in == self.channels_out and self.stride == 1 and self.padded


def is_row(module: nn.Module) -> bool:
    """Whether it is a Sequential that just calls its modules one after another."""
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return False
    return type(module) is MoDStage or type(module).forward is nn.Sequential.forward


def stages_of(row: nn.Module, named: bool) -> list[list[Unit]]:
    """The runs of blocks in ``row``, single ones too.

    A run goes on as long as blocks of one kind follow each other that keep the shape of what came before: it
    begins with the block that strides or widens. ``named``: by the user, so that blocks of any class are
    read, and rows of convolution, norm and ReLU that are not a VGG's.
    """
    runs: list[list[Unit]] = []
    for unit in _units(row, named):
        before = runs[-1][-1] if runs else None
        if (
            before is not None
            and unit.place == before.place + before.width
            and unit.kind == before.kind
            and unit.keeps_shape()
            and unit.channels_in == before.channels_out
        ):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _units(row: nn.Module, named: bool) -> list[Unit]:
    children = list(row)  # not children(), which leaves out a module that comes a second time
    vgg = _is_vgg(children)
    units = []
    for place, child in enumerate(children):
        host = _hosts.host_of(child)
        if host is not None or (named and not isinstance(child, nn.Conv2d)):
            unit = _block(place, child, host)
        elif vgg or named:
            unit = _conv_norm_relu(place, children[place : place + 3])
        else:
            unit = None
        if unit is not None:
            units.append(unit)
    return units


def _is_vgg(children: list[nn.Module]) -> bool:
    """Convolutions, norms, ReLUs and at least one pooling, nothing else; a stem or a head of convolutions alone is
    none.
    """
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.MaxPool2d)
    return all(isinstance(child, kinds) for child in children) and any(
        isinstance(child, nn.MaxPool2d) for child in children
    )


def _block(place: int, block: nn.Module, host: _hosts.Host | None) -> Unit | None:
    convs = _hosts.convolutions(block)
    if not convs:
        return None
    channels = convs[0].in_channels
    if host is None:
        name = type(block).__name__
        why_not, narrow = (lambda: f"{name} is not a class that convert knows: give conv_block"), None
    else:
        why_not, narrow = partial(host.why_not, block, channels), partial(host.narrow, block)
    stride = max(max(conv.stride) for conv in convs)
    first, last = convs[0], convs[-1]
    return Unit(
        place,
        1,
        type(block).__name__,
        channels,
        last.out_channels,
        stride,
        host is None or all(map(_is_padded, convs)),  # one of the user's may pad by another module
        block.training,
        first.weight,
        why_not,
        narrow,
    )


def _conv_norm_relu(place: int, three: list[nn.Module]) -> Unit | None:
    if len(three) < 3:
        return None
    conv, norm, relu = three
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, norms) and isinstance(relu, nn.ReLU)):
        return None
    return Unit(
        place,
        3,
        "convolution with norm and ReLU",
        conv.in_channels,
        conv.out_channels,
        max(conv.stride),
        _is_padded(conv),
        norm.training,
        conv.weight,
        partial(_hosts.why_not_conv, conv, norm, relu, conv.out_channels),
        partial(_hosts.narrow_conv, conv, norm),
    )


def _is_padded(conv: nn.Conv2d) -> bool:
    """Whether zeros, or whatever its padding is, make up for its kernel's size."""
    if isinstance(conv.padding, str):
        return conv.padding == "same"
    reach = zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    return all(2 * padding == dilation * (size - 1) for padding, dilation, size in reach)
