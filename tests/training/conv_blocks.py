"""Conv blocks to train, and a step of one."""

import torch
from torch import nn

from mod_kernels import use_backend
from mod_kernels.nn import NarrowBasicBlock, NarrowBottleneck

KINDS = (NarrowBottleneck, NarrowBasicBlock)


def make(kind, k, dtype=torch.float64, **options):
    """Norms that are not fresh: after those, some gradients are zero, and there is nothing to hold an error to."""
    block = kind(k, **options).to(dtype).train()
    for norm in norms(block):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return block


def norms(block):
    return [norm for _, norm in block.layers()]


def random(*size, dtype=torch.float64):
    return torch.randn(size, dtype=dtype) + 0.5


def step(block, x, dz, backend="cpu"):
    """z and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    with use_backend(backend):
        z = block(x)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return [z.detach(), *torch.autograd.grad(z, wanted, dz)]
