"""Where a run's results go, and how an interrupted one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .machine import folder_name
from .store import Results, machine_key, read

# What has to be as it was for a run to go on: the rest of a machine's description says when it was looked at.
_SAME = ("torch", "triton", "python", "commit", "dirty", "allocator")


def file_of(path: Path, suite: str, machine: dict[str, Any]) -> Path:
    """``path`` itself or, of a folder (no suffix), its ``<machine>/<suite>.jsonl``."""
    if path.is_dir() or not path.suffix:
        return path / folder_name(machine) / f"{suite}.jsonl"
    return path


def interrupted_run(path: Path, suite: str, command: str, machine: dict[str, Any]) -> Results | None:
    """The last run of ``suite`` in the file, if it was cut off; None if it came to its end.

    Raises:
        ValueError: there is none, or it is of another command, machine, version or commit.
    """
    if not path.exists():
        raise ValueError(f"{path} is not there: nothing to resume")
    runs = [run for run in read(path).runs if run.suite == suite]
    if not runs:
        raise ValueError(f"{path} holds no run of {suite} to resume")
    last = runs[-1]
    if not last.interrupted:
        return None
    if machine_key(last.machine) != machine_key(machine):
        raise ValueError(f"the last run of {suite} in {path} is of another machine")
    if last.command != command:
        raise ValueError(f"the last run of {suite} in {path} is of another command: {last.command}")
    for name in _SAME:
        was, now = last.machine.get(name), machine.get(name)
        if was != now:
            raise ValueError(f"the last run of {suite} in {path} is of {name} {was}, this is {now}")
    last.interrupted = False
    return last
