"""``mod-kernels verify | bench | table | sweep | resources | tune | info``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import _info, _verify_table
from ._layout import NCHW
from .backends import BACKENDS as KNOWN_BACKENDS
from .verify import BACKENDS, verify

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
_DEVICES = ("cpu", "cuda")

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
    dtype: Annotated[list[str], typer.Option(help=f"of x; repeatable: {', '.join(_DTYPES)}")] = list(_DTYPES),  # noqa: B006 (typer copies)
    backend: Annotated[list[str], typer.Option(help=f"repeatable: {', '.join(BACKENDS)}")] = list(BACKENDS),  # noqa: B006
    quick: Annotated[bool, typer.Option(help="small shapes only")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="write every comparison to this file")] = None,
) -> None:
    """Check every op against float64 in three stages: logits, selection, values. Exit status 1 if one fails."""
    _device(device)
    dtypes = tuple(_DTYPES[_one_of("dtype", name, _DTYPES)] for name in dtype)
    choices = tuple(name for name in KNOWN_BACKENDS if name != "auto")
    for name in backend:
        _one_of("backend", name, choices)
    console = _console()
    with console.status("") if console.is_terminal else Console(quiet=True).status("") as status:

        def on_row(row: Any) -> None:
            status.update(f"{row.backend} {row.dtype} {row.layout} {row.shape} {row.op}")

        report = verify(device, dtypes, tuple(backend), quick, on_row=on_row)
    _verify_table.show(report, console)
    if json_path is not None:
        _write(json_path, {"device": device, "seed": report.seed, "ok": report.ok} | _summary(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
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
    from .bench import blocks, machine, network_training, store, table, training
    from .bench import networks as whole
    from .bench.shapes import FORMATS, SHAPES

    _device(device)
    blocks_only = (("--quick", quick), ("--kind", kind), ("--layout", layout), ("--max-autotune", max_autotune))
    for option, given in blocks_only:
        if given and networks:
            _refuse(f"{option} is blocks only: leave out --networks or {option}")
    if network and not networks:
        _refuse("--network goes with --networks")
    for option, given in (
        ("--quick", quick),
        ("--max-autotune", max_autotune),
        ("--device cuda", device == "cuda"),
    ):
        if given and train:
            _refuse(f"{option} is inference only: leave out --train or {option}")
    # On a GPU float64 has no kernels. Whole networks on a CPU: in bfloat16 plain code selects so differently that
    # its output is as far off as with no MoD block at all, in float16 its convolutions take ten times as long.
    dtypes, default = (("float32", "float16"), "float16") if device == "cuda" else (tuple(_DTYPES), "float32")
    if networks and device == "cpu":
        dtypes = ("float32",)
    chosen = _DTYPES[_one_of("dtype", dtype or default, dtypes)]
    kinds = ("bottleneck",) if quick else ("bottleneck", "basic")
    if kind is not None:
        kinds = (_one_of("kind", kind, SHAPES),)
    _one_of("layout", layout or NCHW, FORMATS)
    counts = tuple(threads or dict.fromkeys((1, torch.get_num_threads())))
    for name, values in (("threads", counts), ("batch", batch or ())):
        if min(values, default=1) < 1:
            _refuse(f"{name} must be at least 1, got {min(values)}")
    if networks:
        from . import models

        for name in network or ():
            _one_of("network", name, models.list_models())

    results = store.Results(machine.describe(), _command(json_path))
    console = _console()
    with _progress() as progress:
        task = progress.add_task("", total=None)

        def on_cell(label: object, number: int, total: int) -> None:
            progress.update(task, description=str(label), completed=number, total=total)
            if not progress.console.is_terminal:
                print(f"[{number + 1}/{total}] {label}", file=sys.stderr, flush=True)

        try:
            if networks and train:
                names = tuple(network or network_training.NETWORKS)
                batches = tuple(batch or network_training.BATCHES)
                network_training.run(names, batches, counts, results, on_cell, chosen)
            elif networks:
                names = tuple(network or whole.NETWORKS)
                whole.run(names, tuple(batch or (1,)), counts, results, on_cell, device, chosen)
            else:
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
        except KeyboardInterrupt:
            results.interrupted = True
    table.show(results, console)
    if json_path is not None:
        store.save(results, json_path)
    if results.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.check.startswith("wrong") for row in results.rows):
        raise typer.Exit(1)


@app.command(name="table")
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
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """The paper's table here: every MoD network against its dense peer. Ctrl-C keeps what was measured."""
    from .bench import paper, paper_table

    _device(device)
    if peers and device == "cuda":
        _refuse("--peers is cpu only: leave out --peers or --device cuda")
    names = tuple(_one_of("networks", name, paper.MOD) for name in networks or paper.MOD)
    batches, counts = _counts(batch, threads)

    def measure(results: Any, on_cell: Any) -> None:
        paper_table.run(names, batches, counts, results, on_cell, device, peers)

    _measure_networks(measure, json_path)


@app.command(name="sweep")
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
    from .bench import sweep

    _device(device)
    _one_of("network", network, models.list_models())
    cs = tuple(c or sweep.CS)
    if min(cs) < 1:
        _refuse(f"c must be at least 1, got {min(cs)}")
    batches, counts = _counts(batch, threads)

    def measure(results: Any, on_cell: Any) -> None:
        sweep.run(network, cs, batches, counts, results, on_cell, device)

    _measure_networks(measure, json_path)


def _counts(batch: list[int] | None, threads: list[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Batch sizes and numbers of threads, each at least 1."""
    counts = tuple(threads or dict.fromkeys((1, torch.get_num_threads())))
    for name, values in (("threads", counts), ("batch", batch or ())):
        if min(values, default=1) < 1:
            _refuse(f"{name} must be at least 1, got {min(values)}")
    return tuple(batch or (1,)), counts


def _measure_networks(measure: Any, json_path: Path | None) -> None:
    """Run ``measure(results, on_cell)``; show and write what it left, also after Ctrl-C."""
    from .bench import machine, store, table_paper

    results = store.Results(machine.describe(), _command(json_path))
    console = _console()
    with _progress() as progress:
        task = progress.add_task("", total=None)

        def on_cell(label: object, number: int, total: int) -> None:
            progress.update(task, description=str(label), completed=number, total=total)
            if not progress.console.is_terminal:
                print(f"[{number + 1}/{total}] {label}", file=sys.stderr, flush=True)

        try:
            measure(results, on_cell)
        except KeyboardInterrupt:
            results.interrupted = True
    table_paper.show(results, console)
    if json_path is not None:
        store.save(results, json_path)
    if results.interrupted:
        raise typer.Exit(INTERRUPTED)
    if any(row.check.startswith("wrong") for row in results.rows):
        raise typer.Exit(1)


@app.command()
def resources(
    capability: Annotated[list[int] | None, typer.Option(help="90 for 9.0; repeatable; default all")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="256x56x56 and so on; repeatable; default all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="of x; repeatable; default all")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write every row to this file")] = None,
) -> None:
    """Compile every Triton kernel for the paper's shapes, no GPU needed: registers, spills, occupancy, widths.

    Exit status 1 on a spill, on pooling loads narrower than they could be, and if something does not compile.
    """
    from . import _resources_table
    from .backends import triton
    from .backends.triton import compile as ahead_of_time
    from .backends.triton import configs, enumeration
    from .backends.triton import resources as measured
    from .bench import machine

    shapes = dict.fromkeys(map(measured.shape_name, enumeration.PAPER_SHAPES))  # some are of two networks
    known = [str(one) for one in ahead_of_time.CAPABILITIES]
    for one in capability or ():
        _one_of("capability", str(one), known)
    names = {_one_of("shape", name, shapes) for name in shape or shapes}
    chosen = [one for one in enumeration.PAPER_SHAPES if measured.shape_name(one) in names]
    dtypes = [_one_of("dtype", name, configs.SCALAR_TYPES) for name in dtype or configs.SCALAR_TYPES]
    problem = triton.compiler_problem()
    if problem:
        _refuse(problem)
    with _progress() as progress:
        task = progress.add_task("compiling", total=None)
        try:
            rows = measured.measure(
                chosen,
                dtypes,
                capability or ahead_of_time.CAPABILITIES,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    _resources_table.show(rows, _console())
    ok = all(row.ok for row in rows)
    if json_path is not None:
        about = {"machine": machine.describe(), "command": _command(json_path), "ok": ok}
        _write_text(json_path, _resources_table.as_json(about, rows))
    if not ok:
        raise typer.Exit(1)


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

    chosen = [tune.SHAPES[_one_of("shape", name, tune.SHAPES)] for name in shape or tune.SHAPES]
    served = [name for name in _DTYPES if _DTYPES[name] in triton.DTYPES]
    dtypes = [_DTYPES[_one_of("dtype", name, served)] for name in dtype or ("float16",)]
    batches = batch or tune.BATCHES
    if min(batches) < 1:
        _refuse(f"batch must be at least 1, got {min(batches)}")
    if not budget > 0:
        _refuse(f"budget must be more than 0 seconds, got {budget:g}")
    problem = triton.gpu_problem()
    if problem:
        _refuse(f"tune times kernels on a GPU: {problem}")
    try:
        tuning_file.check_writable()
    except OSError as error:
        _refuse(f"what is found can't be kept: {error}")
    console = _console()
    try:
        found = tune.tune(chosen, batches, dtypes, budget, lambda verdict: _said(console, str(verdict)))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if not found.complete:
        _said(console, f"the {budget:g} seconds were over before every candidate was tried")
    _said(console, f"in force from the next process on: {found.changes or 'the numbers that are built in'}")
    _said(console, f"written to {found.path}")


@app.command()
def info() -> None:
    """Versions, the processor, which backends work and why the others don't."""
    console = _console()
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
    _said(console, f"{name:<20} {text}")


def _said(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _command(written: Path | None) -> str:
    """This run's command, without the folder that its file is written to: results are for others to read."""
    words = sys.argv[1:]
    if written is not None:
        words = [word.replace(str(written), written.name) for word in words]
    return " ".join(["mod-kernels", *words])


def _summary(report: Any) -> dict[str, Any]:
    """The worst comparison of each group, every failure, and what was not served."""
    return {
        "comparisons": len(report.checked),
        "groups": [asdict(row) for row in _verify_table.worst(report).values()],
        "failed": [asdict(row) for row in report.failed],
        "not_served": _verify_table.not_served(report),
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    _write_text(path, json.dumps(data, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _console() -> Console:
    """Standard output, never so narrow that rich would cut the numbers off: better that a terminal wraps rows."""
    console = Console()
    return Console(width=max(console.width, 140 if console.is_terminal else 170))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _device(name: str) -> None:
    _one_of("device", name, _DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        _refuse("device 'cuda': no CUDA device is available here")


def _one_of(what: str, name: str, choices: Any) -> str:
    if name not in choices:
        _refuse(f"{what} must be one of {', '.join(choices)}, got {name!r}")
    return name


def _refuse(message: str) -> NoReturn:
    print(f"mod-kernels: {message}", file=sys.stderr)
    raise typer.Exit(2)
