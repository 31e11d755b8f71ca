"""Inputs of the numerics check: the cases, and fresh random tensors for each.

Sizes include the odd ones on purpose: H*W = 49, 1 and 35, C no multiple of 16, k = 1 and k = C, N = 0, 1, 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .spec import CONV_KINDS, POSITIONS, MoDSpec


@dataclass(frozen=True)
class Case:
    """One shape, x (n, c, h, w), with the selector's width r and what is special about it.

    values: ``"random"``; ``"tied"``: every unit of the selector's hidden layer is dead, all logits are equal;
    ``"nan"``: one sample holds a NaN, another an infinity.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    bias: bool = False
    float32_weights: bool = False
    final_relu: bool = False
    values: str = "random"
    positions: tuple[str, ...] = POSITIONS

    def __str__(self) -> str:
        special = "" if self.values == "random" else f" {self.values}"
        return f"{self.n}x{self.c}x{self.h}x{self.w} k={self.k}{special}"


_SMALL = (
    Case(2, 64, 14, 14, 4, 8),
    Case(3, 40, 7, 7, 5, 3, bias=True, float32_weights=True),
    Case(1, 32, 5, 7, 32, 4, final_relu=True),
    Case(3, 24, 1, 1, 1, 3, bias=True),
    Case(0, 64, 7, 7, 4, 4),
)
# The paper's blocks, at its position: the sizes that fill a kernel's tiles.
_PAPER = (
    Case(2, 256, 56, 56, 4, 16, positions=("first",)),
    Case(1, 512, 28, 28, 8, 32, bias=True, float32_weights=True, positions=("first",)),
    Case(2, 1024, 14, 14, 16, 64, final_relu=True, positions=("first",)),
    Case(2, 2048, 7, 7, 32, 128, positions=("first",)),
)
# Selection only: what no tolerance can judge.
_SPECIAL = (Case(3, 64, 7, 7, 4, 8, values="tied"), Case(3, 64, 7, 7, 4, 8, values="nan"))


def cases(quick: bool, interpreted: bool, layout: str) -> tuple[Case, ...]:
    """The shapes to check; under Triton's interpreter only what takes few programs (some ms each)."""
    if interpreted:
        small = (_SMALL[1], replace(_SMALL[0], h=5, w=7), replace(_SMALL[3], n=1), _SMALL[4])
        small = tuple(replace(case, positions=(POSITIONS[i % 3],)) for i, case in enumerate(small))
        return small[:2] if quick else small
    return _SMALL if quick or layout == "sliced" else _SMALL + _PAPER


def special_cases(interpreted: bool) -> tuple[Case, ...]:
    """Cases for ``select_channels`` alone."""
    return tuple(replace(case, n=2) for case in _SPECIAL) if interpreted else _SPECIAL


class Inputs:
    """Random tensors for one case, drawn on the CPU (the same everywhere for a seed), then moved."""

    def __init__(self, case: Case, dtype: torch.dtype, layout: str, device: str, seed: int) -> None:
        self.case, self.dtype, self.layout, self.device = case, dtype, layout, device
        self._generator = torch.Generator().manual_seed(seed)
        self.weight_dtype = dtype if dtype == torch.float64 or not case.float32_weights else torch.float32
        # The ops of a case share one x and one block: drawing them costs more than the small ops do.
        self._values, self._specs = self._draw(), {kind: self._spec(kind) for kind in CONV_KINDS}

    def feature_map(self) -> Tensor:
        """x (N, C, H, W) in the case's layout; ``"sliced"`` is NCHW, every second sample of a larger tensor.

        The same values at each call, in memory of its own.
        """
        return self._laid_out(self._values.clone(), self.layout)

    def residual(self) -> Tensor:
        """Another feature map in the same layout, with other values."""
        return self._laid_out(self._values.flip(1), self.layout)

    def _draw(self) -> Tensor:
        case = self.case
        x = self._randn(case.n, case.c, case.h, case.w)
        if case.values == "tied":
            x = x.abs()
        if case.values == "nan":
            x[0, 3, 0, 0] = float("nan")
            x[-1, 5, -1, -1] = float("inf")
        return x.to(self.dtype).to(self.device)

    def with_specials(self, x: Tensor, channels: Tensor) -> Tensor:
        """x with a NaN, an infinity, -0.0 and a subnormal in each of ``channels`` (N, any number)."""
        special = torch.tensor(
            [float("nan"), float("inf"), -0.0, torch.finfo(x.dtype).tiny / 4], dtype=x.dtype, device=x.device
        )
        flat = x.clone(memory_format=torch.contiguous_format).flatten(2)
        width = min(flat.shape[2], 4)
        index = channels[:, :, None].expand(-1, -1, width)
        flat.scatter_(1, index, special[:width].expand(index.shape))
        return x.copy_(flat.reshape(x.shape))

    def branch(self, other_layout: bool) -> Tensor:
        """z (N, k, H, W), in x's layout or in the other one."""
        case = self.case
        dense = "channels_last" if (self.layout == "channels_last") != other_layout else "nchw"
        return self._laid_out(self._randn(case.n, case.k, case.h, case.w).to(self.dtype).to(self.device), dense)

    def scores(self) -> Tensor:
        """(N, k), as a sigmoid gives them."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.sigmoid(self._randn(self.case.n, self.case.k)).to(dtype).to(self.device)

    def index(self) -> Tensor:
        """(N, k) int64, unique in each row, in no order."""
        rows = [torch.randperm(self.case.c, generator=self._generator) for _ in range(self.case.n)]
        index = torch.stack(rows)[:, : self.case.k] if rows else torch.empty((0, self.case.k), dtype=torch.int64)
        return index.contiguous().to(self.device)

    def pooled(self) -> Tensor:
        """(N, C) in the accumulation dtype."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self._randn(self.case.n, self.case.c).to(dtype).to(self.device)

    def spec(self, kind: str, position: str) -> MoDSpec:
        """A block whose branch is as large as x, so that an error in it shows."""
        return replace(self._specs[kind], position=position)

    def _spec(self, kind: str) -> MoDSpec:
        case = self.case
        fc1, fc2 = self._randn(case.r, case.c), self._randn(case.c, case.r)
        if case.values == "tied":
            fc1 = -fc1.abs()
        shapes = CONV_KINDS[kind].shapes(CONV_KINDS[kind].host_mid(case.k), case.k)
        weights = [self._randn(*shape) * (2.0 / shape[1] / shape[2] ** 2) ** 0.5 for shape in shapes]
        biases = [self._randn(shape[0]) * 0.2 for shape in shapes]
        return MoDSpec(
            fc1_weight=self._weight(fc1),
            fc2_weight=self._weight(fc2),
            fc1_bias=self._weight(self._randn(case.r)) if case.bias else None,
            fc2_bias=self._weight(self._randn(case.c)) if case.bias else None,
            k=case.k,
            kind=kind,
            conv_weights=tuple(map(self._weight, weights)),
            conv_biases=tuple(map(self._weight, biases)),
            final_relu=case.final_relu,
        )

    def _weight(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.weight_dtype).to(self.device)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self._generator, dtype=torch.float64 if self.dtype == torch.float64 else torch.float32
        )

    def _laid_out(self, x: Tensor, layout: str) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            wide = x.repeat_interleave(2, dim=0)
            return wide[::2]
        return x


def spec_in_float64(spec: MoDSpec) -> MoDSpec:
    """The same block with float64 tensors: the oracle's."""

    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return replace(
        spec,
        fc1_weight=spec.fc1_weight.double(),
        fc2_weight=spec.fc2_weight.double(),
        fc1_bias=double(spec.fc1_bias),
        fc2_bias=double(spec.fc2_bias),
        conv_weights=tuple(weight.double() for weight in spec.conv_weights),
        conv_biases=tuple(bias.double() for bias in spec.conv_biases),
    )
