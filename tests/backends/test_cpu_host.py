"""What the CPU engine takes of its host: memory beside x, and threads inside a DataLoader's worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mod_kernels import functional, use_backend
from mod_kernels.backends.native import CPU

from ..support import feature_map, make_spec
from .cpu_cases import block

pytestmark = pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))

ROOT = Path(__file__).parents[2]
BOTTLENECKS = [(256, 56, 4), (512, 28, 8), (1024, 14, 16), (2048, 7, 32)]
# A thread's scratch: k bands of the gathered channels, 4096 values together, two planes with a halo for each of
# the k / 4 inner channels, and little else. At most 43 KiB in these shapes, at 56 x 56.
THREAD_BYTES = 48 << 10


def allowed(x, k, threads):
    """The 3k/C of x that the block moves beside reading it, two (N, C) of float32, and each thread's scratch."""
    n, channels = x.shape[:2]
    return 3 * k / channels * x.nbytes + 8 * n * channels + THREAD_BYTES * threads


def allocated_at_once(call):
    """The most bytes that torch's allocator has given and not got back during a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize(("channels", "size", "k"), BOTTLENECKS)
def test_in_place_allocates_little(one_thread, channels, size, k, batch, dtype, layout, threads):
    torch.set_num_threads(threads)
    x, spec = feature_map((batch, channels, size, size), dtype, layout), make_spec(channels, k, dtype=dtype)
    most = allocated_at_once(lambda: CPU.ops["mod_block_"](x, *block(spec)))
    assert batch * channels * 4 <= most <= allowed(x, k, threads)  # the logits are in it
    assert allocated_at_once(lambda: CPU.ops["mod_block"](x, *block(spec))) >= x.nbytes


# Prints, for each layout, by how much a call's peak of resident memory is above what was resident before.
PEAK = """
import sys, torch
from mod_kernels import functional, use_backend
from tests.support import feature_map, make_spec

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

dtype, threads = getattr(torch, sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.set_grad_enabled(False)
for layout in ("nchw", "channels_last"):
    x, spec = feature_map((8, 256, 56, 56), dtype, layout), make_spec(256, 4, dtype=dtype)
    for op in (functional.mod_block_, functional.mod_block):
        with use_backend("cpu"):
            op(x, spec)  # code is read from its file the first time
            before = status("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts from here
            op(x, spec)
        print(status("VmHWM") - before)
"""
# What Linux may be off: cores count pages by themselves, on a large machine up to a MiB, before they add them in.
COUNTED_LATE = 4 << 20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells a peak apart")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_takes_no_memory_in_other_ways(dtype, threads):
    """The same of the whole process, malloc included: every block of a page or more is mapped and given back."""
    words = [sys.executable, "-c", PEAK, str(dtype).removeprefix("torch."), str(threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x = torch.empty(8, 256, 56, 56, dtype=dtype)
    nchw, nchw_copied, last, last_copied = map(int, done.stdout.split())
    for in_place, out_of_place in ((nchw, nchw_copied), (last, last_copied)):
        assert in_place <= allowed(x, 4, threads) + COUNTED_LATE < x.nbytes / 2
        assert out_of_place >= x.nbytes - COUNTED_LATE  # a copy of x would be seen


class Blocks(torch.utils.data.Dataset):
    """An item is the block of a feature map, and what the process that made it had of threads then."""

    def __init__(self):
        self.x, self.spec = feature_map((4, 256, 28, 28)), make_spec(256, 4)

    def __len__(self):
        return 1

    def __getitem__(self, _):
        before = process_threads()
        with torch.no_grad(), use_backend("cpu"):
            y = functional.mod_block(self.x, self.spec)
        return y, torch.get_num_threads(), process_threads() - before


def process_threads():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1


def test_a_data_loader_s_worker_stays_one_thread():
    """Workers are there to fill the cores: a thread for each core in every one of them would be too many."""
    items = Blocks()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        ours, threads, _ = items[0]  # the parent's own threads are running when the worker begins
        loader = torch.utils.data.DataLoader(items, batch_size=None, num_workers=1)
        ((theirs, worker_threads, started),) = loader
    finally:
        torch.set_num_threads(before)
    assert (threads, worker_threads, started) == (3, 1, 0)
    assert torch.equal(theirs.view(torch.int32), ours.view(torch.int32))
