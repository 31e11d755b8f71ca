"""A dense network as a Mixture-of-Depths network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from . import _checks, _hosts
from ._stages import Unit, is_row, stages_of
from .nn import MoDBlock, MoDStage

Stages = Iterable[str] | Mapping[str, Iterable[int]]


class _Stage(NamedTuple):
    """A run of blocks in ``row``, and those of them to be replaced."""

    name: str
    row: nn.Module
    replaced: list[Unit]


def convert(
    model: nn.Module,
    c: int = 64,
    position: str = "first",
    stages: Stages | None = None,
    conv_block: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Change a dense ``model`` in place into a Mixture-of-Depths network (arXiv 2409.17016), and return it.

    In each stage every block with an odd index (from 0) becomes a :class:`mod_kernels.nn.MoDBlock` with
    k = max(1, C // c) around the narrowed block of its architecture. The MoD blocks start fresh, as the host's
    library initialises its own, on the device and in the dtype and mode of what they replace; they require
    gradients whatever was frozen. All other modules stay the objects they are, with their weights and
    ``state_dict`` keys; in VGG's flat ``features``, where one MoD block stands for convolution, norm and ReLU, the
    later indices move up, but in timm's, which finds its maps by index: there an Identity keeps each place left
    over. Make the optimizer afterwards.

    Known are ResNet (BasicBlock, Bottleneck), MobileNetV2, VGG with batch norm and ConvNeXt, torchvision's and
    timm's, alone or as the backbone of another network. A stage is a run of blocks of one class in an
    ``nn.Sequential``, from one that strides or changes the number of channels to the next such. Stages that can't
    be converted, those of a single block among them, are left alone, with one warning that says why. Each
    Sequential changed becomes a :class:`mod_kernels.nn.MoDStage`.

    The narrowed block keeps its host's class and settings of norm. It has no stochastic depth, DropBlock or
    dropout (the standard blocks keep theirs), and it is not dilated where the host is, as in FCN: the paper does
    not say; the standard blocks keep the stage's receptive field, and so it can be fused.

    When a MoDStage of known blocks runs, its MoD blocks write into their inputs in inference, which nothing else
    in the row reads, unless the block before has a forward hook; ``owns_maps = False`` of the stage forbids it,
    for a hook further inside that keeps a map. Called one by one, as torchvision's FPN does with MobileNetV2's
    row, they don't write; nor do those around a ``conv_block`` given, unless by ``accelerate(model,
    overwrite_input=True)``.

    Args:
        model: the network.
        c: the paper has 64 for ResNet and VGG, 16 for MobileNetV2. A ConvNeXt wants k of at least 2 everywhere
            (:class:`mod_kernels.nn.NarrowConvNeXt`).
        position: where MoD blocks add their result: ``"first"`` k channels, ``"last"`` k, or ``"original"``.
        stages: what to convert, instead of every stage that is found: names of ``nn.Sequential`` or
            ``nn.ModuleList`` modules, of which the odd-indexed blocks of each stage are replaced; or a mapping
            from such names to the indices to be replaced, of blocks that keep their shape. A ModuleList's are
            taken to be called one after another.
        conv_block: makes the conv block from k instead of the host's narrowed one, ``(N, k, H, W)`` to the same;
            with it and ``stages``, blocks of any class are replaced. Their C is that of their first convolution,
            which has to be that of their last.

    Raises:
        TypeError: an argument of another type, or a scripted module.
        ValueError: c below 1, an unknown position, no block that can be replaced, a stage named that can't be
            converted, or a model that is quantized or prepared for it, or wrapped in DistributedDataParallel. The
            model is then as it was.
    """
    _check(model, c, position, conv_block)
    left_alone: list[str] = []
    if stages is None:
        chosen = _found(model, conv_block, left_alone)
    elif isinstance(stages, str) or not isinstance(stages, Iterable):
        raise TypeError(f"stages must be names of modules or a mapping from them to indices, got {stages!r}")
    else:
        chosen = _named(model, stages, conv_block)
        if not chosen:
            raise ValueError("stages must name at least one block, got none")
    if not chosen:
        raise ValueError(_nothing_found(model, left_alone))
    # All is built and said first: the swap can't fail.
    chosen = _by_place(chosen)
    blocks = [[_mod_block(unit, c, position, conv_block) for unit in stage.replaced] for stage in chosen]
    if left_alone:
        warnings.warn(
            f"convert left {len(left_alone)} of {len(left_alone) + len(chosen)} stages alone:\n  "
            + "\n  ".join(left_alone),
            stacklevel=2,
        )
    by_index = any(hasattr(module, "feature_info") for module in model.modules())
    for stage, made in zip(chosen, blocks, strict=True):
        for unit, block in zip(reversed(stage.replaced), reversed(made), strict=True):  # later places stay valid
            _swap(stage.row, unit, block, by_index)
        _become_stage(stage.row, known=conv_block is None and not isinstance(stages, Mapping))
    return model


def _check(model: nn.Module, c: int, position: str, conv_block: Callable | None) -> None:
    _checks.ordinary_module(model, "convert")
    if not isinstance(c, int) or isinstance(c, bool):
        raise TypeError(f"c must be an int, got {type(c).__name__}")
    if c < 1:
        raise ValueError(f"c must be at least 1, got {c}")
    _checks.where(position)
    if conv_block is not None and (isinstance(conv_block, nn.Module) or not callable(conv_block)):
        raise TypeError(
            f"conv_block must be a function that makes a module from k, got {type(conv_block).__name__}"
        )
    for name, module in model.named_modules():
        found = f"{name or 'the model'} is a {type(module).__module__}.{type(module).__name__}"
        if isinstance(module, nn.parallel.DistributedDataParallel):
            # It would not reduce the gradients of parameters that it has not seen.
            raise ValueError(f"model must not be wrapped for training in parallel yet, {found}: convert first")


def _found(model: nn.Module, conv_block: Callable | None, left_alone: list[str]) -> list[_Stage]:
    """The stages of a model, where nothing was said about them; why others are left alone is added to the list."""
    chosen = []
    for name, row in model.named_modules():
        if not is_row(row):
            continue
        runs = stages_of(row, named=False)
        for run in runs:
            reason = _why_not(run, conv_block)
            if reason:
                left_alone.append(f"{_label(name, row, run)}: {reason}")
            else:
                chosen.append(_Stage(name, row, run[1::2]))
    return chosen


def _named(model: nn.Module, stages: Stages, conv_block: Callable | None) -> list[_Stage]:
    modules = dict(model.named_modules())
    chosen, seen = [], set()
    for name in stages:
        if name not in modules:
            raise ValueError(f"stages names {name!r}, which is no module of {type(model).__name__}")
        row = modules[name]
        if not isinstance(row, (nn.Sequential, nn.ModuleList)):
            raise ValueError(
                f"stages must name nn.Sequential or nn.ModuleList modules, {name!r} is a {type(row).__name__}"
            )
        if row in seen:
            raise ValueError(f"stages names {name!r} twice")
        seen.add(row)
        runs = stages_of(row, named=True)
        if isinstance(stages, Mapping):
            units = _at(name, row, runs, stages[name], conv_block)
            if units:
                chosen.append(_Stage(name, row, units))
            continue
        before = len(chosen)
        reasons = []
        for run in runs:
            reason = _why_not(run, conv_block)
            if not reason:
                chosen.append(_Stage(name, row, run[1::2]))
            else:
                reasons.append(f"{_label(name, row, run)}: {reason}")
        if len(chosen) == before:
            raise ValueError(
                f"stages names {name!r}, of which no block can be replaced: "
                + ("; ".join(reasons) or "it holds no block of convolutions")
            )
    return chosen


def _at(
    name: str, row: nn.Module, runs: list[list[Unit]], indices: Iterable[int], conv_block: Callable | None
) -> list[Unit]:
    """The blocks of a row at the indices that the caller wants replaced."""
    units = {unit.place: unit for run in runs for unit in run}
    wanted = list(indices)
    for i in wanted:
        if not isinstance(i, int) or isinstance(i, bool):
            raise TypeError(f"stages[{name!r}] must hold ints, got {i!r}")
        if i not in units:
            found = f"a {type(row[i]).__name__}" if i in range(len(row)) else f"not one of its {len(row)} modules"
            raise ValueError(f"stages[{name!r}] must hold indices of blocks, got {i}, {found}")
        if reason := _why_not_unit(units[i], conv_block):
            raise ValueError(f"stages[{name!r}]: block {i} can't be replaced: {reason}")
    return [units[i] for i in sorted(set(wanted))]


def _why_not(run: list[Unit], conv_block: Callable | None) -> str:
    """Why no block of a stage can be replaced."""
    if len(run) < 2:
        unit = run[0]
        shape = f"{unit.channels_in} to {unit.channels_out} channels, stride {unit.stride}"
        return f"a single {unit.kind} of its shape ({shape}), and the first of a stage stays"
    return next(filter(None, (_why_not_unit(unit, conv_block) for unit in run[1::2])), "")


def _why_not_unit(unit: Unit, conv_block: Callable | None) -> str:
    if not unit.padded:
        return "it does not keep its shape, for want of padding"
    if not unit.keeps_shape():
        return (
            f"it does not keep its shape, it goes from {unit.channels_in} to {unit.channels_out} channels "
            f"with stride {unit.stride}"
        )
    return "" if conv_block is not None else unit.why_not()


def _is_whole(row: nn.Module, run: list[Unit]) -> bool:
    """Whether the stage is all that the Sequential holds."""
    return is_row(row) and sum(unit.width for unit in run) == len(row)


def _label(name: str, row: nn.Module, run: list[Unit]) -> str:
    name = name or "the model"
    first, last = run[0], run[-1]
    return name if _is_whole(row, run) else f"{name}[{first.place}:{last.place + last.width}]"


def _by_place(chosen: list[_Stage]) -> list[_Stage]:
    """The last places of each row first, so that a swap moves none that is still to come."""
    return sorted(chosen, key=lambda stage: -stage.replaced[0].place)


def _nothing_found(model: nn.Module, left_alone: list[str]) -> str:
    what = f"model must have a stage with a block that can be replaced, {type(model).__name__} has none"
    if left_alone:
        return f"{what}:\n  " + "\n  ".join(left_alone)
    rows = []
    for name, row in model.named_modules():
        if isinstance(row, (nn.Sequential, nn.ModuleList)):
            kinds = [
                type(child).__name__
                for child in row
                if _hosts.convolutions(child) and not isinstance(child, (nn.Conv2d, nn.Sequential))
            ]
            if len(kinds) > 1:
                rows.append(f"{name or 'the model'} ({', '.join(sorted(set(kinds)))})")
    found = f"It has rows of blocks: {', '.join(rows)}. " if rows else ""
    return (
        f"{what} of the classes known ({', '.join(_hosts.KNOWN)}; VGG with batch norm). {found}For others name "
        "stages and give conv_block"
    )


def _mod_block(unit: Unit, c: int, position: str, conv_block: Callable[[int], nn.Module] | None) -> MoDBlock:
    channels = unit.channels_in
    k = max(1, channels // c)
    narrow = unit.narrow(k) if conv_block is None else conv_block(k)
    if not isinstance(narrow, nn.Module):
        raise TypeError(f"conv_block must make a module from k, got {type(narrow).__name__}")
    block = MoDBlock(channels, narrow, k, position=position)
    return block.to(unit.like.device, unit.like.dtype).train(unit.training)


def _swap(row: nn.Module, unit: Unit, block: MoDBlock, keep_places: bool) -> None:
    """Put ``block`` where ``unit`` is, and Identities after it where the places of what follows are to be kept."""
    children = list(row._modules.items())
    names = [name for name, _ in children[unit.place : unit.place + unit.width]]
    blocks = [block, *(nn.Identity() for _ in names[1:] if keep_places)]
    children[unit.place : unit.place + unit.width] = zip(names, blocks, strict=False)
    if len(children) < len(row._modules) and all(key.isdecimal() for key, _ in children):
        children = [(str(i), child) for i, (_, child) in enumerate(children)]
    row._modules.clear()
    row._modules.update(children)


def _become_stage(row: nn.Module, known: bool) -> None:
    """Make a plain Sequential a MoDStage. It stays the object it is, with its hooks, wherever it is held.

    ``known``: of what stands between its MoD blocks none keeps the map it returns.
    """
    if type(row) is nn.Sequential:
        row.__class__ = MoDStage
        row.owns_maps = known
    elif type(row) is MoDStage:
        row.owns_maps = row.owns_maps and known
