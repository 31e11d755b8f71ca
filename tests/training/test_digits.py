"""Real data: a small ResNet-MoD on scikit-learn's digits, trained with the reference and with each engine."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torchvision.models.resnet import BasicBlock

from mod_kernels import MoDBlock, use_backend
from mod_kernels.backends.native import CPU
from mod_kernels.nn import MoDStage, NarrowBasicBlock

WIDTHS, C_RATIO, BATCH, STEPS = (32, 64), 4, 64, 120


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


@pytest.fixture(scope="module")
def digits():
    """Training and held-out images, (N, 1, 8, 8) in 0 to 1, and labels; 1400 and 397 of 1797."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(data.target)[order]
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def train(net, digits, backend, steps):
    """Losses of every step, held-out accuracy in percent, and how often each channel was selected."""
    images, labels, held_out, held_out_labels = digits
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    draw = torch.Generator().manual_seed(1)
    losses, counts = [], [torch.zeros(s.channels, dtype=torch.long) for s in net.selectors()]
    with use_backend(backend):
        net.train()
        for _ in range(steps):
            batch = torch.randint(len(images), (BATCH,), generator=draw)
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def by_reference(digits):
    torch.manual_seed(3)
    net = DigitsNet()
    start = copy.deepcopy(net)
    return start, net, *train(net, digits, "reference", STEPS)


@pytest.mark.skipif(CPU.library is None, reason="; ".join(CPU.problems))
def test_the_cpu_engine_trains_like_the_reference(digits, by_reference):
    start, _, expected, expected_accuracy, _ = by_reference
    losses, accuracy, _ = train(copy.deepcopy(start), digits, "cpu", STEPS)
    for step in range(20):
        assert abs(losses[step] / expected[step] - 1) < 1e-3, step
    assert min(accuracy, expected_accuracy) > 95
    assert abs(accuracy - expected_accuracy) < 1.5


def test_the_selector_learns(digits, by_reference):
    """Its weights move; and frozen, other channels are selected."""
    start, net, _, _, counts = by_reference
    for before, after in zip(start.selectors(), net.selectors(), strict=True):
        for name, weight in before.named_parameters():
            moved = (after.get_parameter(name) - weight).norm() / weight.norm()
            assert moved > 1e-3, name
    frozen = copy.deepcopy(start)
    for selector in frozen.selectors():
        selector.requires_grad_(False)
    _, _, other = train(frozen, digits, "auto", STEPS)
    for before, after in zip(start.selectors(), frozen.selectors(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert any((a - b).abs().sum() > 0.05 * a.sum() for a, b in zip(counts, other, strict=True))
