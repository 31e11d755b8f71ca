"""Ahead-of-time compilation of the launcher's variants, and what each costs: no GPU is needed.

Pointers are taken as 16-byte aligned, as every tensor of torch's allocator is. A view that starts elsewhere
makes Triton compile a variant of its own at the launch, with narrower loads: ``aligned=False``, for feature maps.
Integers are exempt from Triton's specialisation (``do_not_specialize``), so they add no variants.
"""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass

from . import ptx, sass
from .launch import kernels
from .variants import Variant

# Compute capabilities the kernels are checked for: A100, A10, L4 and RTX 4090, H100, B200, RTX 5090.
CAPABILITIES = (80, 86, 89, 90, 100, 120)
# Arguments that may be views, as the kernels call them; weights and scratch are tensors of their own.
FEATURE_MAPS = ("x_ptr", "y_ptr", "z_ptr", "a_ptr", "b_ptr")


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes: registers a thread, bytes of spills and stack, bytes of shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Binary:
    """A compiled variant: what it takes, its instructions, and through which argument each global access goes."""

    resources: Resources
    instructions: list[sass.Instruction]
    pointers: dict[int, str]

    def argument(self, instruction: sass.Instruction) -> str | None:
        """None where the address comes from none or from several."""
        return ptx.marked_argument(instruction.line, self.pointers)


def compile_variant(variant: Variant, capability: int, aligned: bool = True) -> Resources:
    """Compile one variant for one compute capability (90 for 9.0) and read what ptxas says of it.

    ``aligned=False``: for feature maps that start anywhere. Must not run under ``TRITON_INTERPRET=1``: kernels are
    Python functions there.
    """
    return _compile(variant, capability, aligned)[0]


def disassemble_variant(variant: Variant, capability: int, aligned: bool = True) -> Binary:
    """Like :func:`compile_variant`, and the instructions with it."""
    resources, cubin, pointers = _compile(variant, capability, aligned)
    return Binary(resources, sass.disassemble(cubin), pointers)


def _compile(variant: Variant, capability: int, aligned: bool) -> tuple[Resources, bytes, dict[int, str]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()[variant.kernel]
    constants = dict(variant.constexprs)
    types = dict(variant.signature) | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") and (aligned or name not in FEATURE_MAPS)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in variant.arguments.items() if name not in constants}
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    run_time = [name for name in kernel.arg_names if name not in constants]
    pointers = {position: name for position, name in enumerate(run_time) if types[name].startswith("*")}
    cubin, log = _assemble(ptx.mark_arguments(compiled.asm["ptx"], pointers), target, options)
    return resources_in(log, compiled.metadata.shared), cubin, pointers


def _assemble(source: str, target: object, options: dict[str, object]) -> tuple[bytes, str]:
    """The cubin and what ptxas says of it, by the call that Triton itself makes.

    Its options differ from version to version, and registers and spills with them.
    """
    from triton import knobs
    from triton.compiler import make_backend

    backend = make_backend(target)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = False
        cubin = backend.make_cubin(source, {}, backend.parse_options(options), target.arch)
    return cubin, log.getvalue()


def resources_in(log: str, shared: int) -> Resources:
    """What ptxas said of one kernel."""
    numbers = [
        r"Used (\d+) registers",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
        r"(\d+) bytes stack frame",
    ]
    return Resources(*(int(re.search(number, log).group(1)) for number in numbers), shared)
