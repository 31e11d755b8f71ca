"""The verbs that measure: ``mod-kernels bench | table | sweep``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ._layout import NCHW
from ._terminal import (
    DTYPES,
    INTERRUPTED,
    JsonPath,
    TimeLeft,
    check_device,
    command_line,
    make_console,
    make_progress,
    one_of,
    refuse,
)

Resume = Annotated[bool, typer.Option("--resume", help="go on with the interrupted run that --json has")]


def bench(
    suite: Annotated[str | None, typer.Argument(help="default block; all: one after another")] = None,
    networks: Annotated[bool, typer.Option("--networks", help="the suite network")] = False,
    train: Annotated[bool, typer.Option("--train", help="block-train; with --networks network-train")] = False,
    network: Annotated[list[str] | None, typer.Option(help="suites network and network-train; repeatable")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="block: the bottlenecks, within two minutes")] = False,
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
    json_path: JsonPath = None,
    resume: Resume = False,
) -> None:
    """Measure plain PyTorch, torch.compile and this package side by side. Ctrl-C keeps what was measured.

    Suites: block, block-train, network, network-train, ops, scaling, overhead, memory, cold-start, all.
    """
    from .bench import suites
    from .bench.shapes import FORMATS, SHAPES

    check_device(device)
    if (networks or train) and suite is not None:
        refuse("--networks and --train name a suite themselves: leave them out, or the suite")
    name = suite or {0: "block", 1: "network", 2: "block-train", 3: "network-train"}[networks + 2 * train]
    one_of("suite", name, (*suites.SUITES, "all"))
    _, counts = _counts(batch, threads)
    given = {"network": network, "quick": quick, "kind": kind, "layout": layout, "batch": batch}
    given |= {"max-autotune": max_autotune, "threads": threads, "dtype": dtype}
    if name == "all":
        taken = {"threads", "quick"}
    else:
        taken = suites.SUITES[name].options
        if device == "cuda" and not suites.SUITES[name].on_gpu:
            refuse(f"suite {name} is cpu only: leave out --device cuda")
    for option, value in given.items():
        if value and option not in taken:
            refuse(f"--{option} does not go with suite {name}")
    if kind is not None:
        one_of("kind", kind, SHAPES)
    one_of("layout", layout or NCHW, FORMATS)
    if network:
        from . import models

        for one in network:
            one_of("network", one, models.list_models())
    names = suites.ALL if name == "all" else (name,)
    names = tuple(one for one in names if device == "cpu" or suites.SUITES[one].on_gpu)
    statuses = []
    for one in names:
        chosen = suites.SUITES[one]
        # On a GPU float64 has no kernels.
        dtypes = ("float32", "float16") if device == "cuda" else chosen.cpu_dtypes
        default = "float16" if device == "cuda" else "float32"
        request = suites.Request(
            counts,
            device,
            DTYPES[one_of("dtype", dtype or default, dtypes)],
            tuple(batch) if batch else None,
            kind,
            layout,
            tuple(network) if network else None,
            quick,
            max_autotune,
        )
        measure = functools.partial(chosen.run, request)
        statuses.append(_measured(one, measure, chosen.show, json_path, resume, skip_complete=name == "all"))
        if statuses[-1] == INTERRUPTED:
            break
    _exit(max(statuses))


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
    json_path: JsonPath = None,
    resume: Resume = False,
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

    _exit(_measured("table", measure, table_paper.show, json_path, resume))


def sweep_command(
    network: Annotated[str, typer.Option(help="which MoD network")] = "resnet50_mod",
    c: Annotated[list[int] | None, typer.Option("--c", help="k = C // c; repeatable; default 2 to 64")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable; default 1")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeatable; default 1 and all")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: JsonPath = None,
    resume: Resume = False,
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

    _exit(_measured("sweep", measure, table_paper.show, json_path, resume))


def _exit(status: int) -> None:
    if status:
        raise typer.Exit(status)


def _counts(batch: list[int] | None, threads: list[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes and numbers of threads, each at least 1."""
    counts = tuple(threads or dict.fromkeys((1, torch.get_num_threads())))
    for name, values in (("threads", counts), ("batch", batch or ())):
        if min(values, default=1) < 1:
            refuse(f"{name} must be at least 1, got {min(values)}")
    return tuple(batch or (1,)), counts


def _measured(
    suite: str,
    measure: Callable[[Any, Any], None],
    show: Callable[[Any, Any], None],
    json_path: Path | None,
    resume: bool,
    skip_complete: bool = False,
) -> int:
    """Run ``measure(results, on_cell)``, keeping each cell as it is done, and show what it left; the exit status.

    ``skip_complete``: with ``resume``, a suite whose last run is complete is not an error.
    """
    from .bench import allocator, machine, recording, store

    allocator.keep_freed_memory()
    here = machine.describe()
    command = command_line(json_path)
    results, path = store.Results(here, command, suite=suite), None
    if json_path is not None:
        path = recording.file_of(json_path, suite, here)
    if resume:
        if path is None:
            refuse("--resume goes with --json, which says what to go on with")
        if path.exists() or not skip_complete:
            try:
                found = recording.interrupted_run(path, suite, command, here)
            except (ValueError, OSError) as error:
                refuse(str(error))
            if found is None and skip_complete:
                return 0
            if found is None:
                refuse(f"the last run of {suite} in {path} is complete: nothing to resume")
            results = found
    try:
        journal = store.Journal(path, results, resumed=bool(results.finished)) if path is not None else None
    except OSError as error:
        refuse(f"can't write {path}: {error.strerror}")
    console = make_console()
    with make_progress() as progress:
        task = progress.add_task("", total=None)
        left = TimeLeft()

        def on_cell(label: str, number: int, total: int) -> None:
            if journal is not None:
                journal.write()
            progress.update(task, description=f"{suite}: {label}", completed=number, total=total)
            if not progress.console.is_terminal:
                print(f"[{number + 1}/{total}] {label}{left(number, total)}", file=sys.stderr, flush=True)

        try:
            measure(results, on_cell)
        except KeyboardInterrupt:
            results.interrupted = True
        finally:
            if journal is not None:
                journal.close()
    show(results, console)
    if results.interrupted:
        return INTERRUPTED
    return int(any(row.check.startswith("wrong") for row in results.rows))
