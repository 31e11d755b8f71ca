"""The file that keeps what ``mod-kernels tune`` found on a GPU: where it is, what it holds, if it may be used."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

from .tuning import Tuning

# Of the tuning's fields and of the kernels that they are for: to be raised when a field changes its meaning or the
# kernels change so much that old times say nothing of them.
SCHEMA = 1


def cache_folder() -> Path:
    """``$MOD_KERNELS_CACHE``, else ``mod_kernels`` in ``$XDG_CACHE_HOME`` or ``~/.cache``, as torch.hub has it."""
    given = os.environ.get("MOD_KERNELS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mod_kernels"


def path_of(gpu: str, triton: str) -> Path:
    """The file of a GPU, by its name, and a version of Triton."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu} triton {triton}")
    return cache_folder() / f"tuning-{name}.json"


def check_writable() -> None:
    """Whether what a search will find can be kept: better known before it begins.

    Raises:
        OSError: it can't.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def save(path: Path, tuning: Tuning, gpu: str, triton: str, kept: list[str]) -> None:
    """Write all at once: who reads finds the file as it was before, or as it is after.

    ``kept``: what was found, in words, for people to read.

    Raises:
        OSError: it can't be written; the file is then as it was.
    """
    said = {"schema": SCHEMA, "gpu": gpu, "triton": triton, "kept": kept, "tuning": asdict(tuning)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(said, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, gpu: str, triton: str) -> Tuning:
    """The tuning in ``path``.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such file, or another GPU's, Triton version's or schema's; says which.
    """
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError("it holds no JSON object")
    for name, here in (("schema", SCHEMA), ("gpu", gpu), ("triton", triton)):
        if said.get(name) != here:
            raise ValueError(f"its {name} is {said.get(name)!r}, here it is {here!r}")
    values = said.get("tuning")
    names = {field.name for field in fields(Tuning)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"its tuning must have the fields {', '.join(sorted(names))}")
    return Tuning(**{name: _as_tuples(value) for name, value in values.items()})


def _as_tuples(value: object) -> object:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
