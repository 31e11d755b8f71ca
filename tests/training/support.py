"""Blocks and stages in training, and the plain form that their gradients are held to."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mod_kernels import MoDBlock
from mod_kernels.bench.networks import PlainBlock
from mod_kernels.nn import MoDStage, NarrowBasicBlock, NarrowBottleneck

CHANNELS, K = 64, 8


def make_stages(dtype=torch.float64, position="first", host=Bottleneck):
    """A MoDStage (standard, MoD, standard, MoD), and the same weights in plain PyTorch."""
    narrow = {BasicBlock: NarrowBasicBlock, Bottleneck: NarrowBottleneck}[host]
    planes = CHANNELS // host.expansion
    downsample = nn.Sequential(nn.Conv2d(32, CHANNELS, 1, 2, bias=False), nn.BatchNorm2d(CHANNELS))
    blocks = [
        host(32, planes, 2, downsample),
        MoDBlock(CHANNELS, narrow(K), K, reduction=2, position=position, overwrite_input=True),
        host(CHANNELS, planes),
        MoDBlock(CHANNELS, narrow(K), K, reduction=2, position=position),
    ]
    for block in blocks[1::2]:
        nn.init.normal_(block.selector.fc1.weight, std=0.5)  # logits far apart: both sides select the same
    stage = MoDStage(*blocks).to(dtype)
    twin = copy.deepcopy(list(stage))
    return stage, nn.Sequential(twin[0], PlainBlock(twin[1], "cat"), twin[2], PlainBlock(twin[3], "cat"))


def gradients(module, x, dy):
    """y, then the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, [x, *module.parameters()], dy)


def count_calls(engine, monkeypatch):
    """A Counter of the engine's raw ops by name, until the test ends."""
    counts = Counter()

    def counting(name, op):
        def call(*arguments):
            counts[name] += 1
            return op(*arguments)

        return call

    monkeypatch.setattr(engine, "ops", {name: counting(name, op) for name, op in engine.ops.items()})
    return counts
