"""The verbs that measure: ``mod-kernels bench | table | sweep``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ._layout import NCHW
from ._terminal import (
    DTYPES,
    INTERRUPTED,
    check_device,
    command_line,
    make_console,
    make_progress,
    one_of,
    refuse,
)


def bench(
    networks: Annotated[bool, typer.Option("--networks", help="whole networks instead of blocks")] = False,
    train: Annotated[bool, typer.Option("--train", help="forward and backward instead of inference; cpu")] = False,
    network: Annotated[list[str] | None, typer.Option(help="which, with --networks; repeatable")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="the bottleneck blocks, within two minutes")] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            help="bottleneck, basic, inverted_residual, conv, convnext; default the first two (--quick: the first)"
        ),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="of x: nchw, the default, or channels_last")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable")] = None,
    max_autotune: Annotated[
        bool, typer.Option("--max-autotune", help="torch.compile in that mode as well; slow to compile")
    ] = False,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeatable; default 1 and all")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="default float32 on cpu, float16 on cuda")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Measure plain PyTorch, torch.compile and this package side by side. Ctrl-C keeps what was measured."""
    from .bench import blocks, network_training, table, training
    from .bench import networks as whole
    from .bench.shapes import FORMATS, SHAPES

    check_device(device)
    blocks_only = (("--quick", quick), ("--kind", kind), ("--layout", layout), ("--max-autotune", max_autotune))
    for option, given in blocks_only:
        if given and networks:
            refuse(f"{option} is blocks only: leave out --networks or {option}")
    if network and not networks:
        refuse("--network goes with --networks")
    for option, given in (
        ("--quick", quick),
        ("--max-autotune", max_autotune),
        ("--device cuda", device == "cuda"),
    ):
        if given and train:
            refuse(f"{option} is inference only: leave out --train or {option}")
    # On a GPU float64 has no kernels. Whole networks on a CPU: in bfloat16 plain code selects so differently that
    # its output is as far off as with no MoD block at all, in float16 its convolutions take ten times as long.
    dtypes, default = (("float32", "float16"), "float16") if device == "cuda" else (tuple(DTYPES), "float32")
    if networks and device == "cpu":
        dtypes = ("float32",)
    chosen = DTYPES[one_of("dtype", dtype or default, dtypes)]
    kinds = ("bottleneck",) if quick else ("bottleneck", "basic")
    if kind is not None:
        kinds = (one_of("kind", kind, SHAPES),)
    one_of("layout", layout or NCHW, FORMATS)
    _, counts = _counts(batch, threads)
    if networks:
        from . import models

        for name in network or ():
            one_of("network", name, models.list_models())

    def measure(results: Any, on_cell: Any) -> None:
        if networks and train:
            names = tuple(network or network_training.NETWORKS)
            batches = tuple(batch or network_training.BATCHES)
            network_training.run(names, batches, counts, results, on_cell, chosen)
            return
        if networks:
            names = tuple(network or whole.NETWORKS)
            whole.run(names, tuple(batch or (1,)), counts, results, on_cell, device, chosen)
            return
        plan = blocks.Plan(
            tuple(shape for name in kinds for shape in SHAPES[name]),
            tuple(batch or (training if train else blocks).BATCHES),
            counts,
            device,
            chosen,
            layout or NCHW,
            max_autotune=max_autotune,
        )
        if train:
            training.run(plan, results, on_cell)
        else:
            blocks.run(blocks.quick(plan) if quick else plan, results, on_cell)

    _measured(measure, table.show, json_path)


def table_command(
    networks: Annotated[
        list[str] | None, typer.Option(help="MoD networks of the paper; repeatable; default all")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable; default 1")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeatable; default 1 and all")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[
        bool, typer.Option("--peers", help="onnxruntime and OpenVINO on the plain network as well; cpu")
    ] = False,
    rounds: Annotated[int, typer.Option(help="of measuring, at most")] = 100,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """The paper's table here: every MoD network against its dense peer. Ctrl-C keeps what was measured."""
    from .bench import paper, paper_table, table_paper

    check_device(device)
    if peers and device == "cuda":
        refuse("--peers is cpu only: leave out --peers or --device cuda")
    names = tuple(one_of("networks", name, paper.MOD) for name in networks or paper.MOD)
    batches, counts = _counts(batch, threads)
    if rounds < 5:
        refuse(f"rounds must be at least 5, got {rounds}")

    def measure(results: Any, on_cell: Any) -> None:
        paper_table.run(names, batches, counts, results, on_cell, device, peers, rounds)

    _measured(measure, table_paper.show, json_path)


def sweep_command(
    network: Annotated[str, typer.Option(help="which MoD network")] = "resnet50_mod",
    c: Annotated[list[int] | None, typer.Option("--c", help="k = C // c; repeatable; default 2 to 64")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable; default 1")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeatable; default 1 and all")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """What a network and its MoD blocks cost at each c, to choose k by. Ctrl-C keeps what was measured."""
    from . import models
    from .bench import sweep, table_paper

    check_device(device)
    one_of("network", network, models.list_models())
    cs = tuple(c or sweep.CS)
    if min(cs) < 1:
        refuse(f"c must be at least 1, got {min(cs)}")
    batches, counts = _counts(batch, threads)

    def measure(results: Any, on_cell: Any) -> None:
        sweep.run(network, cs, batches, counts, results, on_cell, device)

    _measured(measure, table_paper.show, json_path)


def _counts(batch: list[int] | None, threads: list[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes and numbers of threads, each at least 1."""
    counts = tuple(threads or dict.fromkeys((1, torch.get_num_threads())))
    for name, values in (("threads", counts), ("batch", batch or ())):
        if min(values, default=1) < 1:
            refuse(f"{name} must be at least 1, got {min(values)}")
    return tuple(batch or (1,)), counts


def _measured(measure: Any, show: Any, json_path: Path | None) -> None:
    """Run ``measure(results, on_cell)``; ``show(results, console)`` and write what it left, also after Ctrl-C."""
    from .bench import machine, store

    results = store.Results(machine.describe(), command_line(json_path))
    console = make_console()
    with make_progress() as progress:
        task = progress.add_task("", total=None)

        def on_cell(label: object, number: int, total: int) -> None:
            progress.update(task, description=str(label), completed=number, total=total)
            if not progress.console.is_terminal:
                print(f"[{number + 1}/{total}] {label}", file=sys.stderr, flush=True)

        try:
            measure(results, on_cell)
        except KeyboardInterrupt:
            results.interrupted = True
    show(results, console)
    if json_path is not None:
        store.save(results, json_path)
    if results.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.check.startswith("wrong") for row in results.rows):
        raise typer.Exit(1)
