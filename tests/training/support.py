"""Blocks and stages in training, and the plain form that their gradients are held to."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mod_kernels import MoDBlock, plain
from mod_kernels.nn import MoDStage, NarrowBasicBlock, NarrowBottleneck

CHANNELS, K = 64, 8


class PlainBlock(nn.Module):
    """A MoDBlock's parameters in the paper's own form, with nothing of this package's kernels."""

    def __init__(self, block: MoDBlock, ending: str = "cat") -> None:
        super().__init__()
        self.block, self.ending = block, ending

    def forward(self, x):
        block, selector = self.block, self.block.selector
        arguments = (selector.fc1.weight, selector.fc2.weight, block.k, block.conv_block)
        biases = (selector.fc1.bias, selector.fc2.bias)
        return plain.mod_block(x, *arguments, *biases, None, block.position, ending=self.ending)


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
    return stage, nn.Sequential(twin[0], PlainBlock(twin[1]), twin[2], PlainBlock(twin[3]))


def gradients(module, x, dy):
    """y, then the gradients of x and of every parameter."""
    x = x.detach().requires_grad_()
    y = module(x)
    return y.detach(), torch.autograd.grad(y, [x, *module.parameters()], dy)
