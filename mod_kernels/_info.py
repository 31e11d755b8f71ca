"""What is here: versions, engines, and why an engine is not available."""

from __future__ import annotations

from typing import Any

import torch

from . import backends


def info() -> dict[str, Any]:
    """Versions and what each engine says of itself."""
    return {"torch": torch.__version__, "backends": backends.engines()}
