"""Fused kernels for CNN Mixture-of-Depths (arXiv 2409.17016).

Importing this package touches no GPU and needs neither Triton nor the compiled library.
"""

from . import functional, reference
from ._info import info
from .backends import use_backend
from .functional import MoDSpec, explain

__version__ = "0.1.0"
