"""The ordinary path to compare with, and a change of the weights."""

import copy

import torch

from mod_kernels import MoDBlock


def ordinary(block, x):
    """What an unaccelerated block with the same parts and state gives."""
    twin = copy.deepcopy(block)
    for module in twin.modules():
        if isinstance(module, MoDBlock):
            module._fused = None
            module.overwrite_input = False
    with torch.no_grad():
        return twin(x.clone())


def in_place(block):
    with torch.no_grad():
        block.conv_block.conv2.weight.mul_(2)
