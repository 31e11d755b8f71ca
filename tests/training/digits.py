"""A small ResNet-MoD and scikit-learn's digits to train it on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock

from mod_kernels import MoDBlock, use_backend
from mod_kernels.nn import MoDStage, NarrowBasicBlock

WIDTHS, C_RATIO, BATCH = (32, 64), 4, 64


class DigitsNet(nn.Module):
    """A CIFAR stem and two stages of a standard and a MoD block each, on images of 8x8."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]))
        self.stages, before = nn.ModuleList(), WIDTHS[0]
        for number, width in enumerate(WIDTHS):
            downsample = None
            if number:
                downsample = nn.Sequential(nn.Conv2d(before, width, 1, 2, bias=False), nn.BatchNorm2d(width))
            standard = BasicBlock(before, width, 2 if number else 1, downsample)
            k = width // C_RATIO
            self.stages.append(MoDStage(standard, MoDBlock(width, NarrowBasicBlock(k), k, overwrite_input=True)))
            before = width
        self.fc = nn.Linear(before, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))

    def selectors(self):
        return [stage[1].selector for stage in self.stages]


def digits():
    """Training and held-out images, (N, 1, 8, 8) in 0 to 1, and labels; 1400 and 397 of 1797."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(net, digits, backend, steps, batch_size=BATCH, lr=0.1):
    """Losses of every step, held-out accuracy in percent, and how often each channel was selected."""
    images, labels, held_out, held_out_labels = digits
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr)
    draw = torch.Generator().manual_seed(1)
    losses, counts = [], [torch.zeros(s.channels, dtype=torch.long) for s in net.selectors()]
    with use_backend(backend):
        net.train()
        for _ in range(steps):
            batch = torch.randint(len(images), (batch_size,), generator=draw)
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        net.eval()
        with torch.no_grad():
            x = F.relu(net.stem(held_out))
            for stage, count in zip(net.stages, counts, strict=True):
                _, index = stage[1].selector(stage[0](x))
                count += torch.bincount(index.flatten(), minlength=len(count))
                x = stage(x)
            accuracy = 100 * (net(held_out).argmax(1) == held_out_labels).float().mean().item()
    return losses, accuracy, counts
