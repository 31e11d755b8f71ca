"""Every variant of the paper's shapes compiles, for six architectures, within its registers. No GPU needed."""

import os

import pytest

from mod_kernels.backends.triton import compile as ahead_of_time
from mod_kernels.backends.triton import enumeration, variants
from mod_kernels.backends.triton.tuning import DEFAULT, of_capability

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

MOST_SHARED = 32 * 1024  # bytes: three programs fit where a multiprocessor has 100 KB (8.6, 8.9, 12.0)


def everywhere(variant, dtype):
    """What is compiled for every architecture: the launches with a tail, which have the most registers.

    Of the blocks' the plain one, in place and in float16; the rest is compiled for 9.0 only, to keep the whole at
    some five minutes of processor time. `mod-kernels resources` compiles everything.
    """
    constants = dict(variant.constexprs)
    plain = variant.kernel == "block_fwd_kernel" and not constants["COPY"] and not constants["POOLED"]
    return dtype == "float16" and (plain or variant.kernel == "tail_fwd_kernel")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", enumeration.RESNET_SHAPES, ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_variants(capability, shape, dtype):
    for variant in dict.fromkeys(enumeration.variants(shape, dtype, tuning=of_capability(capability))):
        if capability == 90 or everywhere(variant, dtype):
            check(variant, capability)


OTHER_SHAPES = enumeration.PAPER_SHAPES[len(enumeration.RESNET_SHAPES) :]
FEW_SHAPES = (enumeration.MOBILENET_SHAPES[::4], enumeration.VGG_SHAPES[::4], enumeration.CONVNEXT_SHAPES[::3])


@pytest.mark.parametrize(
    "capability,shape",
    [
        *((90, shape) for shape in OTHER_SHAPES),
        *((one, shape) for one in ahead_of_time.CAPABILITIES if one != 90 for few in FEW_SHAPES for shape in few),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.kind}-{value.channels}-{value.hw}",
)
def test_variants_of_other_networks(capability, shape):
    """Launches with a tail in float16, but for 9.0 of a few shapes."""
    for variant in dict.fromkeys(enumeration.variants(shape, "float16", tuning=of_capability(capability))):
        if everywhere(variant, "float16"):
            check(variant, capability)


@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4], ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
def test_variants_in_channels_last(shape):
    for variant in dict.fromkeys(enumeration.variants(shape, "float16", channels_last=True)):
        if everywhere(variant, "float16"):
            check(variant, 90)


@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4:2], ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
def test_variants_for_views_that_are_not_aligned(shape):
    """Block and tail of two shapes for a few seconds' time: the tiles are chosen for aligned ones."""
    for variant in dict.fromkeys(enumeration.variants(shape, "float16")):
        if everywhere(variant, "float16"):
            check(variant, 90, aligned=False)


def test_views_that_are_not_aligned_take_narrow_loads():
    """Of x alone: the attribute that the test above leaves out is what makes loads wide."""
    selector = variants.Selector(DEFAULT, ("fp16",) * 5, 1024, 64, 16, 196, 16, 4)
    for aligned, width in ((True, 16), (False, 2)):
        binary = ahead_of_time.disassemble_variant(variants.pool_variant(selector), 90, aligned)
        widths = {(binary.argument(one), one.width) for one in binary.instructions if one.loads}
        assert widths == {("x_ptr", width), ("fc1_weight_ptr", 8)}


def check(variant, capability, aligned=True):
    resources = ahead_of_time.compile_variant(variant, capability, aligned)
    assert resources.spill_stores == resources.spill_loads == 0, (variant, resources)
    assert resources.shared <= MOST_SHARED, (variant, resources)


@pytest.mark.parametrize(
    "dtype,channels_last", [("float32", True), ("float16", True), ("float64", False), ("float64", True)]
)
@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4], ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
def test_plane_variants(shape, dtype, channels_last):
    """Layouts and types that gather, fuse and add_relu_pool alone serve."""
    for variant in enumeration.plane_variants(shape, dtype, channels_last=channels_last):
        check(variant, 90)


@pytest.mark.parametrize(
    "capability,shape,dtype,position,channels_last",
    [
        (86, enumeration.PAPER_SHAPES[7], "float16", "first", False),
        (89, enumeration.PAPER_SHAPES[7], "bfloat16", "last", False),
        (100, enumeration.PAPER_SHAPES[0], "float64", "original", True),
        (100, enumeration.PAPER_SHAPES[1], "float64", "original", True),
        (120, enumeration.PAPER_SHAPES[3], "float64", "original", False),
    ],
)
def test_fuse_where_it_did_spill(capability, shape, dtype, position, channels_last):
    """With other tiles: 32 x 64 for planes of 49; 16 float64 a thread in channels_last, 8 in NCHW."""
    for variant in enumeration.plane_variants(shape, dtype, position, channels_last):
        if "fuse" in variant.kernel:
            check(variant, capability)


def test_fuse_of_two_layouts_where_it_did_spill():
    """x in NCHW, z in channels_last: the enumeration has one layout for both."""
    shape = enumeration.PAPER_SHAPES[5]
    sizes = (DEFAULT, "fp16", shape.channels, shape.k, shape.hw, 16, 16, 16)
    check(variants.fuse_variant(*sizes, "original", False, True, in_place=False), 100)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4], ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
def test_backward_variants(shape, dtype):
    """Those that make or take everything, which have the most registers."""
    for variant in enumeration.backward_variants(shape, dtype):
        constants = dict(variant.constexprs)
        flags = ("Z_NEEDED", "SCORES_NEEDED", "FC1_BIAS", "FC2_BIAS", "HAS_DGATHERED", "HAS_OVERWRITTEN")
        if all(constants.get(flag, True) for flag in flags):
            check(variant, 90)


def test_spills_would_be_seen():
    """A tile far too large for its threads: the numbers above are read, not assumed."""
    selector = variants.Selector(DEFAULT, ("fp32",) * 5, 1, 64, 4, 2, 4096, 16, 16)
    variant = variants.pool_variant(selector)
    constants = dict(variant.constexprs) | {"CHUNK_C": 64, "BLOCK_HW": 1024}
    oversized = variants.Variant(variant.kernel, variant.signature, tuple(constants.items()), num_warps=4)
    assert ahead_of_time.compile_variant(oversized, 80).spill_stores > 0


@pytest.mark.parametrize(
    "capability,number,dtype", [(86, 2, "float32"), (90, 3, "bfloat16"), (90, 7, "bfloat16"), (100, 3, "float16")]
)
def test_blocks_where_they_did_spill(capability, number, dtype):
    """Held to a number of registers (``held_registers.of_block``), on one of the architectures each."""
    shape, held = enumeration.PAPER_SHAPES[number], 0
    for variant in dict.fromkeys(enumeration.variants(shape, dtype, channels_last=True)):
        if variant.max_registers is not None:
            check(variant, capability)
            held += 1
    assert held


def test_blocks_of_one_launch_where_they_did_spill():
    """Held by the tuning of 12.0."""
    for number, dtype in ((1, "float32"), (5, "float16")):
        shape, tuning = enumeration.PAPER_SHAPES[number], of_capability(120)
        held = [one for one in enumeration.variants(shape, dtype, tuning=tuning) if one.max_registers == 48]
        assert held
        for variant in dict.fromkeys(held):
            check(variant, 120)


def test_the_layer_that_did_spill():
    selector = variants.Selector(DEFAULT, ("fp32",) * 5, 2048, 128, 32, 49, 16, 1)
    for variant in variants.linear_variants(selector):
        check(variant, 100)
