"""Which argument each global access of a kernel goes through, worked out from its PTX and marked in it.

Registers are followed from ``ld.param`` on: what is computed from an argument belongs to it, what is loaded from
memory belongs to none. The mark is a line number: every global access gets a ``.loc`` of its own in place of the
compiler's, and ptxas carries line numbers over to the SASS (:mod:`.sass`). Code generation does not look at them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# "%rd4", and "%tid.x", which no argument ever reaches
_REGISTER = re.compile(r"%[a-zA-Z]+\d*")
_PARAMETER = re.compile(r"\w+_param_(\d+)")
# Loads, stores and atomics of global memory, and asynchronous copies from it to shared memory.
_ACCESS = re.compile(
    r"(?:@!?%\w+\s+)?(?:(?:ld|st|atom|red)\.(?:[\w:]+\.)*global[\w.:]*|cp\.async\.c[ag]\.shared\.global[\w.:]*)\s"
)
_STATEMENT = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(.*)", re.DOTALL)
UNKNOWN = 9999


def mark_arguments(ptx: str, pointers: Mapping[int, str]) -> str:
    """``ptx`` with line ``1 + i`` on every global access whose address comes from the pointer at position i alone.

    ``pointers``: position among the kernel's run-time arguments -> name. Accesses of unknown or mixed origin get
    line UNKNOWN. The other instructions keep the line of the access before them.
    """
    ptx = re.sub(r"//.*", "", ptx)
    ptx = re.sub(r"^\s*\.(?:loc|file)\b.*\n", "", ptx, flags=re.MULTILINE)
    statements = ptx.split(";")
    origins = _origins(statements, pointers)
    for number, statement in enumerate(statements):
        access = _ACCESS.search(statement)
        if access:
            found = set().union(*(origins.get(register, ()) for register in _address(statement)))
            line = 1 + found.pop() if len(found) == 1 else UNKNOWN
            at = access.start()
            statements[number] = f"{statement[:at]}\n\t.loc\t1 {line} 0\n\t{statement[at:]}"
    return ";".join(statements) + '\n\t.file\t1 "arguments"\n'


def marked_argument(line: int, pointers: Mapping[int, str]) -> str | None:
    """The argument that ``line`` stands for."""
    return pointers.get(line - 1)


def _address(statement: str) -> list[str]:
    """Registers of the global address, the last in brackets: ``cp.async`` has one of shared memory before it."""
    return _REGISTER.findall(re.findall(r"\[([^\]]*)\]", statement)[-1])


def _origins(statements: Sequence[str], pointers: Mapping[int, str]) -> dict[str, set[int]]:
    """Register -> positions of the pointers it was computed from, until nothing new is found (loops)."""
    moves = []  # (registers written, registers read)
    origins: dict[str, set[int]] = {}
    for statement in statements:
        parsed = _STATEMENT.search(_body(statement))
        if parsed is None:
            continue
        operation, operands = parsed.groups()
        written, read = _operands(operands)
        if operation.startswith("ld.param"):
            parameter = _PARAMETER.search(operands)
            if parameter and int(parameter.group(1)) in pointers:
                for register in written:
                    origins.setdefault(register, set()).add(int(parameter.group(1)))
        elif not operation.startswith(("ld.", "st.", "atom.", "red.", "setp", "cp.")):
            moves.append((written, read))
    changed = True
    while changed:
        changed = False
        for written, read in moves:
            found = set().union(*(origins.get(register, ()) for register in read))
            for register in written:
                if not found <= origins.get(register, set()):
                    origins.setdefault(register, set()).update(found)
                    changed = True
    return origins


def _body(statement: str) -> str:
    """The last line of a statement with anything on it: labels and directives stand on lines before it."""
    *_, last = [""] + [line for line in statement.splitlines() if line.strip()]
    return last


def _operands(operands: str) -> tuple[list[str], list[str]]:
    """Registers written and read: the first operand, which may be a ``{...}`` of several, and the others."""
    first, _, rest = operands.lstrip().partition("}" if operands.lstrip().startswith("{") else ",")
    return _REGISTER.findall(first), _REGISTER.findall(rest)
