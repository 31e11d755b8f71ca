"""The channel selector: pool, two linear layers, sigmoid, top k."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks, functional


class ChannelSelector(nn.Module):
    """Scores the channels of a feature map and takes the k best of each sample.

    The two layers are held as ``fc1`` (R, C) and ``fc2`` (C, R), R = max(1, channels // reduction), but never
    called as modules: their weights go to :func:`mod_kernels.functional.select_channels`, so forward hooks on
    them do not fire (hooks on the selector do).

    Args:
        channels: C.
        k: channels to select, 1 <= k <= C.
        reduction: C over the hidden width (16 in the paper).
        bias: biases on both layers; the paper has none.
    """

    def __init__(self, channels: int, k: int, reduction: int = 16, bias: bool = False) -> None:
        super().__init__()
        _checks.k_channels(k, channels)
        if reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {reduction}")
        hidden = max(1, channels // reduction)
        self.channels, self.k = channels, k
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    def forward(self, x: Tensor, pooled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores (N, k) and index (N, k) int64 for x (N, C, H, W); with ``pooled`` (N, C) x is not read."""
        fc1_weight, fc2_weight, fc1_bias, fc2_bias = self.parts()
        return functional.select_channels(x, fc1_weight, fc2_weight, self.k, fc1_bias, fc2_bias, pooled)

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """fc1's weight, fc2's weight, and their biases."""
        return self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias

    def extra_repr(self) -> str:
        return f"channels={self.channels}, k={self.k}"
