"""The machine of fibers that the CUDA kernels are tested on (tests/cuda_host): right toy kernels, and broken ones.

Of a broken kernel either the machine itself says what is wrong (an Error, with block and thread), or
AddressSanitizer does, or the result is wrong in the orders named: then it takes a check of the result.
"""

import pytest

from .cuda_host_program import ENVIRONMENT, HOST, KERNEL_FLAGS, compiled, linked, machine, need_sanitizers, once
from .test_native_program import run

MACHINE, ASAN = "caught: block (", "ERROR: AddressSanitizer: "
EVERY_ORDER = ["wrong: forward, reversed, seed 1, ", ", seed 20\n"]

# What each broken kernel is, and what must be said of it.
BROKEN = {
    "no barrier": EVERY_ORDER,
    "no barrier before reuse": EVERY_ORDER,
    "shared read past the end": [ASAN + "heap-buffer-overflow", "READ of size 4"],
    "shared write past the end": [ASAN + "heap-buffer-overflow", "WRITE of size 4"],
    "global read past the end": [ASAN + "heap-buffer-overflow", "READ of size 4"],
    "global write past the end": [ASAN + "heap-buffer-overflow", "WRITE of size 4"],
    "shuffle by half a warp": [MACHINE, "lanes of its warp apart"],
    "shuffle after a lane has ended": [MACHINE, "ended while lanes of its warp wait"],
    "shuffle with half a mask": [MACHINE, "not all lanes are in the mask"],
    "shuffles in two places": [MACHINE, "lanes of its warp apart"],
    "no cluster barrier before reading": EVERY_ORDER,
    "no cluster barrier after writing": [MACHINE, "remote_shared of rank 0, which has ended"],
    "ends while it is read remotely": [MACHINE, "ended while another block may still use its shared memory"],
    "a pointer kept too long": [ASAN + "heap-use-after-free", "READ of size 4"],
    "a block misses the cluster barrier": [MACHINE, "ended while another block may still use its shared memory"],
    "arrives at the cluster barrier and ends": [MACHINE, "ended between cluster_arrive and cluster_wait"],
    "no wait for a copy": [MACHINE, "bulk_load while the barrier's last copy is under way"],
    "only a warp waits for a copy": ["wrong: forward, reversed, seed "],
    "copy without initialisation": [MACHINE, "bulk_load with a barrier that is not initialised"],
    "no barrier after initialisation": [MACHINE, "bulk_wait for a barrier that is not initialised"],
    "copy from between 16 bytes": [MACHINE, "bulk_load at an address not so aligned"],
    "copy of no multiple of 16 bytes": [MACHINE, "bulk_load of 252 bytes"],
    "copy from past the end": [MACHINE, "bulk_load from beyond an allocation"],
    "copy to past the end": [MACHINE, "bulk_load to beyond its shared memory"],
    "wait for the wrong parity": [MACHINE, "bulk_wait for the copy before the first"],
    "two copies for one wait": [MACHINE, "bulk_load while the barrier's last copy is under way"],
    "no barrier before a copy into what is read": ["caught: deadlock: block (", "waits for a bulk copy"],
    "ends before its copy has landed": [MACHINE, "ended while a bulk copy into its shared memory is under way"],
    # Whether the last to arrive finds the others' work unfinished is the orders' doing: kReversed sees to it.
    "counts before the barrier": ["wrong: reversed, seed "],
    "no barrier after the count": ["wrong: reversed, seed "],
    "divergent barrier": [MACHINE, "divergent __syncthreads"],
    "barrier after a thread has ended": [MACHINE, "ended while threads of its block wait"],
    "thread ends without the barrier": [MACHINE, "ended while threads of its block wait"],
    "two barriers wait for each other": ["caught: deadlock: block (", "for the cluster", "at __syncthreads"],
    "misaligned load": [MACHINE, "a 16-byte load at an address not so aligned"],
    "misaligned store": [MACHINE, "a 16-byte store at an address not so aligned"],
    "misaligned by a promise": [MACHINE, "an access at an address not so aligned"],
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    need_sanitizers()
    objects = machine(tmp_path_factory)

    def build(folder):
        toys = compiled(HOST / "self_test.cpp", folder / "self_test.o", *KERNEL_FLAGS)
        linked(folder / "self_test", [toys, *(objects[name] for name in ("machine", "cuda_host", "fiber"))])

    return once(tmp_path_factory, "cuda_toys", build) / "self_test"


def test_right_kernels_are_right_in_every_order(program):
    done = run(program, env=ENVIRONMENT)
    assert done.stdout == "all right\n", done.stdout + done.stderr


def test_every_broken_kernel_is_listed(program):
    assert set(run(program, "list", env=ENVIRONMENT).stdout.splitlines()) == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_finds(name, program):
    done = run(program, name, env=ENVIRONMENT)
    said = done.stdout + done.stderr
    for words in BROKEN[name]:
        assert words in said, said
