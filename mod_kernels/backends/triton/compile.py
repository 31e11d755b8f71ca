"""Ahead-of-time compilation of the launcher's variants, and what each costs: no GPU is needed.

Pointers are taken as 16-byte aligned, as every tensor of torch's allocator is. A view that starts elsewhere
makes Triton compile a variant of its own at the launch, with narrower loads; those are not covered here.
Integers are exempt from Triton's specialisation (``do_not_specialize``), so they add no variants.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .configs import Variant
from .launch import kernels

# Compute capabilities the kernels are checked for: A100, A10, L4 and RTX 4090, H100, B200, RTX 5090.
CAPABILITIES = (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Resources:
    """What one compiled variant takes: registers a thread, bytes of spills and stack, bytes of shared memory."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compile one variant for one compute capability (90 for 9.0) and read what ptxas says of it.

    Must not run under ``TRITON_INTERPRET=1``: kernels are Python functions there.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernels()[variant.kernel]
    constants = dict(variant.constexprs)
    types = dict(variant.signature) | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {name: value for name, value in variant.arguments.items() if name not in constants}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _resources(compiled.asm["ptx"], capability, compiled.metadata.shared)


def _resources(ptx: str, capability: int, shared: int) -> Resources:
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", str(source)]
        command += ["-o", str(Path(folder, "kernel.cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = [
        r"Used (\d+) registers",
        r"(\d+) bytes spill stores",
        r"(\d+) bytes spill loads",
        r"(\d+) bytes stack frame",
    ]
    return Resources(*(int(re.search(number, log).group(1)) for number in numbers), shared)
