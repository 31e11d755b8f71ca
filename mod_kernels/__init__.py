"""Fused kernels for CNN Mixture-of-Depths (arXiv 2409.17016).

Importing this package touches no GPU and needs neither Triton nor the compiled library.
"""

from importlib import import_module
from types import ModuleType

from . import functional, reference
from ._info import info
from ._tracing import export_mode
from .accelerate import accelerate
from .backends import use_backend
from .convert import convert
from .foreign import register_mod_block
from .functional import MoDSpec, explain
from .nn import ChannelSelector, MoDBlock
from .optimize import optimize_for_inference

__all__ = [
    "ChannelSelector",
    "MoDBlock",
    "MoDSpec",
    "accelerate",
    "convert",
    "explain",
    "export_mode",
    "functional",
    "info",
    "optimize_for_inference",
    "reference",
    "register_mod_block",
    "use_backend",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    if name == "models":  # torchvision takes a second to import: only where it is asked for
        return import_module(".models", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
