"""Whether a module may be run in parts instead of being called."""

from __future__ import annotations

from torch import nn


def is_untouched(module: nn.Module) -> bool:
    """No hooks that would be skipped or would see other arguments, and the class's own forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
    )
