"""Whether autocast is on for a device, and leaving it. PyTorch's own question raises for a meta tensor's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def is_on(device: str) -> bool:
    """``device``: its type, as in ``"cuda"``."""
    return device != "meta" and torch.is_autocast_enabled(device)


def outside(device: str) -> AbstractContextManager:
    """Ends autocast where there is one; nothing elsewhere, as torch.export would keep it in its graph."""
    return torch.autocast(device, enabled=False) if is_on(device) else nullcontext()
