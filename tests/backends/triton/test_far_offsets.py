"""Offsets beyond 2^31 elements: the last sample of batches so large, and samples so far apart.

Of the large tensors only the pages that are touched take memory, so the interpreter runs the programs of the last
sample alone, and outputs are not poisoned. An offset that wraps around could point anywhere in the process: every
address is looked for in the launch's tensors before it is used.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.utils import deterministic

from mod_kernels import reference
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends import _workspace as workspace
from mod_kernels.backends.triton import TRITON, launch

from ...support import far_apart, feature_map, make_spec, untouched
from .checks import check_block, check_selection, check_tail, same_bits
from .test_block import WAYS

# (C, H, W), k, layout. With k = C what is gathered, z, and what lies between a basic block's convolutions go as
# far as x does; with one pixel the pooled vectors and the logits do.
SIZES = [((12, 5, 7), 12, "nchw"), ((12, 5, 7), 12, "channels_last"), ((64, 1, 1), 1, "nchw")]
each_size = pytest.mark.parametrize("sample,k,layout", SIZES)
DTYPE = torch.float16


def samples_of(sample):
    """So many that the last one begins at 2^31 elements or beyond."""
    return -(-(2**31) // torch.Size(sample).numel()) + 1


def large(sample, layout="nchw"):
    """A batch of zeros, but for its last sample."""
    x = untouched((samples_of(sample), *sample), DTYPE, layout)
    x[-1:] = feature_map((1, *sample), DTYPE)
    return x


def large_rows(sample, row):
    """The same of (N, k) tensors."""
    rows = untouched((samples_of(sample), len(row)), row.dtype)
    rows[-1] = row
    return rows


def programs_of_last(variant, programs, samples):
    """The numbers of the programs that work on the last sample."""
    if variant.kernel == "linear_fwd_kernel":  # a program takes several samples
        row_blocks = -(-samples // dict(variant.constexprs)["BLOCK_N"])
        return range(row_blocks - 1, programs, row_blocks)
    return range(programs - programs // samples, programs)


@pytest.fixture
def last_sample_only(interpreter, monkeypatch):
    """Call with a sample's size: from then on launches run the programs of a large batch's last sample."""
    from triton.runtime.interpreter import interpreter_builder as builder

    run, set_grid_idx = launch.run, builder.set_grid_idx

    def begin(sample):
        samples = samples_of(sample)

        def run_last(variant, programs, *arguments):
            chosen = programs_of_last(variant, programs, samples)

            def set_chosen(i, j, k):
                builder.set_grid_dim(programs, 1, 1)
                set_grid_idx(chosen[i], j, k)

            with monkeypatch.context() as patch, addresses_checked(builder, arguments):
                patch.setattr(builder, "set_grid_idx", set_chosen)
                run(variant, len(chosen), *arguments)

        monkeypatch.setattr(launch, "run", run_last)
        monkeypatch.setattr(workspace, "counters_for", lambda x: untouched((samples,), torch.int32))
        monkeypatch.setattr(deterministic, "fill_uninitialized_memory", False)

    return begin


@contextlib.contextmanager
def addresses_checked(builder, arguments):
    """Nothing is loaded or stored but in the storages of ``arguments``."""
    storages = [one.untyped_storage() for one in arguments if isinstance(one, torch.Tensor)]
    known = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def check(pointers, mask):
        addresses = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for first, end in known:
            inside |= (addresses >= first) & (addresses < end)
        assert inside.all(), "an address outside of the launch's tensors"

    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(pointers, mask, *others):
        check(pointers, mask)
        return load(pointers, mask, *others)

    def checked_store(pointers, value, mask, *others):
        check(pointers, mask)
        return store(pointers, value, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield


@each_size
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_select(apart, pooled, sample, k, layout, last_sample_only, with_tuning):
    with_tuning(**{"max_layer_weights": 0, "slice_channels": 8} if apart else {})
    last_sample_only(sample)
    x, spec = large(sample, layout), make_spec(sample[0], k, "basic", DTYPE, hidden=3)
    means = large_rows(sample, torch.randn(sample[0])) if pooled else None
    arguments = (x, *spec.selector_arguments, means, k)
    scores, index, logits, _, own_means = TRITON.ops["select_channels_saving"](*arguments)
    last = slice(-1, None)
    check_selection(x[last], spec, scores[last], index[last], logits[last], means[last] if pooled else None)
    if not pooled:
        assert relative_norm(own_means[last], x[last].double().mean((2, 3))) <= VALUES[torch.float32]
    lean = TRITON.ops["select_channels"](*arguments)
    assert same_bits(lean[0][last], scores[last]) and same_bits(lean[1][last], index[last])


@each_size
def test_gather(sample, k, layout, last_sample_only):
    last_sample_only(sample)
    x, index = large(sample, layout), large_rows(sample, torch.randperm(sample[0])[:k])
    out = TRITON.ops["gather_channels"](x, index)
    assert same_bits(out[-1:], reference.gather_channels(x[-1:], index[-1:]))


@each_size
@pytest.mark.parametrize("position", ["last", "original"])
@pytest.mark.parametrize("op", ["fuse_channels", "fuse_channels_"])
def test_fuse(op, position, sample, k, layout, last_sample_only):
    last_sample_only(sample)
    x, z = large(sample, layout), large((k, *sample[1:]), layout) if k > 1 else large_z(sample)
    scores, index = large_rows(sample, torch.rand(k)), large_rows(sample, torch.randperm(sample[0])[:k])
    arguments = [one[-1:].double() for one in (x, z, scores)]
    expected = reference.fuse_channels(*arguments, index[-1:], position)
    y = TRITON.ops[op](x, z, scores, index, position)
    assert relative_norm((y if op == "fuse_channels" else x)[-1:], expected) <= VALUES[DTYPE]


def large_z(sample):
    """One channel of it."""
    return large_rows(sample, torch.randn(1).to(DTYPE)).view(-1, 1, 1, 1)


@each_size
@pytest.mark.parametrize("op", ["add_relu_pool", "add_relu_pool_"])
def test_add_relu_pool(op, sample, k, layout, last_sample_only):
    last_sample_only(sample)
    a, b = large(sample, layout), large(sample, layout)
    expected = reference.add_relu_pool(a[-1:], b[-1:], True)[0]
    given = TRITON.ops[op](a, b, True)
    y, means = given if op == "add_relu_pool" else (a, given)
    assert same_bits(y[-1:], expected)
    assert relative_norm(means[-1:], expected.double().mean((2, 3))) <= VALUES[torch.float32]


# Of an inverted residual block the scratch has six planes for each of the k.
TAILS = [*((kind, *size) for kind in ("bottleneck", "basic", "conv", "convnext") for size in SIZES),
         ("inverted_residual", (12, 5, 7), 2, "channels_last")]  # fmt: skip


@pytest.mark.parametrize("kind,sample,k,layout", TAILS)
def test_tail(kind, sample, k, layout, last_sample_only):
    last_sample_only(sample)
    x, spec = large(sample, layout), make_spec(sample[0], k, kind, DTYPE)
    scores, index = large_rows(sample, torch.rand(k)), large_rows(sample, torch.randperm(sample[0])[:k])
    before = x[-1:].clone()
    TRITON.ops["tail_"](x, scores, index, *spec.conv_arguments)
    check_tail(before, spec, x[-1:], scores[-1:].double(), index[-1:])


@pytest.mark.parametrize("sample,k,layout,pooled", [*((*size, False) for size in SIZES), (*SIZES[-1], True)])
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
@pytest.mark.parametrize("way", WAYS)
def test_block(way, op, sample, k, layout, pooled, last_sample_only, with_tuning):
    with_tuning(**WAYS[way] | ({"batch_samples": 2**31} if way == "layers" else {}))
    last_sample_only(sample)
    x, spec = large(sample, layout), make_spec(sample[0], k, "basic", DTYPE, hidden=3)
    means = large_rows(sample, torch.randn(sample[0])) if pooled else None
    before = x[-1:].clone()
    result = TRITON.ops[op](x, *spec.selector_arguments, means, k, *spec.conv_arguments)
    y, logits = result if op == "mod_block" else (x, result)
    check_block(before, spec, y[-1:], logits[-1:], means[-1:] if pooled else None)
    assert same_bits(x[-1:], before) or op == "mod_block_"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_samples_far_apart(layout, interpreter, with_tuning):
    """Views whose second sample begins beyond 2^31, of every op, to the bits of dense tensors."""
    with_tuning(**WAYS["layers"])
    stride, spec = 2**31 + 48, make_spec(12, 5, dtype=DTYPE, hidden=3)
    x, other = (feature_map((2, 12, 5, 7), DTYPE, layout) for _ in range(2))
    z, scores = feature_map((2, 5, 5, 7), DTYPE, layout), torch.rand(2, 5)
    index = torch.stack([torch.randperm(12)[:5] for _ in range(2)])
    selector = (*spec.selector_arguments, None, 5)
    for op, maps, others in (
        ("select_channels_saving", (x,), selector),
        ("gather_channels", (x,), (index,)),
        ("fuse_channels", (x, z), (scores, None, "first")),
        ("fuse_channels_", (x, z), (scores, index, "original")),
        ("add_relu_pool", (x, other), (True,)),
        ("add_relu_pool_", (x, other), (True,)),
        ("tail_", (x,), (scores, index, *spec.conv_arguments)),
        ("mod_block", (x,), (*selector, *spec.conv_arguments)),
        ("mod_block_", (x,), (*selector, *spec.conv_arguments)),
        ("add_relu_mod_block_", (x, other), (True, *spec.selector_arguments, 5, *spec.conv_arguments)),
    ):
        dense, far = [one.clone() for one in maps], [far_apart(one, stride) for one in maps]
        expected, results = TRITON.ops[op](*dense, *others), TRITON.ops[op](*far, *others)
        for a, b in zip(tensors(results, far), tensors(expected, dense), strict=True):
            assert same_bits(a, b), op


def tensors(results, maps):
    """What an op gave, and what became of its arguments."""
    given = results if isinstance(results, tuple) else (results,)
    return [*(one for one in given if one is not None), *maps]


@pytest.mark.parametrize("channels_last", [False, True])
def test_samples_of_2_to_the_31_elements_are_refused(channels_last):
    """Inside a sample offsets are int32. Of meta tensors: the refusal comes before any launch."""
    spec, refusal = make_spec(4096, 4), "fewer than 2\\^31 elements, got \\(1, 4096, 1024, 512\\)"
    x = torch.empty((1, 4096, 1024, 512), dtype=DTYPE, device="meta")
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    scores, index = torch.rand(1, 4), torch.zeros((1, 4), dtype=torch.int64)
    selector = (*spec.selector_arguments, None, 4)
    for op, arguments in (
        ("select_channels", selector),
        ("select_channels_saving", selector),
        ("add_relu_pool", (x, True)),
        ("add_relu_pool_", (None, True)),
        ("tail_", (scores, index, *spec.conv_arguments)),
        ("mod_block", (*selector, *spec.conv_arguments, None)),
        ("mod_block_", (*selector, *spec.conv_arguments, None)),
        ("add_relu_mod_block_", (None, True, *spec.selector_arguments, 4, *spec.conv_arguments, None)),
    ):
        with pytest.raises(ValueError, match=refusal):
            getattr(launch, op)(x, *arguments)
    launch._check_size(x[:, :, :, 1:])
