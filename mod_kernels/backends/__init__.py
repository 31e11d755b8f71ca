"""Which engine serves a call: the choice, the override, and the account of both.

``None`` stands for the reference (plain ATen): it serves whatever no engine does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from ._engine import Call, Engine, Support
from .cuda import CUDA
from .native import CPU
from .triton import TRITON

__all__ = [
    "BACKENDS",
    "Call",
    "Engine",
    "Explanation",
    "Support",
    "choose",
    "engines",
    "explain",
    "may_serve",
    "offered",
    "request",
    "requested",
    "use_backend",
]

_ENGINES: dict[str, Engine] = {CPU.name: CPU, TRITON.name: TRITON, CUDA.name: CUDA}
# Engines asked in turn when nobody named one. Triton on a CPU is the interpreter: only by name. On a GPU the order
# is no measurement: nothing under benchmarks/results/ is of the CUDA engine. What is there one day decides here,
# case by case; until then it serves where Triton can't (none installed, say), and by name.
_AUTO = {"cpu": (CPU,), "cuda": (TRITON, CUDA)}
BACKENDS = ("auto", "reference", *_ENGINES)

# Process-wide, like torch.backends' flags; a wrong name in the environment is refused at the first op.
_requested = os.environ.get("MOD_KERNELS_BACKEND") or "auto"
# Choices already made. Calls that differ only in batch and spatial size share an entry.
_choices: dict[tuple[str, Call], Engine | None] = {}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the ``with`` on one backend: one of ``BACKENDS``.

    Process-wide, not per thread. A backend that can't serve a call raises at that call, with the reason;
    ``"auto"`` takes the best that can, and the reference where none can.

    Raises:
        ValueError: the name is not a backend's.
    """
    global _requested
    before = request(name)
    try:
        yield
    finally:
        _requested = before


def request(name: str) -> str:
    """Like :func:`use_backend` from here on; returns what was asked for before."""
    global _requested
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    before, _requested = _requested, name
    return before


def requested() -> str:
    """The name that ``use_backend`` or the environment gave; ``"auto"`` where neither did."""
    return _requested


def choose(call: Call) -> Engine | None:
    """The engine that serves ``call``, or None for the reference, as always in forward-mode differentiation.

    Raises:
        RuntimeError: a backend was asked for by name and can't serve; says why.
        ValueError: MOD_KERNELS_BACKEND names no backend.
    """
    if torch.compiler.is_compiling():  # traced once: nothing to remember, and no global to write to
        return _decide(_requested, call)
    if forward_ad._current_level >= 0:
        if _requested not in ("auto", "reference"):
            raise RuntimeError(f"backend {_requested!r} was asked for, and has no forward-mode derivatives")
        return None
    key = (_requested, call)
    try:
        return _choices[key]
    except KeyError:
        engine = _choices[key] = _decide(*key)
        return engine
    except TypeError:  # symbolic sizes can't be hashed
        return _decide(*key)


def offered(call: Call) -> Engine | None:
    """:func:`choose` for what PyTorch can do as well: None where the backend that was asked for can't serve."""
    if _requested == "auto":
        return choose(call)
    if forward_ad._current_level >= 0:
        return None
    engine = _ENGINES.get(_requested)
    return engine if engine is not None and engine.supports(call).ok else None


def may_serve(op: str, device: str) -> bool:
    """Whether one of the engines that would be asked has ``op`` at all: for what is asked at every call."""
    asked = _AUTO.get(device, ()) if _requested == "auto" else (_ENGINES.get(_requested),)
    for engine in asked:  # noqa: SIM110 (a generator costs every call more)
        if engine is not None and op in engine.ops:
            return True
    return False


def _decide(name: str, call: Call) -> Engine | None:
    if name not in BACKENDS:
        raise ValueError(f"MOD_KERNELS_BACKEND must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "reference":
        return None
    if name == "auto":
        return next((engine for engine in _AUTO.get(call.device, ()) if engine.supports(call).ok), None)
    reason = _ENGINES[name].supports(call).reason
    if reason:
        raise RuntimeError(f"backend {name!r} can't serve {call.op}: {reason}")
    return _ENGINES[name]


@dataclass(frozen=True)
class Explanation:
    """What would serve a call, and why the others would not.

    Attributes:
        op: the op.
        backend: the backend that serves it, or None if the one asked for by name can't.
        reasons: for every other backend, why it does not.
        copies: what is copied before the engine runs, or "" for nothing.
    """

    op: str
    backend: str | None
    reasons: dict[str, str]
    copies: str = ""

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.backend or 'nothing: it raises'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        if self.copies:
            lines.append(f"  copied first: {self.copies}")
        return "\n".join(lines)


def explain(call: Call, copies: str = "") -> Explanation:
    """Account for the choice :func:`choose` makes for ``call``."""
    answers = {engine: _ENGINES[engine].supports(call) for engine in _ENGINES}
    reasons = {engine: answer.reason for engine, answer in answers.items() if not answer.ok}
    try:
        engine = choose(call)
    except RuntimeError:
        return Explanation(call.op, None, reasons, copies)
    backend = "reference" if engine is None else engine.name
    for other in (*_ENGINES, "reference"):
        if other != backend and other not in reasons:
            asked = (
                f"{_requested!r} was asked for"
                if _requested != "auto"
                else f"{backend!r} comes first on {call.device}"
            )
            reasons[other] = asked
    return Explanation(call.op, backend, reasons, copies)


def engines() -> dict[str, dict[str, str]]:
    """For ``info``: what each engine says of itself."""
    return {name: engine.describe() for name, engine in _ENGINES.items()}
