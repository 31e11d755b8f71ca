"""An engine made of the reference, in any dtype: it lets float64 gradcheck go through the engine path.

The reference has no Function of its own, and the compiled engines may not be there. With this engine in front, the
wrappers, the autograd Functions and the raw-op contract run in float64 anywhere.
"""

import torch

from mod_kernels import _library, reference
from mod_kernels.backends import Engine, Support

_library_object = _library.define("mod_kernels_oracle", list(_library.OPS))


def _select_channels(*arguments):
    return _select_channels_saving(*arguments)[:2]


def _select_channels_saving(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    dtype = _library.accumulation_dtype(x.dtype)
    mean = x.mean((2, 3), dtype=dtype) if pooled is None else pooled
    hidden = torch.nn.functional.linear(
        mean, fc1_weight.to(dtype), None if fc1_bias is None else fc1_bias.to(dtype)
    )
    logits = reference.selector_logits(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled)
    index = reference.rank_channels(logits, k)
    scores = logits.gather(1, index).sigmoid()
    return scores, index, logits, hidden.relu(), mean if pooled is None else mean.new_empty(0)


def _gather_channels(x, index):
    return reference.gather_channels(x, index)


def _fuse_channels(x, z, scores, index, position):
    return reference.fuse_channels(x, z, scores, index, position)


def _fuse_channels_(x, z, scores, index, position):
    reference.fuse_channels_(x, z, scores, index, position)


def _add_relu_pool(a, b, relu):
    return reference.add_relu_pool(a, b, relu)


def _add_relu_pool_(a, b, relu):
    return reference.add_relu_pool_(a, b, relu)[1]


class OracleEngine(Engine):
    name = "oracle"

    def __init__(self):
        kernels = (
            _select_channels,
            _select_channels_saving,
            _gather_channels,
            _fuse_channels,
            _fuse_channels_,
            _add_relu_pool,
            _add_relu_pool_,
        )
        self.ops = {}
        for kernel in kernels:
            name = kernel.__name__.removeprefix("_")
            _library_object.impl(name, kernel, "CPU")
            self.ops[name] = getattr(torch.ops.mod_kernels_oracle, name).default

    def supports(self, call):
        return Support(True) if call.op in self.ops else Support(False, f"op {call.op} is not served")

    def describe(self):
        return {"status": "ok"}


ORACLE = OracleEngine()
