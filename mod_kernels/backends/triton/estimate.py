"""An ESTIMATE of how fast a pooling kernel can read x, from its instructions alone. Nothing here is measured.

Model: a multiprocessor has four schedulers, each issues one instruction of one warp a clock, and nothing else
holds it up. One pass of the loop costs a warp as many issue slots as the loop has instructions, so that

    bytes a clock and multiprocessor = 4 * 32 * (bytes of x a thread loads in the loop) / (instructions in it).

Left out: what comes before and after the loop (much of it where a plane is one pass, as 7x7 is), latency that too
few warps can't hide, units that take an instruction only every other clock, L1's own width, launches. So the
number is a bound from above, and the time from it one from below. A kernel whose number lies below what the memory
delivers is held up by its instructions; above, this says nothing against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import sass

_SCHEDULERS = 4
_LANES = 32


@dataclass(frozen=True)
class Gpu:
    """Multiprocessors, boost clock in GHz and memory bandwidth in GB/s."""

    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth_gbs: float

    @property
    def bytes_per_clock(self) -> float:
        """What the memory delivers, a clock and multiprocessor."""
        return self.bandwidth_gbs / self.clock_ghz / self.multiprocessors


# One GPU of each capability. Looked up, but none in a data sheet of NVIDIA's itself:
# 8.0: thundercompute.com/blog/nvidia-a100-specs-full-guide; hmc-tech.com/gpus/nvidia-a100-sxm-vs-nvidia-b200 (the
#   multiprocessors).
# 8.6: sysrqmts.com/gpus, A10 PCIe.
# 8.9: pcspecchart.com/pc_parts/gpu/25; 384 bits at 21 Gb/s.
# 9.0: glennklockwood.com/garden/processors/h100, after NVIDIA's white paper. The clock is that of vector
#   instructions.
# 10.0: multiprocessors, 7680 bits and 3996 MHz as a driver gives them (github.com/pytorch/ao/pull/4002); NVIDIA
#   advertises 8000 GB/s. The clock: hmc-tech.com, as above.
# 12.0: fpsbench.com/compare/gpu/nvidia-geforce-rtx-4090-d-vs-nvidia-geforce-rtx-5090; 512 bits at 28 Gb/s.
GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41, 2039),
    86: Gpu("A10", 72, 1.695, 600),
    89: Gpu("RTX 4090", 128, 2.52, 1008),
    90: Gpu("H100 SXM", 132, 1.98, 3350),
    100: Gpu("B200", 148, 1.98, 7672),
    120: Gpu("RTX 5090", 170, 2.407, 1792),
}


@dataclass(frozen=True)
class Estimate:
    """An estimate, see the module. Times are of one sample in a batch that fills the GPU.

    ``lanes`` is the share of the loop's lanes that fall on elements of x: the others are masked off and load
    nothing. ``needed_bytes_per_clock`` is what the loads get when loads and stores of the loop fill the memory's
    bandwidth; ``floor_us`` the time of those bytes at that bandwidth, ``us`` the time at the slower of the two.
    """

    loop_instructions: int
    bytes_per_clock: float
    needed_bytes_per_clock: float
    lanes: float
    over_floor: float
    us: float
    floor_us: float


def estimate(
    loop: list[sass.Instruction],
    loads: list[sass.Instruction],
    tensor_bytes: int,
    tensors: int,
    lanes: float,
    gpu: Gpu,
) -> Estimate:
    """Of a loop with ``loads`` of ``tensors`` inputs of ``tensor_bytes`` bytes a sample each."""
    loaded = sum(one.width for one in loads)
    stored = sum(one.width for one in loop if one.stores)
    reached = _SCHEDULERS * _LANES * loaded / len(loop)
    needed = gpu.bytes_per_clock * loaded / (loaded + stored)
    floor_us = tensor_bytes * tensors * (loaded + stored) / loaded / (gpu.bandwidth_gbs * 1e3)
    over = max(1.0, needed / (reached * lanes))
    return Estimate(len(loop), reached, needed, lanes, over, over * floor_us, floor_us)
