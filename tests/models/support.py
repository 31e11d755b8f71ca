"""What the networks' tests count."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def rounded(count, printed):
    """A count in millions, with as many decimals as the paper printed."""
    return f"{count / 1e6:.{len(printed.split('.')[1])}f}"


def multiply_adds(model, size):
    """Of one image: those of matrix products and convolutions; then with the elements of norms and activations.

    The second adds two operations an element of a batch norm and one an element of an activation or a pooling's
    input, counted as multiply-adds, as counters that go by modules do.
    """
    elements = []

    def record(operations):
        return lambda module, arguments, output: elements.append(operations * arguments[0].numel())

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(record(2)))
        elif isinstance(module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            hooks.append(module.register_forward_hook(record(1)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.randn(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    products = counter.get_total_flops() / 2
    return products, products + sum(elements)
