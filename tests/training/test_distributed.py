"""Two processes on half of a batch each: the gradients of one process on the whole of it."""

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mod_kernels import use_backend
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends.native import CPU

from .support import make_stages

pytestmark = pytest.mark.skipif(CPU.library is None or not dist.is_gloo_available(), reason="needs gloo")


def make_stage():
    torch.manual_seed(5)
    stage, _ = make_stages()
    return stage.eval()  # batch norms with given statistics: else each process has its own


def make_batch():
    torch.manual_seed(6)
    return torch.randn(4, 32, 10, 10, dtype=torch.float64)


def step(module, x):
    """The gradients are those of a mean, as DDP and FSDP average over processes."""
    with use_backend("cpu"):
        module(x).square().flatten(1).sum(1).mean().backward()


def train(rank, way, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        stage = make_stage()
        if way == "ddp":
            module = DistributedDataParallel(stage)
        else:
            module = stage
            for block in stage:
                fully_shard(block, mesh=dist.init_device_mesh("cpu", (2,)))
            fully_shard(module, mesh=dist.init_device_mesh("cpu", (2,)))
        step(module, make_batch()[2 * rank : 2 * rank + 2])
        found = {}
        for name, parameter in stage.named_parameters():
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if way == "fsdp2" else gradient
        if rank == 0:
            torch.save(found, path)
    finally:
        dist.destroy_process_group()
    # Not by way of the interpreter's end: gloo's threads may still let go of the last gather's tensors, which
    # takes the GIL; one that asks for it too late is ended by Python inside a destructor, and the process aborts
    # (one run in five with torch 2.11).
    os._exit(0)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_are_one(way, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "gradients.pt"
    mp.spawn(train, (way, port, str(path)), nprocs=2)
    found = torch.load(path)
    stage = make_stage()
    step(stage, make_batch())
    assert len(found) == len(list(stage.parameters()))
    for name, parameter in stage.named_parameters():
        assert relative_norm(found[name], parameter.grad) < 20 * VALUES[torch.float64], name
