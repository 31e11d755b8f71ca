"""An ending and the MoD block after it as one op, for :class:`mod_kernels.nn.MoDStage`; inference only.

An engine that sees both can begin the selector where the ending pools. It is no public op: only a stage knows that
nothing else reads what lies between the two.
"""

from __future__ import annotations

from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from . import _autograd, _checks, backends
from ._remembered import facts, recall, remember
from .backends import Call
from .functional import block_call, in_layout_of, written
from .spec import MoDSpec

OP = "add_relu_mod_block_"


def may_be_served(device: str) -> bool:
    """Whether an engine that would be asked has the op at all: to be asked before anything is prepared for it."""
    return backends.may_serve(OP, device)


def _call(a: Tensor, b: Tensor | None, spec: MoDSpec) -> Call:
    call = block_call(a, spec, op=OP)
    _checks.residual(a, b)
    _checks.writable("a", a, call.layout)
    if _autograd.needed(b):
        raise RuntimeError(f"{OP} has no gradients, and b needs one")
    return call


def add_relu_mod_block_(a: Tensor, b: Tensor | None, relu: bool, spec: MoDSpec) -> Tensor | None:
    """``mod_block_(relu(a + b))``, both into a, which is returned; None, and nothing written, if not served.

    Args:
        a: (N, C, H, W), dense, which nothing else reads.
        b: like a, or None for no addition.
        relu: whether to apply the ReLU.
        spec: of the block.

    Raises:
        ValueError, TypeError: as :func:`mod_kernels.functional.add_relu_pool_` and ``mod_block_`` do.
        RuntimeError: a gradient would be needed; this op has none.
    """
    key = None if is_compiling() else (OP, facts(a), b is None or facts(b), relu, spec.token)
    op = key and recall(key)
    if not op or (is_grad_enabled() and _autograd.needed(a, b, *spec.tensors)):
        engine = backends.offered(_call(a, b, spec))
        if engine is None:
            return None
        op, given = engine.ops[OP], b
        b = in_layout_of(a, b)
        remember(key, op, (given,), (b,))
    _checks.apart("a", a, "b", b, alike=True)
    op(a, b, relu, *spec.selector_arguments, spec.k, *spec.conv_arguments)
    return written(a)
