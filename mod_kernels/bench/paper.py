"""What arXiv 2409.17016 prints of its networks (Tables 1, 2, 7 and 9) and of the choice of k (Table 10).

Times there are of an i7-10850H and a Quadro RTX 3000, batch and dtype not stated. Where it prints nothing, None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Data:
    """What a network was trained and timed on: the images' size, and how the network is built for them."""

    name: str
    size: int
    options: dict[str, Any] = field(default_factory=dict)


IMAGENET = Data("ImageNet", 224)
CIFAR10 = Data("CIFAR-10", 32, {"stem": "cifar", "num_classes": 10})


@dataclass(frozen=True)
class Printed:
    """A network's row: top-1 in percent, millions of parameters, 10^9 multiply-adds, ms; speed-ups over its dense
    peer."""

    top1: float | None
    gmac: float
    parameters_m: float
    cpu_ms: float | None
    gpu_ms: float | None
    cpu_speedup: float | None = None
    gpu_speedup: float | None = None

    def speedup(self, device: str) -> float | None:
        """On ``"cpu"`` or ``"cuda"``."""
        return self.gpu_speedup if device == "cuda" else self.cpu_speedup


# By the names that torchvision has. Parameters of ResNet18 and ResNet34 are printed without their last layer's.
DENSE = {
    "resnet18": Printed(70.37, 1.82, 11.18, 53.86, 0.75),
    "resnet34": Printed(73.92, 3.68, 21.29, 98.83, 1.27),
    "resnet50": Printed(76.25, 4.13, 25.56, 160.66, 2.52),
    "resnet101": Printed(77.81, 7.80, 44.55, 251.05, 4.28),
    "mobilenet_v2": Printed(71.63, 0.320, 3.5, 47.76, 0.78),
    "vgg16_bn": Printed(None, 0.315, 15.25, None, 0.14),
    "vgg19_bn": Printed(None, 0.400, 20.57, None, 0.18),
}
# By the names of mod_kernels.models, whose PEERS name the dense network of each.
MOD = {
    "resnet18_mod": Printed(64.05, 0.89, 5.46, 33.63, 0.47, 1.60, 1.58),
    "resnet26_mod": Printed(69.53, 1.36, 11.4, 42.16, 0.58, 1.28, 1.28),
    "resnet34_mod": Printed(71.44, 2.06, 12.93, 60.79, 0.83, 1.63, 1.53),
    "resnet42_mod": Printed(72.03, 2.29, 17.72, 64.01, 0.88, 1.54, 1.45),
    "resnet50_mod": Printed(74.79, 2.60, 18.11, 108.74, 1.75, 1.48, 1.44),
    "resnet75_mod": Printed(76.27, 3.48, 23.10, 128.90, 2.19, 1.25, 1.15),
    "resnet86_mod": Printed(76.72, 3.92, 25.60, 150.96, 2.40, 1.06, 1.05),
    "resnet101_mod": Printed(77.08, 4.58, 29.21, 162.03, 2.73, 1.55, 1.57),
    "resnet152_mod": Printed(77.81, 6.34, 37.46, 208.80, 3.82, 1.20, 1.12),
    "mobilenet_v2_mod": Printed(69.34, 0.221, 2.94, 33.43, 0.56, 1.43, 1.39),
    "mobilenet_v2_mod_l": Printed(71.55, 0.345, 3.34, 42.94, 0.71, 1.11, 1.10),
    "vgg16_bn_mod": Printed(None, 0.155, 9.83, None, 0.16, None, 0.87),
    "vgg19_bn_mod": Printed(None, 0.155, 9.91, None, 0.22, None, 0.81),
}


def data_of(name: str) -> Data:
    """What the paper has the MoD network ``name`` on."""
    return CIFAR10 if name.startswith("vgg") else IMAGENET


@dataclass(frozen=True)
class PrintedAtC:
    """ResNet50-MoD with k = C // c: top-1 in percent, ms on the GPU."""

    top1: float
    gpu_ms: float


RESNET50_MOD_AT_C = {
    2: PrintedAtC(72.51, 2.23),
    4: PrintedAtC(73.74, 1.99),
    8: PrintedAtC(74.43, 1.90),
    16: PrintedAtC(74.74, 1.97),
    32: PrintedAtC(74.68, 1.83),
    64: PrintedAtC(74.79, 1.75),
}
