"""What ``mod-kernels resources --json`` keeps: JSON lines, appended as kernels are compiled, for a run to go on.

A line is an object with ``record``:

* ``run``: a process began to add to the file: ``machine``, ``command``, ``columns``, and ``sources``, digests of
  what the kernels are made from: one of the CUDA engine's, and one of each of Triton's kernels;
* ``triton``: a variant on an architecture: what it is, and ``values`` in the order of ``columns``. Of its
  constants those that are no sizes: these follow from shape, dtype, layout and ``tuning.py``;
* ``cuda``: a kernel of the CUDA engine on an architecture.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .backends import cuda_resources
from .backends.triton.resources import Row

_PACKAGE = Path(__file__).parent
_OF_VARIANT = ("shape", "dtype", "capability", "kernel", "num_warps", "num_stages", "digest")
_READERS = ("compile", "estimate", "occupancy", "ptx", "resources", "sass")
COLUMNS = tuple(one.name for one in fields(Row) if one.name not in (*_OF_VARIANT, "constants", "types"))


def sources() -> dict[str, str | dict[str, str]]:
    """By engine, what tells rows of these kernels from rows of others; Triton's by kernel, and with its version.

    Of Triton's a kernel's file, those it is put together from and what reads their binaries; what the rest chooses
    is in a row's own digest.
    """
    import triton

    readers = [_triton_folder() / f"{name}.py" for name in _READERS]
    common = sorted((_PACKAGE.parent / "csrc" / "common").glob("*.h"))
    of_triton = {
        kernel: _digest([*files, *readers], triton.__version__) for kernel, files in _files_of_kernels().items()
    }
    return {"triton": of_triton, "cuda": _digest([*sorted(cuda_resources.SOURCES.glob("*")), *common])}


def _triton_folder() -> Path:
    return _PACKAGE / "backends" / "triton"


def _digest(files: Iterable[Path], version: str = "") -> str:
    digest = hashlib.sha256(version.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files_of_kernels() -> dict[str, list[Path]]:
    """Every kernel's file and those that it imports, directly or not, from beside it."""
    trees = {path: ast.parse(path.read_text()) for path in sorted(_triton_folder().glob("*.py"))}

    def with_imports(path: Path, found: list[Path]) -> list[Path]:
        if path in trees and path not in found:
            found.append(path)
            for node in ast.walk(trees[path]):
                if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                    with_imports(path.with_name(f"{node.module}.py"), found)
        return found

    return {
        node.name: with_imports(path, [])
        for path, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@dataclass
class Kept:
    """The rows of a file that are of the kernels as they are."""

    triton: list[Row] = field(default_factory=list)
    cuda: list[cuda_resources.Row] = field(default_factory=list)
    stale: int = 0  # rows of other kernels, which are not among these
    cut: int = 0  # lines that are none: whoever wrote them was stopped


def read(path: Path) -> Kept:
    """The rows of ``path``, of several alike the last.

    Raises:
        OSError: it can't be read.
        ValueError: it is no file of these.
    """
    now, kept = sources(), Kept()
    triton: dict[tuple, Row] = {}
    cuda: dict[str, cuda_resources.Row] = {}
    of: dict[str, str | dict[str, str]] | None = None
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            kept.cut += 1
            continue
        try:
            kind = record.pop("record")
            if kind == "run":
                of, columns = record["sources"], record["columns"]
            elif _stale(kind, record, of, now):
                kept.stale += 1
            elif kind == "triton":
                row = Row(**(record | dict(zip(columns, record.pop("values"), strict=True)) | {"types": {}}))
                triton[row.key] = row
            else:
                row = cuda_resources.Row(**record)
                cuda[row.name] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of mod-kernels resources: {line[:60]!r} ({error})") from error
    if of is None:
        raise ValueError(f"{path} is no file of mod-kernels resources: it says of no run what was compiled")
    kept.triton, kept.cuda = list(triton.values()), list(cuda.values())
    return kept


def _stale(kind: str, record: dict, of: dict, now: dict) -> bool:
    """Whether a row is of other sources than those there are now."""
    if kind == "cuda":
        return of["cuda"] != now["cuda"]
    then, kernel = of["triton"], record["kernel"]
    return not isinstance(then, dict) or then.get(kernel, "none") != now["triton"].get(kernel)


class Writer:
    """Appends to ``path``, which is begun anew unless ``goes_on``; None: keeps nothing.

    Raises:
        OSError: it can't be written.
    """

    def __init__(self, path: Path | None, about: dict[str, object], goes_on: bool) -> None:
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_off = goes_on and path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a" if goes_on else "w")
        if cut_off:
            self._file.write("\n")
        self._write({"record": "run"} | about | {"sources": sources(), "columns": COLUMNS})

    def add(self, row: Row) -> None:
        flags = {name: value for name, value in row.constants.items() if isinstance(value, bool | str)}
        one = {"record": "triton"} | {name: getattr(row, name) for name in _OF_VARIANT}
        self._write(one | {"constants": flags, "values": [_short(getattr(row, name)) for name in COLUMNS]})

    def add_cuda(self, rows: Iterable[cuda_resources.Row]) -> None:
        for row in rows:
            self._write({"record": "cuda"} | asdict(row))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, object]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()


def _short(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value
