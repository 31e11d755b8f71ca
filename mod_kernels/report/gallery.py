"""Which pictures there are of what was measured, and what their files are called."""

from __future__ import annotations

from dataclasses import replace

from .._layout import NCHW
from ..bench.blocks import WARM
from ..bench.store import PAPER, SWEEP, SWEEP_BLOCK
from ..bench.table import TRAIN
from ..spec import CONV_KINDS
from . import bars, heatmap, memory, paper, scaling, sweep, timeline
from .collect import Group, Machine, group_key
from .picture import Picture


def has_bars(group: Group) -> bool:
    """Whether its picture is the times of blocks, which there are most of."""
    return group.first.kind in CONV_KINDS and group.suite not in ("scaling", "memory")


def of_group(machine: Machine, group: Group, stem: str | None = None) -> list[Picture]:
    """All but the heat map; ``stem``, the suite's name by default, begins their names."""
    stem, kind = stem or group.suite, group.first.kind
    if kind == PAPER:
        return [replace(one, name=f"{stem}-{one.name}") for one in paper.pictures(group)]
    if kind == SWEEP:
        same = group_key(group.first)[:-1]
        others = machine.suites.get(group.suite, ())
        blocks = [one for one in others if group_key(one.first) == (*same, SWEEP_BLOCK)]
        return [replace(one, name=f"{stem}-{one.name}") for one in sweep.pictures(group, blocks)]
    if kind == timeline.KIND:
        found = timeline.pictures(group)
    elif group.suite == "scaling":
        found = scaling.pictures(group)
    else:
        drawn = memory.picture(group) if group.suite == "memory" else bars.picture(group)
        found = [drawn] if drawn else []
    return [replace(one, name=_name(stem, group)) for one in found]


def of_memory(machine: Machine, suite: str, stem: str | None = None) -> list[Picture]:
    return [replace(one, name=f"{stem or suite}-{one.name}") for one in memory.steps(machine, suite)]


def heat(group: Group) -> Picture | None:
    picture = heatmap.picture(group)
    return picture and replace(picture, name=f"{_name(group.suite, group)}-heat")


def _name(stem: str, group: Group) -> str:
    """``"block-bottleneck-float32-threads1"``; the layout where it is not NCHW, the cache where it is cold."""
    row = group.first
    parts = [stem, row.kind, row.dtype]
    parts += [row.layout] * (row.layout != NCHW)
    parts += [TRAIN] * (row.mode == TRAIN and TRAIN not in stem)
    if row.threads:
        parts += [f"threads{row.threads}"] + [row.cache] * (row.cache != WARM)
    else:
        parts.append(f"{row.mode}-{row.cache}")
    return "-".join(parts).replace(" ", "-").replace("/", "-")
