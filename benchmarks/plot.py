"""Plots made from result files alone: bars per block for N = 1, 8, 32, plain against compiled against ours.

    python -m benchmarks.plot [FILE.json ...] [--format png|svg]

Without a file: every result file in benchmarks/results/ that holds blocks. The picture lies beside its file.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import plot_networks
from benchmarks.pictures import sign_and_save
from mod_kernels._layout import NCHW
from mod_kernels.bench.providers import ENGINES, IN_PLACE
from mod_kernels.bench.store import Results, Row, load
from mod_kernels.bench.table import TRAIN, by_cell, geometric_mean, ratio
from mod_kernels.spec import CONV_KINDS

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "plain-clone": "#b5651d",
    "plain-cat": "#e0a96d",
    "plain-inplace": "#e0a96d",
    "compile": "#8a8a8a",
    "ours": "#1f6fb2",
    "floor": "#c9d6df",
}
INFERENCE = ("plain-clone", "plain-inplace", "compile", "ours", "floor")
TRAINING = ("plain-clone", "plain-cat", "ours", "floor")  # in place can't train
LABELS = {
    "plain-clone": "plain PyTorch, clone + add",
    "plain-cat": "plain PyTorch, cat",
    "plain-inplace": "plain PyTorch, in place",
    "compile": "torch.compile of the plain block",
    "ours": "mod_kernels, in place",
    "floor": "floor: x.mean and two linears alone",
}
LABELS_MEMORY = {"plain": "plain PyTorch", "fused": "mod_kernels"}
LABELS_TRAINING = LABELS | {"ours": "mod_kernels", "floor": "floor: dy + 1 into a fresh tensor"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot block benchmark results.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    arguments = parser.parse_args()
    for file in arguments.files or sorted(RESULTS.glob("*/*.json")):
        for picture in plot(file, arguments.format):
            print(picture)


def plot(file: Path, picture_format: str = "png") -> list[Path]:
    """One picture per thread count (CPU) or mode (GPU) in ``file`` of its blocks; one of each network's memory."""
    try:
        results = load(file)
    except ValueError:  # another kind of result file, which the folder may hold
        return []
    groups: dict[tuple, list[Row]] = {}
    for row in results.rows:
        if row.kind in CONV_KINDS:
            group = (row.device, row.dtype, row.layout, row.threads, row.mode, row.cache, row.kind)
            groups.setdefault(group, []).append(row)
    pictures = plot_networks.plot(results, file, picture_format)
    for cell in dict.fromkeys(key.rpartition(" ")[0] for key in results.memory):
        picture = file.with_name(f"{file.stem}-{cell.replace(' N=', '-n')}-memory.{picture_format}")
        _draw_memory(results, cell, picture)
        pictures.append(picture)
    for group, rows in groups.items():
        device, dtype, layout, threads, mode, cache, kind = group
        parts = [file.stem, kind]
        parts += [what for what in (dtype, layout) if what != NCHW and what not in file.stem]
        parts += ["train"] * (mode == TRAIN and "train" not in file.stem)
        parts.append(f"threads{threads}" if device == "cpu" else f"{mode}-{cache}")
        picture = file.with_name("-".join(parts) + f".{picture_format}")
        _draw(results, group, rows, picture)
        pictures.append(picture)
    return pictures


def _draw(results: Results, group: tuple, rows: list[Row], picture: Path) -> None:
    device, dtype, layout, threads, mode, cache, kind = group
    training = mode == TRAIN
    ours = ENGINES[device] + ("" if training else IN_PLACE)
    cells = by_cell(rows)
    batches = sorted({row.batch for row in rows})
    figure, axes = plt.subplots(1, len(batches), figsize=(4.6 * len(batches), 4.4), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        _bars(axis, [cell for cell in cells.values() if _any(cell).batch == batch], ours, training)
        axis.set_title(f"N = {batch}", fontsize=11)
    axes[0][0].set_ylabel("time per block, ms (log)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    mean = geometric_mean(ratio(cell, ["plain-clone"], ours) for cell in cells.values())
    how = {"eager": "one call after the other", "graph": "inside CUDA graphs", TRAIN: "training"}[mode]
    where = f"{threads} thread{'s' if threads != 1 else ''}" if device == "cpu" else f"{how}, L2 {cache}"
    speed = f"; ours {mean:.1f}x the plain clone form (geometric mean)" if mean else ""
    kind = f"{kind}, forward and backward" if training else kind
    title = f"MoD block ({kind}), {dtype}, {layout}, {where}{speed}"
    per_line = 42 * len(batches)  # characters at this size
    figure.suptitle("\n".join(textwrap.wrap(title, per_line)), fontsize=12)
    sign_and_save(figure, results, picture, 0.085, (0, 0.1, 1, 0.97))


def _draw_memory(results: Results, cell: str, picture: Path) -> None:
    """What a training step of one network holds over its time, plain against fused."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for provider, colour in {"plain": COLOURS["plain-clone"], "fused": COLOURS["ours"]}.items():
        points = results.memory.get(f"{cell} {provider}", [])
        peak = max((held for _, held in points), default=0.0)
        label = f"{LABELS_MEMORY[provider]}, peak {peak:.0f} MiB"
        axis.step(*zip(*points, strict=True), where="post", color=colour, label=label)
    axis.set_xlabel("share of the step's time: forward, then backward")
    axis.set_ylabel("MiB beyond the weights")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, loc="lower center", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e5e5e5")
    axis.set_title(f"{cell}: memory over a training step", fontsize=11)
    sign_and_save(figure, results, picture, 0.02, (0, 0.05, 1, 1))


def _bars(axis, cells: list[dict[str, Row]], ours: str, training: bool) -> None:
    """Groups of bars, one group per shape; a provider without a time leaves its place empty."""
    names, labels = (TRAINING, LABELS_TRAINING) if training else (INFERENCE, LABELS)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        colour = COLOURS[name]
        provider = ours if name == "ours" else name
        times = [cell[provider].median_ms if provider in cell else None for cell in cells]
        at = [index - 0.4 + (place + 0.5) * width for index in range(len(cells))]
        known = [(x, time) for x, time in zip(at, times, strict=True) if time is not None]
        axis.bar([x for x, _ in known], [time for _, time in known], width, color=colour, label=labels[name])
        if name in ("plain-clone", "ours"):
            for x, time in known:
                axis.text(x, time * 1.04, _figures(time), ha="center", va="bottom", fontsize=7)
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axis.margins(y=0.1)
    axis.set_xticks(range(len(cells)), [_any(cell).name for cell in cells], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", which="major", color="#e5e5e5")
    axis.set_axisbelow(True)


def _figures(time: float) -> str:
    """Two figures, and never an exponent."""
    return f"{time:.0f}" if time >= 10 else f"{time:.2g}"


def _any(cell: dict[str, Row]) -> Row:
    return next(iter(cell.values()))


if __name__ == "__main__":
    main()
