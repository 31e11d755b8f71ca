"""``mod-kernels profile``: where the time of a network goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ._terminal import (
    DTYPES,
    INTERRUPTED,
    JsonPath,
    check_device,
    command_line,
    make_console,
    make_progress,
    one_of,
    refuse,
)


def profile(
    model: Annotated[str, typer.Argument(help="a network of mod_kernels.models")],
    batch: Annotated[int, typer.Option(help="batch size")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default 1")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32; on cuda float16 too")] = "float32",
    form: Annotated[str, typer.Option(help="how the plain block ends: clone, cat or inplace")] = "clone",
    repeats: Annotated[int, typer.Option(help="forwards that are profiled")] = 20,
    trace: Annotated[
        Path | None, typer.Option(help="write a Chrome trace of a forward of each to this file")
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Where a network's time goes, part by part, plain and fused, by torch.profiler."""
    from . import models

    one_of("model", model, models.list_models())
    check_device(device)
    one_of("dtype", dtype, ("float32", "float16") if device == "cuda" else ("float32",))  # as bench --networks
    from .bench import allocator, machine, profile_table, recording, store
    from .bench import profile as profiling

    one_of("form", form, profiling.FORMS)
    if threads is not None and device == "cuda":
        refuse("--threads is cpu only: leave out --threads or --device cuda")
    threads = None if device == "cuda" else 1 if threads is None else threads
    for name, value in (("batch", batch), ("threads", threads), ("repeats", repeats)):
        if value is not None and value < 1:
            refuse(f"{name} must be at least 1, got {value}")
    # Otherwise the profiler's library writes of each of its starts and ends to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    allocator.keep_freed_memory()
    here = machine.describe()
    results = store.Results(here, command_line(json_path), suite=profiling.SUITE)
    try:
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            trace.open("a").close()
        path = None if json_path is None else recording.file_of(json_path, profiling.SUITE, here)
        journal = None if path is None else store.Journal(path, results)
    except OSError as error:
        refuse(f"what is measured can't be kept: {error}")
    cell = profiling.Cell(model, batch, threads, device, DTYPES[dtype], form)
    with make_progress() as progress:
        task = progress.add_task("", total=None)

        def on_cell(label: str, number: int, total: int) -> None:
            progress.update(task, description=label)

        try:
            profiling.run(cell, results, on_cell, repeats, trace)
        except KeyboardInterrupt:
            results.interrupted = True
    profile_table.show(results, make_console())
    if journal is not None:
        journal.close()
    if results.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.check != "ok" for row in results.rows):
        raise typer.Exit(1)
