"""MoD blocks as different people would write them from the paper, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

C, K = 48, 6


def conv_bn(inputs, outputs, kernel, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Bottleneck(nn.Module):
    def __init__(self, k=K):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(k, k // 2, 1)
        self.conv2, self.bn2 = conv_bn(k // 2, k // 2, 3)
        self.conv3, self.bn3 = conv_bn(k // 2, k, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class LinearsGatherClone(nn.Module):
    """Two Linears called from forward, torch.gather, a clone and an addition to a slice."""

    def __init__(self, c=C, k=K):
        super().__init__()
        self.k = k
        self.fc1, self.fc2 = nn.Linear(c, c // 8, bias=False), nn.Linear(c // 8, c, bias=False)
        self.conv_block = Bottleneck(k)

    def pool(self, x):
        return x.mean(dim=(2, 3))

    def choose(self, x):
        weights = torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)))))
        return torch.topk(weights, self.k, dim=1)

    def ending(self, x, z, values, index):
        out = x.clone()
        out[:, : self.k] += z * values[:, :, None, None]
        return out

    def forward(self, x):
        values, index = self.choose(x)
        chosen = torch.gather(x, 1, index[:, :, None, None].expand(-1, -1, x.size(2), x.size(3)))
        return self.ending(x, self.conv_block(chosen), values, index)


class SequentialOf1x1Cat(nn.Module):
    """A Sequential of 1x1 convolutions as the selector, advanced indexing, cat; the last conv registered first."""

    def __init__(self, c=C, k=K):
        super().__init__()
        self.k = k
        self.conv_b, self.norm_b = conv_bn(k, k, 3)
        self.conv_a, self.norm_a = conv_bn(k, k, 3)
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c, c // 4, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c // 4, c, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        scores, index = self.attention(x).flatten(1).topk(self.k, 1)
        z = x[torch.arange(len(x), device=x.device).unsqueeze(1), index]
        z = self.norm_b(self.conv_b(torch.relu(self.norm_a(self.conv_a(z)))))
        head, tail = x[:, : self.k], x[:, self.k :]
        return torch.cat([head + scores.view(len(x), self.k, 1, 1) * z, tail], 1)


class SequentialInPlaceLast(nn.Module):
    """A Sequential of Linears, top-k on the logits, index_select in a loop, in place, the last k; a bias."""

    def __init__(self, c=C, k=K):
        super().__init__()
        self.k = k
        self.selector = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c))
        self.block = nn.Sequential(*conv_bn(k, k, 3), nn.ReLU(inplace=True))

    def forward(self, x):
        logits = self.selector(F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1))
        best, index = torch.topk(logits, self.k)
        chosen = torch.stack([sample.index_select(0, which) for sample, which in zip(x, index, strict=True)])
        x[:, -self.k :] += torch.sigmoid(best)[..., None, None] * self.block(chosen)
        return x


class SelectorModuleScatter(nn.Module):
    """A selector of its own, sort, added where the channels came from; MobileNetV2's block."""

    class Selector(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.pool = nn.AdaptiveAvgPool2d((1, 1))
            self.down, self.up = nn.Conv2d(c, c // 4, 1, bias=False), nn.Conv2d(c // 4, c, 1, bias=False)

        def forward(self, x):
            return self.up(F.relu(self.down(self.pool(x)))).sigmoid()[:, :, 0, 0]

    def __init__(self, c=C, k=K, expand=4):
        super().__init__()
        self.k = k
        self.selector = self.Selector(c)
        self.layers = nn.Sequential(
            *conv_bn(k, expand * k, 1),
            nn.ReLU6(inplace=True),
            *conv_bn(expand * k, expand * k, 3, groups=expand * k),
            nn.ReLU6(inplace=True),
            *conv_bn(expand * k, k, 1),
        )

    def forward(self, x):
        ranked, order = self.selector(x).sort(dim=1, descending=True)
        index = order[:, : self.k, None, None].expand(-1, -1, *x.shape[2:])
        return x.scatter_add(1, index, ranked[:, : self.k, None, None] * self.layers(x.gather(1, index)))


class ConvNeXtBlock(nn.Module):
    """ConvNeXt's block at k channels, Linears inside and out."""

    def __init__(self, c=C, k=K):
        super().__init__()
        self.k = k
        self.gamma = nn.Parameter(1e-6 * torch.ones(k))
        self.depthwise = nn.Conv2d(k, k, 7, padding=3, groups=k)
        self.norm = nn.LayerNorm(k, eps=1e-6)
        self.up, self.down = nn.Linear(k, 4 * k), nn.Linear(4 * k, k)
        self.squeeze, self.excite = nn.Linear(c, c // 16), nn.Linear(c // 16, c)

    def forward(self, x):
        scores = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.flatten(2).mean(-1)))))
        scores, index = scores.topk(self.k)
        z = torch.take_along_dim(x, index[..., None, None], 1)
        z = self.norm(self.depthwise(z).permute(0, 2, 3, 1))
        z = (self.gamma * self.down(F.gelu(self.up(z)))).permute(0, 3, 1, 2)
        return torch.cat((x[:, : self.k] + z * scores[..., None, None], x[:, self.k :]), 1)


STYLES = [
    LinearsGatherClone,
    SequentialOf1x1Cat,
    SequentialInPlaceLast,
    SelectorModuleScatter,
    ConvNeXtBlock,
]


def randomised(block):
    """With weights and statistics that are not trivial, in eval mode."""
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.ndim > 1:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith("weight") else tensor.normal_(0, 0.3)
    return block.eval()


def feature_map(c=C, dtype=torch.float32):
    """Planes with means of the order of one."""
    return (torch.randn(4, c, 1, 1) + torch.randn(4, c, 7, 5)).to(dtype)
