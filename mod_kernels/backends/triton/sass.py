"""Reading SASS as ``nvdisasm -c -g`` prints it: the global accesses, how wide they are, and the loops.

A loop is what lies between a label and a branch back to it, both ends included.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r'//## File "[^"]*", line (\d+)')
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_LOADS = ("LDG", "LDGSTS")


@dataclass(frozen=True)
class Instruction:
    """``line`` is the source line it is said to come from, ``target`` the place a branch leads to."""

    name: str
    line: int
    target: int | None = None

    @property
    def loads(self) -> bool:
        """Reads global memory (``LDGSTS``: straight into shared memory)."""
        return self.name.split(".")[0] in _LOADS

    @property
    def stores(self) -> bool:
        return self.name.split(".")[0] == "STG"

    @property
    def width(self) -> int:
        """Bytes a thread of a load or a store."""
        return next((_WIDTHS[part] for part in reversed(self.name.split(".")) if part in _WIDTHS), 4)


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of a cubin's one kernel."""
    return read(listing(cubin))


def listing(cubin: bytes) -> str:
    """What the nvdisasm that comes with Triton prints of a cubin."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cubin")
        source.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", "-g", str(source)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read(text: str) -> list[Instruction]:
    """The instructions of a listing in their order."""
    labels: dict[str, int] = {}
    found: list[tuple[str, int, str | None]] = []
    line = 0
    for row in text.splitlines():
        if match := _LINE.search(row):
            line = int(match.group(1))
        elif match := _LABEL.match(row):
            labels[match.group(1)] = len(found)
        elif match := _INSTRUCTION.match(row):
            name, operands = match.groups()
            target = _TARGET.search(operands) if name.split(".")[0] == "BRA" else None
            found.append((name, line, target and target.group(1)))
    return [Instruction(name, line, labels.get(target)) for name, line, target in found]


def widths(instructions: Iterable[Instruction]) -> tuple[int, int] | None:
    """The narrowest and the widest."""
    found = [one.width for one in instructions]
    return (min(found), max(found)) if found else None


def loops(instructions: Iterable[Instruction]) -> list[range]:
    """Positions of every loop's instructions."""
    return [
        range(instruction.target, place + 1)
        for place, instruction in enumerate(instructions)
        if instruction.target is not None and instruction.target <= place
    ]


def main_loop(instructions: list[Instruction], wanted: Callable[[Instruction], bool]) -> range | None:
    """The innermost loop with instructions that are ``wanted``; of several, the one where those are widest in all.

    None where no loop has one.
    """

    def width(loop: range) -> int:
        return sum(instructions[place].width for place in loop if wanted(instructions[place]))

    found = [loop for loop in loops(instructions) if width(loop)]
    innermost = [
        loop
        for loop in found
        if not any(one != loop and one.start >= loop.start and one.stop <= loop.stop for one in found)
    ]
    return max(innermost, key=width, default=None)
