"""Fill Triton's cache, a process a core, with what numerics check, sanitizer and benchmark launch on this GPU.

Triton compiles a kernel when it is first launched, one after the other, and there are hundreds of variants. Which
they are is found by running the first two with their launches left out.
"""

from __future__ import annotations

import multiprocessing
import os
from unittest import mock

import sanitize  # beside this script
import torch

from mod_kernels import verify
from mod_kernels.backends.triton import enumeration, in_force, launch
from mod_kernels.backends.triton.variants import Variant

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POINTERS = {
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


def main() -> None:
    wanted = variants()
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(wanted), os.cpu_count() or 1)) as pool:
        done = sum(pool.imap_unordered(compile_for_this_gpu, wanted))
    print(f"{done} kernel variants compiled")


def variants() -> list[Variant]:
    """What all three launch, each once, the slowest to compile first."""
    found: dict[Variant, None] = {}
    tuning = in_force.of_device(torch.cuda.current_device()).tuning
    with (
        in_force.using(tuning, device=-1),  # the check runs on CPU tensors here
        mock.patch.object(launch, "run", lambda variant, *launched: found.setdefault(variant)),
        mock.patch("mod_kernels.backends.triton._device_problem", lambda device: ""),
    ):
        verify.verify("cpu", DTYPES, ("triton",))
        sanitize.run_all(sanitize.jobs(), "cpu")
    for shape in enumeration.PAPER_SHAPES:
        for dtype in DTYPES:
            found |= dict.fromkeys(enumeration.variants(shape, str(dtype).removeprefix("torch."), tuning=tuning))
    return sorted(found, key=lambda variant: variant.kernel, reverse=True)


def compile_for_this_gpu(variant: Variant) -> int:
    """Compile as a launch would, without one."""
    from triton.runtime.jit import MockTensor  # warmup itself wraps what is given by position only

    run_time = {name: MockTensor.wrap_dtype(POINTERS.get(kind, 1)) for name, kind in variant.signature}
    launch.kernels()[variant.kernel].warmup(**run_time, **variant.arguments, grid=(1,))
    return 1


if __name__ == "__main__":
    main()
