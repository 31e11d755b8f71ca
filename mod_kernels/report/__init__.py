"""``mod-kernels report``: a page and pictures, made from result files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .collect import Collected, collect

__all__ = ["NoResults", "make"]


class NoResults(Exception):
    """Nothing could be read; the message says why."""


def make(paths: Sequence[Path], out: Path, pictures: Path | None = None, picture_format: str = "png") -> list[str]:
    """Write the page to ``out`` and, asked to, every picture into the folder ``pictures``.

    Returns what could not be read, drawn or written, as sentences; all but the last are on the page too. Without
    matplotlib there are tables alone.

    Raises:
        NoResults: no run could be read; nothing is written.
        OSError: ``out`` can't be written.
    """
    from . import page, picture

    collected = collect(paths)
    if not any(machine.groups or machine.memory for machine in collected.machines):
        raise NoResults("; ".join([*collected.problems, "no results to report"]))
    missing = picture.missing()
    if missing:
        collected.problems.append(missing)
    text = page.page(collected, None if missing else picture.inline)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    problems = list(collected.problems)
    if pictures is not None and not missing:
        try:
            _save_all(collected, pictures, picture_format)
        except OSError as error:
            problems.append(f"no pictures in {pictures}: {error.strerror}")
    return problems


def _save_all(collected: Collected, folder: Path, picture_format: str) -> None:
    """A folder a machine, named as those under ``benchmarks/results``."""
    from . import gallery, roofline
    from .picture import save

    for machine in collected.machines:
        found = roofline.pictures(machine)
        for suite, groups in machine.suites.items():
            for group in groups:
                heat = gallery.heat(group)
                found += [heat] if heat else []
                found += gallery.of_group(machine, group)
            found += gallery.of_memory(machine, suite)
        (folder / machine.folder).mkdir(parents=True, exist_ok=True)
        for one in found:
            save(one, folder / machine.folder / f"{one.name}.{picture_format}")
