"""The CUDA kernels as raw ops on CPU tensors.

Each call is a case for the program of tests/cuda_host, which runs it in forward, reversed and shuffled order and
answers with the result they agree on.
"""

from __future__ import annotations

import math
import subprocess

import torch

from mod_kernels._layout import layout_of, memory_format_of
from mod_kernels.spec import CONV_KINDS, POSITIONS, read_form

from .cuda_host_program import ENVIRONMENT

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # csrc/common/dtype.h
SEEDS = 20
# The cards that the plans are for, by their clusters: an H100, and an A100.
DEVICES = {
    True: {"capability": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024, "max_cluster": 8},
    False: {"capability": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024, "max_cluster": 1},
}


def extent(tensor):
    """From a tensor's first element to its last, what lies between included, as a vector; none of an empty one."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


class Program:
    """A running program. Calls come one at a time; a kernel that a sanitizer ends takes it down with it."""

    def __init__(self, path, log):
        self.path, self.log = path, log
        self.process = None

    def call(self, op, numbers, tensors):
        """One case. tensors: ``(name, role, tensor)``, the bytes of "inout" and "out" are written back to theirs.

        Raises:
            RuntimeError: what the program, the machine or a sanitizer says.
        """
        self._begin()
        message = [f"{op} {len(numbers)} {len(tensors)}\n".encode()]
        message += [f"{name} {int(value)}\n".encode() for name, value in numbers.items()]
        returned = []
        for name, role, tensor in tensors:
            flat = extent(tensor)
            size = flat.numel() * flat.element_size()
            lead = flat.storage_offset() * flat.element_size() % 128 if size else 0
            message.append(f"{name} {role} {lead} {size}\n".encode())
            if role in ("in", "inout"):
                message.append(_bytes(flat))
            if role in ("inout", "out"):
                returned.append((flat, size))
        try:
            self.process.stdin.write(b"".join(message))
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline().decode()
        if answer != "ok\n":
            raise RuntimeError(answer.removeprefix("error ").rstrip() or self._last_words())
        for flat, size in returned:
            data = bytearray(self.process.stdout.read(size))
            if size:
                flat.copy_(torch.frombuffer(data, dtype=flat.dtype))

    def _begin(self):
        if self.process is not None and self.process.poll() is None:
            return
        self.log.write_text("")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [self.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=ENVIRONMENT
            )

    def _last_words(self):
        self.process.wait()
        words = self.log.read_text()
        self.end()
        lines = [line for line in words.splitlines() if "ERROR: " in line or "runtime error: " in line]
        return (lines or ["the program ended"])[0] + "\n" + words

    def end(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None


def _bytes(flat):
    return bytes(flat.contiguous().view(torch.uint8).numpy()) if flat.numel() else b""


def _is_channels_last(x):
    return layout_of(x) == "channels_last"


def _stride_n(x):
    return x.stride(0) if x.shape[0] > 1 else x[0].numel() if x.shape[0] else 0


class Ops:
    """The raw ops of mod_kernels/_library.py, called as there.

    clusters: as on sm_90 and newer, or not. seeds: shuffled orders beside forward and reversed.
    """

    def __init__(self, program, clusters, seeds=SEEDS, **device):
        self.program, self.clusters, self.seeds = program, clusters, seeds
        self.device = {**DEVICES[clusters], **device}
        self.ops = {
            name: getattr(self, name)
            for name in (
                "gather_channels",
                "fuse_channels",
                "fuse_channels_",
                "add_relu_pool",
                "add_relu_pool_",
                "input_gradient",
                "select_channels",
                "select_channels_saving",
                "mod_block",
                "mod_block_",
            )
        }

    def gather_channels(self, x, index):
        out = self._like(x, index.shape[1])
        numbers = {**self._map(x), "k": index.shape[1]}
        self._call("gather_channels", numbers, maps={"x": ("in", x), "out": ("out", out)}, index=("in", index))
        return out

    def fuse_channels(self, x, z, scores, index, position):
        y = self._like(x)
        self._fuse(x, z, scores, index, position, {"x": ("in", x), "y": ("out", y)})
        return y

    def fuse_channels_(self, x, z, scores, index, position):
        self._fuse(x, z, scores, index, position, {"x": ("inout", x)})

    def _fuse(self, x, z, scores, index, position, maps):
        k = z.shape[1]
        numbers = {**self._map(x), "k": k, "first": x.shape[1] - k if position == "last" else 0}
        others = {"index": ("in", index)} if position == "original" else {}
        maps["z"] = ("in", z)
        self._call("fuse_channels", numbers, maps=maps, scores=("in", scores), **others)

    def add_relu_pool(self, a, b, relu):
        y = self._like(a)
        return y, self._pool(b, relu, {"a": ("in", a), "y": ("out", y)})

    def add_relu_pool_(self, a, b, relu):
        return self._pool(b, relu, {"a": ("inout", a)})

    def _pool(self, b, relu, maps):
        a = maps["a"][1]
        if b is not None:
            maps["b"] = ("in", b)
        pooled = torch.full(a.shape[:2], math.nan)
        numbers = {**self._map(a), "relu": relu, "max_cluster": self.device["max_cluster"]}
        self._call("add_relu_pool", numbers, maps=maps, pooled=("out", pooled))
        return pooled

    def input_gradient(self, dy, dpooled, dgathered, index, y, overwritten, position):
        dx = self._like(dy)
        k = 0 if index is None else index.shape[1]
        overwritten_k = 0 if overwritten is None else overwritten.shape[1]
        first = dy.shape[1] - overwritten_k if position == "last" else 0
        numbers = {
            **self._map(dy),
            "k": k,
            "overwritten_k": overwritten_k,
            "first": first,
            "original": position == "original",
        }
        given = {"dy": dy, "dgathered": dgathered, "y": y, "overwritten": overwritten}
        maps = {name: ("in", tensor) for name, tensor in given.items() if tensor is not None}
        maps["dx"] = ("out", dx)
        rest = {"dpooled": dpooled, "index": index}
        rest = {name: ("in", tensor) for name, tensor in rest.items() if tensor is not None}
        self._call("input_gradient", numbers, maps=maps, **rest)
        return dx

    def select_channels(self, x, *selector):
        return self._select(x, *selector, saving=False)

    def select_channels_saving(self, x, *selector):
        return self._select(x, *selector, saving=True)

    def _select(self, x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, saving):
        n, c = x.shape[:2]
        outputs = {"scores": torch.full((n, k), math.nan), "index": torch.full((n, k), -1)}
        if saving:
            outputs["logits"] = torch.full((n, c), math.nan)
            outputs["hidden"] = torch.full((n, fc1_weight.shape[0]), math.nan)
            if pooled is None:
                outputs["pooled_out"] = torch.full((n, c), math.nan)
        self._block({"x": ("in", x)}, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, None, None, outputs)
        given = (*outputs.values(), x.new_empty(0, dtype=torch.float32))
        return given[: 5 if saving else 2]

    def mod_block(self, x, *arguments):
        y, logits = self._like(x), torch.full(x.shape[:2], math.nan)
        self._block({"x": ("in", x), "y": ("out", y)}, *arguments, {"logits": logits})
        return y, logits

    def mod_block_(self, x, *arguments):
        logits = torch.full(x.shape[:2], math.nan)
        self._block({"x": ("inout", x)}, *arguments, {"logits": logits})
        return logits

    def plan(self, x, *arguments):
        """How a mod_block_ is launched, in words."""
        try:
            self._block({"x": ("in", x)}, *arguments, {}, op="plan")
        except RuntimeError as error:
            return str(error).removeprefix("forward: ")

    def _block(self, maps, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv, form, outputs, op="block"):
        x = maps["x"][1]
        parts = read_form(form or "bottleneck:1:linear:first")
        numbers = {
            **self._map(x),
            **self.device,
            "h": x.shape[2],
            "w": x.shape[3],
            "r": fc1_weight.shape[0],
            "k": k,
            "float_weights": fc1_weight.dtype == torch.float32,
            "in_place": form is not None,
            "kind": list(CONV_KINDS).index(parts.kind),
            "mid_channels": parts.mid_channels,
            "final_relu": parts.final_relu,
            "position": POSITIONS.index(parts.position),
        }
        given = {
            "fc1_weight": fc1_weight,
            "fc2_weight": fc2_weight,
            "fc1_bias": fc1_bias,
            "fc2_bias": fc2_bias,
            "pooled": pooled,
            "conv": conv,
        }
        others = {name: ("in", tensor) for name, tensor in given.items() if tensor is not None}
        others |= {name: ("out", tensor) for name, tensor in outputs.items()}
        if not self.clusters:
            others["counters"] = ("counters", torch.zeros(x.shape[0], dtype=torch.int32))
        self._call(op, numbers, maps, **others)

    # ---- what cases have in common

    def _like(self, x, channels=None):
        shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
        return torch.empty(shape, dtype=x.dtype, memory_format=memory_format_of(x))

    def _map(self, x):
        """The numbers that every map of a call shares."""
        n, c, h, w = x.shape
        return {
            "dtype": DTYPES[x.dtype], "n": n, "c": c, "pixels": h * w, "channels_last": _is_channels_last(x)
        }  # fmt: skip

    def _call(self, op, numbers, maps, **others):
        numbers["seeds"] = self.seeds
        for name, (_, tensor) in maps.items():
            numbers[f"{name}_stride_n"] = _stride_n(tensor)
            numbers[f"{name}_channels_last"] = _is_channels_last(tensor)
        tensors = [(name, role, tensor) for name, (role, tensor) in (maps | others).items()]
        self.program.call(op, numbers, tensors)
