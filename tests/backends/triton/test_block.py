"""mod_block, mod_block_ and tail_: both kinds, three positions, both dtypes; the in-place hazards."""

import dataclasses

import pytest
import torch

from mod_kernels.backends.triton import TRITON

from ...support import feature_map, make_spec
from .checks import check_block, check_tail, same_bits

# H*W of 49, 1 and 35; 1155 needs several tiles of pixels. C of no power of two; k = 1, 3, C.
CASES = [
    ((3, 64, 7, 7), 3),
    ((1, 24, 1, 1), 24),
    ((3, 100, 5, 7), 1),
    ((2, 12, 35, 33), 5),
    ((0, 64, 7, 7), 3),
]
# A second layer of its own, and one that whoever ranks does: with one launch of the tail and with two.
SELECTIONS = [((2, 64, 5, 7), 300), ((2, 64, 5, 7), 4), ((2, 64, 35, 33), 300), ((2, 64, 35, 33), 4)]
POSITIONS = ("first", "last", "original")


def block(x, spec, pooled=None, op="mod_block"):
    return TRITON.ops[op](x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("shape,k", CASES)
def test_against_float64(shape, k, kind, dtype, in_place, device):
    position = POSITIONS[(shape[2] + in_place) % 3]
    x = feature_map(shape, dtype, device=device)
    spec = make_spec(shape[1], k, kind, dtype, device=device, position=position, final_relu=k == 3)
    before = x.clone()
    if in_place:
        y, logits = x, block(x, spec, op="mod_block_")
    else:
        y, logits = block(x, spec)
        assert same_bits(x, before)
    check_block(before, spec, y, logits)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("side", [5, 35])
def test_gathered_channels_are_read_before_they_are_written(side, kind, position, device):
    """Every gathered channel is written as well; one program a sample, and (side 35) two launches of several."""
    channels, k = 8, 6
    x = feature_map((2, channels, side, side), device=device)
    first = 0 if position != "last" else channels - k
    index = torch.stack([first + torch.arange(k).flip(0), first + torch.randperm(k)]).to(device)
    scores = torch.rand((2, k), device=device)
    spec = make_spec(channels, k, kind, device=device, position=position)
    before = x.clone()
    TRITON.ops["tail_"](x, scores, index, *spec.conv_arguments)
    check_tail(before, spec, x, scores, index)


def test_sliced_batch_in_place_leaves_what_lies_between(device):
    wide = feature_map((4, 24, 5, 7), device=device)
    before = wide.clone()
    spec = make_spec(24, 4, device=device)
    logits = block(wide[::2], spec, op="mod_block_")
    check_block(before[::2], spec, wide[::2], logits)
    assert same_bits(wide[1::2], before[1::2])


def test_sliced_batch_out_of_place(device):
    x = feature_map((2, 24, 5, 7), torch.float16, "nchw_sliced", device=device)
    spec = make_spec(24, 4, dtype=torch.float32, device=device, bias=True)
    y, logits = block(x, spec)
    assert y.is_contiguous()
    check_block(x, spec, y, logits)


@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_given_pooled(op, device):
    x = feature_map((2, 64, 5, 7), device=device)
    before, pooled = x.clone(), torch.randn((2, 64), device=device)
    spec = make_spec(64, 3, device=device)
    result = block(x, spec, pooled, op)
    y, logits = result if op == "mod_block" else (x, result)
    check_block(before, spec, y, logits, pooled)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_special_values_pass_through_bit_for_bit(kind, device):
    """Channels outside the first k may hold anything: infinities, NaNs with a payload, signed zeros."""
    x = feature_map((1, 24, 5, 7), torch.float16, device=device)
    bits = torch.tensor([0x7C00, 0x7E01, 0x7D55, -0x0200, -0x8000, 0x0001], dtype=torch.int16, device=device)
    x[0, 20, 0, :6] = bits.view(torch.float16)
    before = x.clone()
    spec = make_spec(24, 3, kind, torch.float16, device=device)
    pooled = torch.zeros((1, 24), device=device)  # equal logits: channels 0, 1 and 2 are gathered
    y, logits = block(x, spec, pooled)
    index = torch.tensor([[0, 1, 2]], device=device)
    check_tail(before, spec, y, torch.sigmoid(logits[:, :3].double()), index)


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
def test_a_nan_reaches_what_torch_lets_it_reach(kind, device):
    """A NaN pixel in a gathered channel spreads as far as the two convolutions do, through every ReLU."""
    x = torch.zeros((1, 12, 9, 9), device=device)
    x[0, 4, 4, 4] = float("nan")
    spec = dataclasses.replace(make_spec(12, 3, kind, device=device), final_relu=True)
    index = torch.tensor([[6, 4, 9]], device=device)
    TRITON.ops["tail_"](x, torch.ones((1, 3), device=device), index, *spec.conv_arguments)
    reach = 1 if kind == "bottleneck" else 2
    expected = torch.zeros((9, 9), dtype=torch.bool, device=device)
    expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(x[0, :3].isnan(), expected.expand(3, 9, 9))


@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
@pytest.mark.parametrize("shape,hidden", SELECTIONS)
def test_every_way_to_the_selection(shape, hidden, op, device):
    x = feature_map(shape, device=device)
    before, spec = x.clone(), make_spec(shape[1], 5, hidden=hidden, device=device, bias=True, position="last")
    result = block(x, spec, op=op)
    check_block(before, spec, *(result if op == "mod_block" else (x, result)))


def test_smaller_tiles_make_two_launches_of_one(device, with_configs):
    x = feature_map((1, 12, 31, 33), device=device)
    spec = make_spec(12, 4, device=device)
    check_block(x, spec, *block(x, spec))
    with_configs(MAX_BLOCK_HW=512)
    check_block(x, spec, *block(x, spec))


def test_programs_that_take_several_tiles(device, with_configs):
    """Of the first launch, where a batch has so many samples that each gets few programs."""
    x = feature_map((2, 12, 35, 33), device=device)
    spec = make_spec(12, 4, "basic", device=device)
    each = block(x, spec)
    with_configs(FIRST_PROGRAMS=1)
    assert all(same_bits(a, b) for a, b in zip(block(x, spec), each, strict=True))
