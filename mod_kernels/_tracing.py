"""What kind of tracing is going on."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether ``torch.export`` is tracing (strict or not).

    ``torch.compiler.is_exporting()``, but right under ``torch.compile`` too: torch 2.11's Dynamo takes that
    function for True wherever it traces it.
    """
    return torch.compiler._is_exporting_flag
