"""What every variant for the paper's shapes takes on every architecture, and what must not be: a row for each.

A spill of any size is a problem, and so is a kernel that goes through a whole map (pooling, and input_gradient)
and loads it fewer than 16 bytes at a time where rows and samples begin at multiples of 16: its speed is a matter
of instructions a byte. Not where a sample is no larger than SMALL_SAMPLE: shared out to programs, which read the
selector's weights in turn, it is less than a load of 16 bytes for each of their threads.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from . import sass
from .compile import Binary, disassemble_variant
from .configs import SCALAR_BYTES, SCALAR_TYPES, WIDEST_LOAD, align_of
from .enumeration import RESNET_SHAPES, Shape, backward_variants, plane_backward_variants, plane_variants, variants
from .estimate import GPUS, estimate
from .occupancy import occupancy
from .tuning import of_capability
from .variants import Variant

# What the kernels that pool do pool, and what input_gradient goes through.
_POOLED_ARGUMENTS = ("x_ptr", "a_ptr", "b_ptr")
_SUMMED_ARGUMENTS = ("dy_ptr", "y_ptr")
# Bytes of x. At the paper's sizes VGG's last maps on CIFAR, 512x4x4 and 512x2x2 in float16: 16 and 4 KiB beside
# 32 KiB of weights of the first layer, which fewer programs would take longer to read.
SMALL_SAMPLE = 16 << 10


@dataclass(frozen=True)
class Row:
    """One variant on one architecture. Pairs of widths are the narrowest and the widest, in bytes a thread.

    ``digest``: of all that the compiler is told of the variant.
    ``error``: why it did not compile; all that is read from the binary is None then, as is what a kernel has not.
    ``estimate_...``: see :mod:`.estimate`; of pooling kernels that read x, and of input_gradient.
    """

    shape: str
    dtype: str
    capability: int
    kernel: str
    constants: dict[str, object]
    types: dict[str, str]
    num_warps: int
    num_stages: int
    digest: str
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    registers: int | None = None
    spill_bytes: int | None = None  # stores and loads together
    stack_bytes: int | None = None
    shared_bytes: int | None = None
    occupancy: float | None = None
    instructions: int | None = None
    load_widths: tuple[int, int] | None = None
    store_widths: tuple[int, int] | None = None
    pool_load_widths: tuple[int, int] | None = None
    estimate_gpu: str | None = None
    estimate_loop_instructions: int | None = None
    estimate_bytes_per_clock: float | None = None
    estimate_needed_bytes_per_clock: float | None = None
    estimate_lanes: float | None = None
    estimate_over_floor: float | None = None
    estimate_us: float | None = None
    estimate_floor_us: float | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and not self.problems

    @property
    def key(self) -> tuple[int, str, str]:
        """No other row has the same."""
        return self.capability, self.dtype, self.digest

    @property
    def name(self) -> str:
        """For a reader: without the sizes among the constants, which follow from shape, dtype and layout."""
        flags = (f"{key}={value}" for key, value in self.constants.items() if isinstance(value, bool | str))
        return " ".join((self.kernel, self.shape, self.dtype, f"sm_{self.capability}", *flags))


def shape_name(shape: Shape) -> str:
    side = math.isqrt(shape.hw)
    return f"{shape.channels}x{side}x{side}"


class Job(NamedTuple):
    """A variant to compile, of a shape's."""

    shape: Shape
    dtype: str
    variant: Variant
    capability: int

    @property
    def key(self) -> tuple[int, str, str]:
        """That of its row."""
        return self.capability, self.dtype, _digest(self.variant)


def jobs(shapes: Iterable[Shape], dtypes: Iterable[str], capabilities: Iterable[int]) -> list[Job]:
    """Every variant of ``shapes`` in ``dtypes`` on every capability.

    What two shapes have in common, of two kinds of block on maps of one size, is the first one's.
    """
    found: dict[tuple[int, str, Variant], Job] = {}
    for capability in capabilities:
        for shape in shapes:
            for dtype in dtypes:
                for variant in _variants(shape, dtype, capability):
                    found.setdefault((capability, dtype, variant), Job(shape, dtype, variant, capability))
    return list(found.values())


def _variants(shape: Shape, dtype: str, capability: int) -> Iterator[Variant]:
    """In both layouts, as the capability's own tuning has them; in float64 only some ops are served.

    But for the ResNets those of a forward alone, and none in float64: what is left out does not depend on the kind
    of block, and would take as long to compile as all of the ResNets'.
    """
    tuning = of_capability(capability)
    planes = plane_variants, plane_backward_variants
    enumerated = planes if dtype == "float64" else (variants, backward_variants)
    if shape not in RESNET_SHAPES:
        enumerated = () if dtype == "float64" else (variants,)
    found = (
        one
        for channels_last in (False, True)
        for enumerate_variants in enumerated
        for one in enumerate_variants(shape, dtype, channels_last=channels_last, tuning=tuning)
    )
    yield from dict.fromkeys(found)


def rows(jobs: list[Job]) -> Iterator[Row]:
    """A row for each job as it is compiled, in their order, by a process a core."""
    workers = min(os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from (row_of(*job) for job in jobs)
        return
    # Not forked: torch's threads do not live through it. Ctrl-C is for this process to answer.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    )
    try:
        futures = [pool.submit(row_of, *job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            yield _result(future, job)
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[Row], job: Job) -> Row:
    try:
        return future.result()
    except Exception as error:  # a compiler that takes its process with it
        return replace(_row_without_binary(*job), error=_said(error))


def row_of(shape: Shape, dtype: str, variant: Variant, capability: int) -> Row:
    """Compile one variant and read its row; a failure becomes the row's ``error``."""
    row = _row_without_binary(shape, dtype, variant, capability)
    try:
        binary = disassemble_variant(variant, capability)
    except Exception as error:  # whatever Triton, LLVM or ptxas may raise: the other variants go on
        return replace(row, error=_said(error))
    return _judged(_read(row, shape, binary), shape)


def _row_without_binary(shape: Shape, dtype: str, variant: Variant, capability: int) -> Row:
    constants, types = dict(variant.constexprs), dict(variant.signature)
    kernel, warps, stages = variant.kernel, variant.num_warps, variant.num_stages
    return Row(shape_name(shape), dtype, capability, kernel, constants, types, warps, stages, _digest(variant))


def _digest(variant: Variant) -> str:
    return hashlib.sha256(repr(variant).encode()).hexdigest()[:12]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _read(row: Row, shape: Shape, binary: Binary) -> Row:
    """The row with what the binary says."""
    taken, instructions = binary.resources, binary.instructions
    pool_loads = [one for one in instructions if _is_pool_load(row, binary, one)]
    row = replace(
        row,
        registers=taken.registers,
        spill_bytes=taken.spill_stores + taken.spill_loads,
        stack_bytes=taken.stack,
        shared_bytes=taken.shared,
        occupancy=occupancy(row.capability, row.num_warps, taken.registers, taken.shared),
        instructions=len(instructions),
        load_widths=sass.widths(one for one in instructions if one.loads),
        store_widths=sass.widths(one for one in instructions if one.stores),
        pool_load_widths=sass.widths(pool_loads),
    )
    if not pool_loads:
        return row
    place = sass.main_loop(instructions, lambda one: _is_pool_load(row, binary, one))
    # Without a loop the whole kernel is one pass.
    loop = instructions if place is None else instructions[place.start : place.stop]
    loads = [one for one in loop if _is_pool_load(row, binary, one)]
    tensors = len({binary.argument(one) for one in loads})
    tensor_bytes = shape.channels * shape.hw * _size(row.dtype)
    gpu = GPUS[row.capability]
    estimated = estimate(loop, loads, tensor_bytes, tensors, _lanes(row.constants, shape), gpu)
    named = {f"estimate_{name}": value for name, value in vars(estimated).items()}
    return replace(row, estimate_gpu=gpu.name, **named)


def _is_pool_load(row: Row, binary: Binary, instruction: sass.Instruction) -> bool:
    pools = "pool" in row.kernel or row.constants.get("SHARED_OUT") == "pool"
    if not pools and row.kernel != "input_gradient_bwd_kernel":
        return False
    arguments = _POOLED_ARGUMENTS if pools else _SUMMED_ARGUMENTS
    return instruction.loads and binary.argument(instruction) in arguments


def _size(dtype: str) -> int:
    """Bytes of an element."""
    return SCALAR_BYTES[SCALAR_TYPES[dtype]]


def _lanes(constants: dict[str, object], shape: Shape) -> float:
    """Share of the lanes of all CHUNK_C x BLOCK_HW tiles that fall on x; 1.0 where a kernel has no such tiles."""
    if not {"CHUNK_C", "BLOCK_HW"} <= constants.keys():
        return 1.0
    covered = 1
    for length, block in ((shape.channels, constants["CHUNK_C"]), (shape.hw, constants["BLOCK_HW"])):
        covered *= -(-length // block) * block
    return shape.channels * shape.hw / covered


def _judged(row: Row, shape: Shape) -> Row:
    """The row with its problems."""
    problems = []
    if row.spill_bytes:
        problems.append(f"spills {row.spill_bytes} bytes")
    narrow = row.pool_load_widths is not None and row.pool_load_widths[0] < WIDEST_LOAD
    large = shape.channels * shape.hw * _size(row.dtype) > SMALL_SAMPLE
    if narrow and large and _row_alignment(row.constants, shape) * _size(row.dtype) >= WIDEST_LOAD:
        problems.append(f"loads x {row.pool_load_widths[0]} bytes at a time where {WIDEST_LOAD} are possible")
    return replace(row, problems=problems)


def _row_alignment(constants: dict[str, object], shape: Shape) -> int:
    """Elements that divide where every row of x begins: a sample, and a plane or (channels_last) a pixel."""
    samples = constants["ALIGN"]
    if constants.get("RUN"):  # a chunk of planes is one row
        return samples
    return min(samples, align_of(shape.channels) if constants["CHANNELS_LAST"] else constants["HW_ALIGN"])
