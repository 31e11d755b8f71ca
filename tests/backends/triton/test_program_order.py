"""Programs may run in any order: the interpreter runs them forward, reversed and shuffled, to the same bits.

Scratch and outputs are NaN beforehand (conftest), so what is read before it is written shows. Launches merged on
purpose show that the check finds what it is for.
"""

import dataclasses

import pytest
import torch

from mod_kernels.backends import _workspace as workspace
from mod_kernels.backends.triton import TRITON, launch
from mod_kernels.spec import CONV_KINDS

from ...support import feature_map, make_spec
from .checks import check_block, check_tail, same_bits
from .test_block import WAYS

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402

from mod_kernels.backends.triton import block  # noqa: E402

ORDERS = ("forward", "reversed", "shuffled")


def run_block(kind, op, position="first", layout="nchw"):
    """A block with several programs per sample."""
    torch.manual_seed(1)
    x = feature_map((2, 12, 20, 21), layout=layout)
    before, spec = x.clone(), make_spec(12, 5, kind, hidden=3, position=position)
    result = TRITON.ops[op](x, *spec.selector_arguments, None, spec.k, *spec.conv_arguments)
    return before, spec, (result if op == "mod_block" else (x, result))


SMALL = {"pool_blocks": ((None, 256, 4),), "split_chunk": 4, "tile": 128, "slice_channels": 4}


# Of a kind is the tail alone, which the last program of a sample does, or launches of its own.
BLOCKS = [
    *((way, *one, op) for way in WAYS for one in (("bottleneck", "first"), ("basic", "original"))
      for op in ("mod_block", "mod_block_")),
    *((way, *one, "mod_block_") for way in ("pool", "apart")
      for one in (("inverted_residual", "last"), ("conv", "first"), ("convnext", "original"))),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("way,kind,position,op", BLOCKS)
def test_block(way, kind, position, layout, op, program_order, with_tuning):
    with_tuning(**WAYS[way] | SMALL)
    results = []
    for order in ORDERS:
        with program_order(order):
            before, spec, result = run_block(kind, op, position, layout)
        check_block(before, spec, *result)
        results.append(result)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("hidden", [6, 170])
@pytest.mark.parametrize("pooled", [False, True])
def test_select(pooled, hidden, program_order, with_tuning):
    with_tuning(slice_channels=32)
    x = feature_map((2, 100, 5, 7), torch.float16)
    spec = make_spec(100, 3, dtype=torch.float16, hidden=hidden)
    given = torch.randn(2, 100) if pooled else None
    results = []
    for order in ORDERS:
        with program_order(order):
            outputs = TRITON.ops["select_channels_saving"](x, *spec.selector_arguments, given, 3)
            lean = TRITON.ops["select_channels"](x, *spec.selector_arguments, given, 3)
            results.append((*outputs, *lean))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", ["first", "last", "original"])
def test_fuse(position, layout, program_order, with_tuning):
    """With repeated channels for "original"; several programs for the pixels of a channel."""
    with_tuning(max_block_hw=16, plane_channels=16, plane_k=16)
    x, z = feature_map((2, 6, 5, 7), layout=layout), feature_map((2, 5, 5, 7), layout=layout)
    scores = torch.rand(2, 5)
    index = torch.tensor([[4, 2, 4, 2, 4], [0, 5, 5, 5, 0]]) if position == "original" else None
    results = []
    for order in ORDERS:
        y = x.clone()
        with program_order(order):
            TRITON.ops["fuse_channels_"](y, z, scores, index, position)
            out = TRITON.ops["fuse_channels"](x, z, scores, index, position)
        results.append((y, out))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_add_relu_pool(layout, program_order):
    a, b = feature_map((2, 12, 35, 33), layout=layout), feature_map((2, 12, 35, 33), layout=layout)
    results = []
    for order in ORDERS:
        y = a.clone()
        with program_order(order):
            results.append((y, TRITON.ops["add_relu_pool_"](y, b, True)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def wrong_orders(program_order, run):
    """Orders in which what ``run`` gives does not pass its check."""
    wrong = []
    for order in ORDERS:
        with program_order(order):
            check, *arguments = run()
        try:
            check(*arguments)
        except (AssertionError, RuntimeError):  # RuntimeError: an index left out of range
            wrong.append(order)
    return wrong


def block_run():
    before, spec, result = run_block("bottleneck", "mod_block_")
    return check_block, before, spec, *result


def tail_run(kind):
    torch.manual_seed(1)
    x, scores = feature_map((1, 6, 35, 33)), torch.rand(1, 2)
    before, spec = x.clone(), make_spec(6, 2, kind)
    index = torch.randperm(2)[None]
    TRITON.ops["tail_"](x, scores, index, *spec.conv_arguments)
    return check_tail, before, spec, x, scores, index


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_finds_a_tail_whose_tiles_do_both_parts(kind, program_order, monkeypatch):
    """Both parts in one launch of several programs per sample: halos not there yet, or already overwritten."""
    assert not wrong_orders(program_order, lambda: tail_run(kind))
    run = launch.run

    def merged(variant, programs, *arguments):
        constants = dict(variant.constexprs)
        if not constants["REST"]:
            return
        constants["FIRST"] = True
        run(dataclasses.replace(variant, constexprs=tuple(constants.items())), programs, *arguments)

    monkeypatch.setattr(launch, "run", merged)
    assert wrong_orders(program_order, lambda: tail_run(kind)) == list(ORDERS)


@triton.jit
def _is_first(counter_ptr, PROGRAMS: tl.constexpr):
    before = tl.atomic_add(counter_ptr, 1)
    if before == PROGRAMS - 1:
        tl.store(counter_ptr, 0)
    return before == 0


@triton.jit
def _is_program_zero(counter_ptr, PROGRAMS: tl.constexpr):
    return tl.program_id(0) % PROGRAMS == 0


@pytest.mark.parametrize("way", ["pool", "layers"])
def test_finds_a_block_finished_by_the_wrong_program(way, program_order, with_tuning, monkeypatch):
    """By the first to arrive: wrong in every order. By number 0: right where it happens to come last."""
    with_tuning(**WAYS[way] | SMALL)
    assert not wrong_orders(program_order, block_run)
    monkeypatch.setattr(block, "_is_last", _is_first)
    assert wrong_orders(program_order, block_run) == list(ORDERS)
    monkeypatch.setattr(block, "_is_last", _is_program_zero)
    assert wrong_orders(program_order, block_run) == ["forward", "shuffled"]


def test_finds_counters_that_are_not_put_back(program_order, with_tuning):
    """A second call must find what the first did: here it does not, and no program believes to be the last."""
    with_tuning(**SMALL)
    with program_order("forward"):
        run_block("bottleneck", "mod_block_")
        for counters in workspace._of_stream.values():
            assert not counters.any()
            counters += 1
    assert wrong_orders(program_order, block_run) == list(ORDERS)
    workspace.forget()
