"""Which tuning a device's launches take: what ``mod-kernels tune`` found on it, else that of its architecture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from . import tuning_file
from .tuning import DEFAULT, Tuning, of_capability


class InForce(NamedTuple):
    """A tuning and, in words, where it comes from and what is with the file: none, used, or why it is not."""

    tuning: Tuning
    source: str
    file: str = ""


# By device index, -1 for CPU tensors; looked up once in a process, at the device's first call.
_in_force: dict[int, InForce] = {-1: InForce(DEFAULT, "built in")}


def tuning_for(x: Tensor) -> Tuning:
    """The tuning in force on x's device; asked at every call: 0.1 us."""
    device = x.get_device()
    found = _in_force.get(device)
    return of_device(device).tuning if found is None else found.tuning


def of_device(device: int) -> InForce:
    found = _in_force.get(device)
    if found is None:
        found = _in_force[device] = _look_up(device)
    return found


@contextmanager
def using(tuning: Tuning, device: int) -> Iterator[None]:
    """Inside, calls on ``device`` take ``tuning``; a graph captured before keeps what it has."""
    before = of_device(device)
    _in_force[device] = InForce(tuning, "given")
    try:
        yield
    finally:
        _in_force[device] = before


def built_in(device: int) -> Tuning:
    """The tuning of a GPU's architecture."""
    major, minor = torch.cuda.get_device_capability(device)
    return of_capability(10 * major + minor)


def names(device: int) -> tuple[str, str]:
    """What a GPU's file is named by: its name and Triton's version."""
    import triton

    return torch.cuda.get_device_name(device), triton.__version__


def _look_up(device: int) -> InForce:
    gpu, triton = names(device)
    path, own = tuning_file.path_of(gpu, triton), built_in(device)
    try:
        tuning = tuning_file.load(path, gpu, triton)
    except FileNotFoundError:
        return InForce(own, "built in", f"none: `mod-kernels tune` was not run for this GPU and Triton {triton}")
    except (OSError, ValueError) as error:
        return InForce(own, "built in", f"{path} is not used: {error}")
    return InForce(tuning, f"tuned: {changes(tuning, own) or 'as built in'}", str(path))


def changes(tuning: Tuning, before: Tuning) -> str:
    """The fields that differ and their values, in words."""
    pairs = ((field.name, getattr(tuning, field.name), getattr(before, field.name)) for field in fields(Tuning))
    return " ".join(f"{name}={value}" for name, value, old in pairs if value != old)
