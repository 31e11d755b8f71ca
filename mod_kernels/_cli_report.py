"""``mod-kernels report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ._terminal import make_console, one_of, refuse, said


def report(
    paths: Annotated[list[Path], typer.Argument(help="result files, or folders to search for *.jsonl")],
    out: Annotated[Path, typer.Option(help="the page")] = Path("report.html"),
    pictures: Annotated[Path | None, typer.Option(help="a folder to write every picture into as well")] = None,
    picture_format: Annotated[str, typer.Option("--format", help="of those pictures: png or svg")] = "png",
) -> None:
    """A page of tables and pictures from result files alone; it needs no network. What can't be read is said."""
    from .report import NoResults, make

    one_of("format", picture_format, ("png", "svg"))
    try:
        problems = make(paths, out, pictures, picture_format)
    except NoResults as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"{out} can't be written: {error.strerror}")
    for problem in problems:
        print(f"mod-kernels: {problem}", file=sys.stderr)
    said(make_console(), f"written to {out}")
