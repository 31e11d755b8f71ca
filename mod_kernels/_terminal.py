"""What the verbs of the command line share: refusals, tables and progress on a terminal, files."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
DEVICES = ("cpu", "cuda")
JsonPath = Annotated[
    Path | None,
    typer.Option("--json", help="append to this file of JSON lines, or to <machine>/<suite>.jsonl in this folder"),
]


def said(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def command_line(written: Path | None) -> str:
    """This run's command, without the folder that its file is written to: results are for others to read; and
    without ``--resume``: a run that goes on is the one that was begun."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    if written is not None:
        words = [word.replace(str(written), written.name) for word in words]
    return " ".join(["mod-kernels", *words])


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_console() -> Console:
    """Standard output, never so narrow that rich would cut the numbers off: better that a terminal wraps rows."""
    console = Console()
    return Console(width=max(console.width, 140 if console.is_terminal else 170))


def make_progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


class TimeLeft:
    """In words, where there is no terminal to draw a bar on; "" before the first cell is done."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None

    def __call__(self, number: int, total: int) -> str:
        if self._first is None:
            self._first = time.monotonic(), number
        begun, first = self._first
        if number == first:
            return ""
        left = (time.monotonic() - begun) / (number - first) * (total - number)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {left:.0f} s left"


def check_device(name: str) -> None:
    one_of("device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        refuse("device 'cuda': no CUDA device is available here")


def one_of(what: str, name: str, choices: Any) -> str:
    if name not in choices:
        refuse(f"{what} must be one of {', '.join(choices)}, got {name!r}")
    return name


def refuse(message: str) -> NoReturn:
    print(f"mod-kernels: {message}", file=sys.stderr)
    raise typer.Exit(2)
