"""mod_block, mod_block_ and tail_: every kind, three positions, both dtypes; the in-place hazards."""

import dataclasses

import pytest
import torch

from mod_kernels._layout import memory_format_of
from mod_kernels.backends.triton import TRITON, launch
from mod_kernels.spec import CONV_KINDS

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
# Where the last program of a sample comes from ("pool", "layers", "nothing" in configs.py), made small; "apart":
# the tail has launches of its own.
WAYS = {
    "pool": {},
    "apart": {"tail_passes": 0},
    "layers": {"one_launch_weights": 0, "slice_channels": 16},
    "nothing": {"one_launch_weights": 0, "batch_samples": 0},
}
POSITIONS = ("first", "last", "original")


def block(x, spec, pooled=None, op="mod_block"):
    return TRITON.ops[op](x, *spec.selector_arguments, pooled, spec.k, *spec.conv_arguments)


def cases_of_kinds():
    """ResNets' in every way; in the interpreter the others are slow: in bfloat16, and on many pixels in half
    precision, not at all, and of the pairs of layout and in place, which take turns from shape to shape, two."""
    for number, (shape, k) in enumerate(CASES):
        for kind in CONV_KINDS:
            of_resnet = kind in ("bottleneck", "basic")
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                few = dtype == torch.float32 or (dtype == torch.float16 and shape[2] < 35)
                for in_place in (False, True) if few or of_resnet else ():
                    for place, layout in enumerate(("nchw", "channels_last")):
                        if of_resnet or (place + in_place + number) % 2 == 0:
                            yield shape, k, kind, dtype, in_place, layout


@pytest.mark.parametrize("shape,k,kind,dtype,in_place,layout", cases_of_kinds())
def test_against_float64(shape, k, kind, dtype, in_place, layout, device):
    position = POSITIONS[(shape[2] + in_place) % 3]
    x = feature_map(shape, dtype, layout, device=device)
    spec = make_spec(shape[1], k, kind, dtype, device=device, position=position, final_relu=k == 3)
    before = x.clone()
    if in_place:
        y, logits = x, block(x, spec, op="mod_block_")
    else:
        y, logits = block(x, spec)
        assert same_bits(x, before) and y.is_contiguous(memory_format=memory_format_of(x))
    check_block(before, spec, y, logits)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", CONV_KINDS)
@pytest.mark.parametrize("side", [3, 20])
def test_gathered_channels_are_read_before_they_are_written(side, kind, position, layout, device):
    """Every gathered channel is written as well; one program a sample, and (side 20) two launches of several."""
    channels, k = 8, 4
    x = feature_map((2, channels, side, side), layout=layout, device=device)
    first = 0 if position != "last" else channels - k
    index = torch.stack([first + torch.arange(k).flip(0), first + torch.randperm(k)]).to(device)
    scores = torch.rand((2, k), device=device)
    spec = make_spec(channels, k, kind, device=device, position=position)
    before = x.clone()
    TRITON.ops["tail_"](x, scores, index, *spec.conv_arguments)
    check_tail(before, spec, x, scores, index)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
def test_sliced_batch_in_place_leaves_what_lies_between(way, layout, device, with_tuning):
    with_tuning(**WAYS[way])
    wide = feature_map((4, 24, 5, 7), layout=layout, device=device)
    before = wide.clone()
    spec = make_spec(24, 4, device=device)
    logits = block(wide[::2], spec, op="mod_block_")
    check_block(before[::2], spec, wide[::2], logits)
    assert same_bits(wide[1::2], before[1::2])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
def test_sliced_batch_out_of_place(way, layout, device, with_tuning):
    with_tuning(**WAYS[way])
    x = feature_map((2, 24, 5, 7), torch.float16, f"{layout}_sliced", device=device)
    spec = make_spec(24, 4, dtype=torch.float32, device=device, bias=True)
    y, logits = block(x, spec)
    assert y.is_contiguous(memory_format=memory_format_of(x))
    check_block(x, spec, y, logits)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_given_pooled(op, way, layout, device, with_tuning):
    with_tuning(**WAYS[way])
    x = feature_map((2, 64, 5, 7), layout=layout, device=device)
    before, pooled = x.clone(), torch.randn((2, 64), device=device)
    spec = make_spec(64, 3, device=device)
    result = block(x, spec, pooled, op)
    y, logits = result if op == "mod_block" else (x, result)
    check_block(before, spec, y, logits, pooled)


@pytest.mark.parametrize("kind", CONV_KINDS)
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


@pytest.mark.parametrize("kind", CONV_KINDS)
def test_a_nan_reaches_what_torch_lets_it_reach(kind, device):
    """A NaN pixel in a gathered channel spreads as far as the convolutions do, through all that follows them."""
    x = torch.zeros((1, 12, 9, 9), device=device)
    x[0, 4, 4, 4] = float("nan")
    spec = dataclasses.replace(make_spec(12, 3, kind, device=device), final_relu=True)
    index = torch.tensor([[6, 4, 9]], device=device)
    TRITON.ops["tail_"](x, torch.ones((1, 3), device=device), index, *spec.conv_arguments)
    reach = {"basic": 2, "convnext": 3}.get(kind, 1)
    expected = torch.zeros((9, 9), dtype=torch.bool, device=device)
    expected[4 - reach : 5 + reach, 4 - reach : 5 + reach] = True
    assert torch.equal(x[0, :3].isnan(), expected.expand(3, 9, 9))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
@pytest.mark.parametrize(
    "kind,shape",
    [
        ("bottleneck", (3, 100, 5, 7)),
        ("basic", (2, 64, 20, 21)),
        ("inverted_residual", (2, 64, 20, 21)),
        ("conv", (2, 64, 20, 21)),
        ("convnext", (2, 64, 20, 21)),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_the_selection(way, kind, shape, op, layout, device, with_tuning):
    """Several programs a sample, C of no power of two, several blocks of pixels for the last of them."""
    with_tuning(pool_blocks=((None, 64, 16),), split_chunk=16, tile=512, **WAYS[way])
    x = feature_map(shape, torch.float16, layout, device=device)
    before, spec = x.clone(), make_spec(shape[1], 5, kind, hidden=21, device=device, bias=True, position="last")
    result = block(x, spec, op=op)
    check_block(before, spec, *(result if op == "mod_block" else (x, result)))
    again = block(before.clone(), spec, op="mod_block")
    assert all(same_bits(a, b) for a, b in zip(again, result if op == "mod_block" else (x, result), strict=True))


@pytest.mark.parametrize(
    "channels,samples,expected", [(256, 1, 1), (256, 300, 1), (512, 8, 1), (1024, 32, 1), (1024, 300, 1),
                                  (2048, 1, 2), (2048, 32, 2), (2048, 256, 4)]
)  # fmt: skip
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_number_of_launches(op, layout, channels, samples, expected, device, monkeypatch):
    """Of a block of the paper's; with the pooled vector given, and in place, the large batch needs one fewer."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda variant, *arguments: launched.append(variant))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty((samples, channels, 2, 3), dtype=torch.float16, device=device).to(memory_format=memory_format)
    spec = make_spec(channels, channels // 64, dtype=torch.float16, device=device)
    block(x, spec, op=op)
    assert len(launched) == expected
    launched.clear()
    block(x, spec, torch.zeros((samples, channels), device=device), op)
    assert len(launched) == (expected - 1 if expected == 4 and op == "mod_block_" else expected)


APART = ["pool_fwd_kernel", "rank_fwd_kernel", "tail_fwd_kernel", "tail_fwd_kernel"]


@pytest.mark.parametrize(
    "kind,shape,expected",
    [
        ("conv", (64, 224, 224), APART),
        ("conv", (128, 112, 112), APART),
        ("conv", (256, 56, 56), ["block_fwd_kernel"]),
        ("basic", (64, 56, 56), ["block_fwd_kernel"]),
        ("inverted_residual", (24, 56, 56), ["block_fwd_kernel"]),
        ("convnext", (96, 56, 56), ["block_fwd_kernel"]),
    ],
)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_a_tail_of_many_pixels_is_launched_apart(op, given, kind, shape, expected, device, monkeypatch):
    """That of VGG's first two stages."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda variant, *arguments: launched.append(variant.kernel))
    x = torch.empty((1, *shape), dtype=torch.float16, device=device)
    pooled = torch.zeros((1, shape[0]), device=device) if given else None
    block(x, make_spec(shape[0], max(1, shape[0] // 64), kind, torch.float16, device=device), pooled, op)
    assert launched == expected


def test_a_launch_that_was_stopped_leaves_no_trace(device, monkeypatch):
    """Half of the programs have counted themselves when an exception comes: the next call starts from zero."""
    if device != "cpu":
        pytest.skip("on a GPU a launch that was stopped takes the context with it")
    from triton.runtime.interpreter import interpreter_builder

    x, spec = feature_map((2, 64, 9, 9)), make_spec(64, 3)
    expected = block(x, spec)
    set_grid_idx = interpreter_builder.set_grid_idx

    def stop(i, j, k):
        if i == 2:
            raise KeyboardInterrupt
        set_grid_idx(i, j, k)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", stop)
        with pytest.raises(KeyboardInterrupt):
            block(x, spec)
    assert all(same_bits(a, b) for a, b in zip(block(x, spec), expected, strict=True))
