"""``mod-kernels verify | bench | table | sweep | profile | compare | report | resources | tune | info``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from . import _cli_bench, _cli_compare, _cli_profile, _cli_report, _cli_resources, _info, _verify_table
from ._terminal import (
    DTYPES,
    INTERRUPTED,
    check_device,
    make_console,
    one_of,
    refuse,
    said,
    write_text,
)
from .backends import BACKENDS as KNOWN_BACKENDS
from .verify import BACKENDS, verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fused kernels for CNN Mixture-of-Depths: check the numbers, measure, look around.",
)


def main() -> None:
    app()


@app.command(name="verify")
def verify_command(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[list[str], typer.Option(help=f"of x; repeatable: {', '.join(DTYPES)}")] = list(DTYPES),  # noqa: B006 (typer copies)
    backend: Annotated[list[str], typer.Option(help=f"repeatable: {', '.join(BACKENDS)}")] = list(BACKENDS),  # noqa: B006
    quick: Annotated[bool, typer.Option(help="small shapes only")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write every comparison to this file")] = None,
) -> None:
    """Check every op against float64 in three stages: logits, selection, values. Exit status 1 if one fails."""
    check_device(device)
    dtypes = tuple(DTYPES[one_of("dtype", name, DTYPES)] for name in dtype)
    choices = tuple(name for name in KNOWN_BACKENDS if name != "auto")
    for name in backend:
        one_of("backend", name, choices)
    console = make_console()
    with console.status("") if console.is_terminal else Console(quiet=True).status("") as status:

        def on_row(row: Any) -> None:
            status.update(f"{row.backend} {row.dtype} {row.layout} {row.shape} {row.op}")

        report = verify(device, dtypes, tuple(backend), quick, on_row=on_row)
    _verify_table.show(report, console)
    if json_path is not None:
        _write(json_path, {"device": device, "seed": report.seed, "ok": report.ok} | _summary(report))
    if not report.ok:
        raise typer.Exit(1)


app.command()(_cli_bench.bench)
app.command(name="table")(_cli_bench.table_command)
app.command(name="sweep")(_cli_bench.sweep_command)
app.command(name="compare")(_cli_compare.compare_command)
app.command()(_cli_report.report)
app.command()(_cli_profile.profile)
app.command()(_cli_resources.resources)


@app.command(name="tune")
def tune_command(
    shape: Annotated[list[str] | None, typer.Option(help="256x56x56 and so on; repeatable; default all")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch size; repeatable; default 1, 8, 32, 128")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="of x; repeatable; default float16")] = None,
    budget: Annotated[float, typer.Option(help="seconds, compiling included")] = 900.0,
) -> None:
    """Search block sizes and warps of the Triton kernels on this GPU, and keep the fastest for later processes.

    Every candidate is checked against the untuned kernels before its time counts. `mod-kernels info` shows what is
    in force and the file it is kept in. Ctrl-C leaves that file as it was.
    """
    from . import tune
    from .backends import triton
    from .backends.triton import tuning_file

    chosen = [tune.SHAPES[one_of("shape", name, tune.SHAPES)] for name in shape or tune.SHAPES]
    served = [name for name in DTYPES if DTYPES[name] in triton.DTYPES]
    dtypes = [DTYPES[one_of("dtype", name, served)] for name in dtype or ("float16",)]
    batches = batch or tune.BATCHES
    if min(batches) < 1:
        refuse(f"batch must be at least 1, got {min(batches)}")
    if not budget > 0:
        refuse(f"budget must be more than 0 seconds, got {budget:g}")
    problem = triton.gpu_problem()
    if problem:
        refuse(f"tune times kernels on a GPU: {problem}")
    try:
        tuning_file.check_writable()
    except OSError as error:
        refuse(f"what is found can't be kept: {error}")
    console = make_console()
    try:
        found = tune.tune(chosen, batches, dtypes, budget, lambda verdict: said(console, str(verdict)))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not found.complete:
        said(console, f"the {budget:g} seconds were over before every candidate was tried")
    said(console, f"in force from the next process on: {found.changes or 'the numbers that are built in'}")
    said(console, f"written to {found.path}")


@app.command()
def info() -> None:
    """Versions, the processor, which backends work and why the others don't."""
    console = make_console()
    for name, value in _info.info().items():
        if isinstance(value, dict) and name == "backends":
            for backend, said in value.items():
                rest = ", ".join(f"{key} {text}" for key, text in said.items() if key != "status")
                _line(console, f"backend {backend}", said["status"] + (f" ({rest})" if rest else ""))
        elif isinstance(value, dict):
            _line(console, name, ", ".join(f"{key} {text}" for key, text in value.items()))
        else:
            _line(console, name, "not set" if name.isupper() and value is None else str(value or "not installed"))


def _line(console: Console, name: str, text: str) -> None:
    said(console, f"{name:<20} {text}")


def _summary(report: Any) -> dict[str, Any]:
    """The worst comparison of each group, every failure, and what was not served."""
    return {
        "comparisons": len(report.checked),
        "groups": [asdict(row) for row in _verify_table.worst(report).values()],
        "failed": [asdict(row) for row in report.failed],
        "not_served": _verify_table.not_served(report),
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1) + "\n")
