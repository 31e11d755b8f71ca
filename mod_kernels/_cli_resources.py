"""The verb that compiles the GPU kernels: ``mod-kernels resources``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._terminal import INTERRUPTED, command_line, make_console, make_progress, one_of, refuse, said

ENGINES = ("triton", "cuda")


def resources(
    engine: Annotated[list[str] | None, typer.Option(help="triton or cuda; repeatable; default both")] = None,
    capability: Annotated[list[int] | None, typer.Option(help="90 for 9.0; repeatable; default all")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="256x56x56 and so on; repeatable; default all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="of x; repeatable; default all")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="keep every row in this file of JSON lines, begun anew")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="add to the file that --json has; what is in it is not compiled again")
    ] = False,
) -> None:
    """Compile every GPU kernel, no GPU needed: registers, spills, occupancy, widths of loads.

    Triton's for the paper's shapes, as --shape and --dtype choose; the CUDA engine's as its library has them, in a
    checkout with nvcc. Exit status 1 on a spill, on local memory, on loads of a map narrower than need be, and
    if something does not compile. Ctrl-C keeps what was compiled.
    """
    from . import _resources_file, _resources_table
    from .backends import cuda_resources, triton
    from .backends.triton import compile as ahead_of_time
    from .backends.triton import configs, enumeration
    from .backends.triton import resources as measured
    from .bench import machine

    shapes = dict.fromkeys(map(measured.shape_name, enumeration.PAPER_SHAPES))  # some are of two networks
    known = [str(one) for one in ahead_of_time.CAPABILITIES]
    engines = [one_of("engine", one, ENGINES) for one in engine or ENGINES]
    for one in capability or ():
        one_of("capability", str(one), known)
    names = {one_of("shape", name, shapes) for name in shape or shapes}
    chosen = [one for one in enumeration.PAPER_SHAPES if measured.shape_name(one) in names]
    dtypes = [one_of("dtype", name, configs.SCALAR_TYPES) for name in dtype or configs.SCALAR_TYPES]
    capabilities = list(dict.fromkeys(capability or ahead_of_time.CAPABILITIES))
    problem = triton.compiler_problem()  # nvdisasm comes with Triton
    no_cuda = cuda_resources.problem()
    if problem or (no_cuda and engine and "cuda" in engines):
        refuse(problem or no_cuda)
    if resume and json_path is None:
        refuse("--resume goes with --json, which says what to go on with")
    kept = _resources_file.Kept()
    about = {"machine": machine.describe(), "command": command_line(json_path)}
    try:
        if resume and json_path.exists():
            kept = _resources_file.read(json_path)
        writer = _resources_file.Writer(json_path, about, resume)
    except ValueError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"can't write {json_path}: {error.strerror}")

    jobs = {job.key: job for job in measured.jobs(chosen, dtypes, capabilities)} if "triton" in engines else {}
    rows = [row for row in kept.triton if row.key in jobs]
    cuda_rows = [row for row in kept.cuda if row.capability in capabilities and "cuda" in engines]
    done = {row.key for row in rows}
    left = [job for key, job in jobs.items() if key not in done]
    try:
        with make_progress() as progress:
            if left:
                task = progress.add_task("compiling", total=len(jobs), completed=len(rows))
                for row in measured.rows(left):
                    writer.add(row)
                    rows.append(row)
                    progress.update(task, completed=len(rows))
            for one in capabilities if "cuda" in engines and not no_cuda else ():
                if any(row.capability == one for row in cuda_rows):
                    continue
                task = progress.add_task(f"compiling CUDA, {one}", total=None)
                made = cuda_resources.measure(
                    [one], lambda count, total, task=task: progress.update(task, completed=count, total=total)
                )
                writer.add_cuda(made)
                cuda_rows += made
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        writer.close()
    console = make_console()
    if "triton" in engines:
        _resources_table.show(rows, console)
    if "cuda" in engines:
        if no_cuda:
            said(console, f"CUDA kernels not compiled: {no_cuda}")
        else:
            _resources_table.show_cuda(cuda_rows, console)
    if kept.cut:
        said(console, f"{kept.cut} lines of {json_path} are cut off: passed over")
    if kept.stale:
        said(
            console,
            f"{kept.stale} rows of {json_path} are of other kernels or another Triton: not counted",
        )
    if not all(row.ok for row in (*rows, *cuda_rows)):
        raise typer.Exit(1)
