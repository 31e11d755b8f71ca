"""An ending and the block after it as one op: the block's numbers on what the ending gives, one launch fewer."""

import itertools

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from mod_kernels import MoDBlock, accelerate, reference, use_backend
from mod_kernels._add_relu_mod_block import add_relu_mod_block_
from mod_kernels._layout import CHANNELS_LAST
from mod_kernels._tolerances import VALUES, relative_norm
from mod_kernels.backends import _workspace as workspace
from mod_kernels.backends.triton import TRITON, launch
from mod_kernels.nn import MoDStage, NarrowBasicBlock
from mod_kernels.spec import CONV_KINDS

from ...support import feature_map, make_spec
from .checks import check_block, same_bits
from .test_block import POSITIONS, WAYS
from .test_program_order import ORDERS, SMALL

# As in test_block.py: planes of 49, of one pixel, of several tiles; C of no power of two; an empty batch.
CASES = [((3, 64, 7, 7), 3), ((1, 24, 1, 1), 24), ((3, 100, 5, 7), 1), ((2, 12, 35, 33), 5), ((0, 64, 7, 7), 3)]


def pair(a, b, relu, spec):
    return TRITON.ops["add_relu_mod_block_"](a, b, relu, *spec.selector_arguments, spec.k, *spec.conv_arguments)


def check_pair(a, b, relu, spec):
    """Held to float64 from the map on that add_relu_pool gives, which test_add_relu_pool.py holds to the sum."""
    before, b_before = TRITON.ops["add_relu_pool"](a, b, relu)[0], None if b is None else b.clone()
    logits = pair(a, b, relu, spec)
    check_block(before, spec, a, logits)
    assert b is None or same_bits(b, b_before)
    return a, logits


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_b,relu", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("shape,k", CASES)
def test_against_float64(shape, k, has_b, relu, dtype, layout, device, with_tuning):
    with_tuning(**WAYS["layers"])
    a, b = (feature_map(shape, dtype, layout, device=device) for _ in range(2))
    kind, position = ("bottleneck", "basic")[relu], POSITIONS[(shape[2] + has_b) % 3]
    spec = make_spec(shape[1], k, kind, dtype, device=device, position=position, bias=has_b)
    check_pair(a, b if has_b else None, relu, spec)


@pytest.mark.parametrize("kind", CONV_KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_the_block(way, kind, device, with_tuning):
    with_tuning(**WAYS[way])
    a, b = (feature_map((2, 24, 5, 7), torch.float16, device=device) for _ in range(2))
    check_pair(a, b, True, make_spec(24, 4, kind, torch.float16, device=device))


def test_a_hidden_layer_of_several_turns(device, with_tuning):
    """The loop over the selector's first layer, as at the paper's size."""
    with_tuning(**WAYS["layers"])
    a, b = (feature_map((2, 40, 5, 7), device=device) for _ in range(2))
    check_pair(a, b, True, make_spec(40, 4, hidden=170, device=device))


@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("channels_last", "nchw")])
def test_an_addend_of_the_other_layout(layouts, device, with_tuning):
    with_tuning(**WAYS["layers"])
    a, b = (feature_map((2, 24, 5, 7), layout=layout, device=device) for layout in layouts)
    spec, before = make_spec(24, 4, device=device), torch.relu(a + b)
    with use_backend("triton"):
        y = add_relu_mod_block_(a, b, True, spec)
    assert y is a and relative_norm(y, reference.mod_block(before, spec)) <= VALUES[torch.float32]


def test_other_sizes_find_what_the_calls_before_left(device, with_tuning):
    """A batch larger than any before needs more counters; the smaller ones after it find those, at zero."""
    with_tuning(**WAYS["layers"] | SMALL)
    workspace.forget()
    for shape, k in [((1, 24, 5, 7), 4), ((3, 24, 5, 7), 4), ((1, 24, 7, 5), 6), ((2, 24, 9, 5), 6)] * 2:
        a, b = (feature_map(shape, device=device) for _ in range(2))
        check_pair(a, b, True, make_spec(24, k, device=device))
        assert not any(counters.any() for counters in workspace._of_stream.values())


def test_what_the_block_can_t_take_is_refused_before_the_ending_is_written():
    """The tail's maps between its convolutions come to 2^31 values; of meta tensors: nothing may be launched."""
    spec = make_spec(64, 64, "inverted_residual", torch.float16)
    a = torch.empty((1, 64, 2400, 2400), dtype=torch.float16, device="meta")
    block = (*spec.selector_arguments, spec.k, *spec.conv_arguments, None)
    with launch.recorded() as launched, pytest.raises(ValueError, match="values between the convolutions"):
        launch.add_relu_mod_block_(a, None, True, *block)
    assert not launched


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_sliced_batches_leave_what_lies_between(layout, device, with_tuning):
    """a and b with strides of their own, one of them a multiple of 16 elements and the other not."""
    with_tuning(**WAYS["layers"])
    a, b = feature_map((4, 24, 5, 7), layout=layout, device=device), feature_map((6, 24, 5, 7), layout=layout)
    before, spec = a.clone(), make_spec(24, 4, device=device)
    check_pair(a[::2], b.to(device)[::3], True, spec)
    assert same_bits(a[1::2], before[1::2])


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_in_every_order_of_programs_and_on_used_counters(layout, program_order, with_tuning):
    with_tuning(**WAYS["layers"] | SMALL)
    results = []
    for order in ORDERS * 2:
        torch.manual_seed(1)
        a, b = (feature_map((2, 12, 20, 21), layout=layout) for _ in range(2))
        with program_order(order):
            results.append(check_pair(a, b, True, make_spec(12, 5, hidden=3)))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "channels,samples,expected",
    [
        (1024, 8, ["add_relu_pool_fwd_kernel", "block_fwd_kernel"]),
        (2048, 1, ["add_relu_layer_fwd_kernel", "block_fwd_kernel"]),
        (2048, 32, ["add_relu_layer_fwd_kernel", "block_fwd_kernel"]),
        (2048, 256, ["add_relu_pool_fwd_kernel", "linear_fwd_kernel", "linear_fwd_kernel", "block_fwd_kernel"]),
    ],
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_launches_of_the_paper_s_blocks(layout, channels, samples, expected, device, monkeypatch):
    """At 2048 channels one fewer than the ending and the fed block take by themselves."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda variant, *arguments: launched.append(variant.kernel))
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    a = torch.empty((samples, channels, 7, 7), dtype=torch.float16, device=device).to(memory_format=memory_format)
    pair(a, torch.empty_like(a), True, make_spec(channels, 32, dtype=torch.float16, device=device))
    assert launched == expected


def make_stage(device):
    torch.manual_seed(3)
    blocks = [BasicBlock(16, 16), MoDBlock(16, NarrowBasicBlock(3), 3, reduction=4)] * 2
    return MoDStage(*blocks).to(device).eval().requires_grad_(False)


def test_a_stage_hands_its_endings_over(device, with_tuning):
    with_tuning(**WAYS["layers"])
    stage, x = make_stage(device), feature_map((2, 16, 9, 9), device=device)
    expected = stage(x)
    accelerate(stage)
    with use_backend("triton"), launch.recorded() as launched:
        stage(x)
    assert [variant.kernel for variant, _ in launched] == ["add_relu_layer_fwd_kernel", "block_fwd_kernel"] * 2
    with use_backend("triton"):
        for _ in range(2):  # the second call is a remembered one
            assert relative_norm(stage(x), expected) <= 10 * VALUES[torch.float32]
    with use_backend("reference"), launch.recorded() as launched:
        assert relative_norm(stage(x), expected) <= 10 * VALUES[torch.float32]
    assert not launched


def test_a_compiled_stage_is_one_graph_with_the_op(device):
    stage, x, graphs = accelerate(make_stage(device)), feature_map((2, 16, 9, 9), device=device), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    with use_backend("triton"), torch.inference_mode():
        assert torch.equal(torch.compile(stage, fullgraph=True, backend=backend)(x), stage(x))
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes].count(
        "mod_kernels_triton.add_relu_mod_block_.default"
    ) == 2


@pytest.mark.parametrize(
    "b,error,said",
    [
        (torch.zeros(2, 16, 9, 8), ValueError, "b must have shape"),
        (torch.zeros(2, 16, 9, 9, dtype=torch.float64), TypeError, "b must be torch.float32"),
        (torch.zeros(2, 16, 9, 9, requires_grad=True), RuntimeError, "no gradients, and b needs one"),
        (None, ValueError, "a must be dense to be written into"),
    ],
)
def test_refusals_come_before_anything_is_written(b, error, said, device):
    a = feature_map((2, 16, 9, 9), device=device)
    a, before = (a.mT if b is None else a), a.clone()
    with use_backend("triton"), pytest.raises(error, match=said):
        add_relu_mod_block_(a, b if b is None else b.to(device), True, make_spec(16, 3, device=device))
    assert same_bits(a.mT if b is None else a, before)


@pytest.mark.parametrize("who", ["x", "identity", "block", "nobody, in training mode"])
def test_with_gradients_a_stage_keeps_to_its_parts(who, device, with_tuning):
    with_tuning(**WAYS["layers"])
    stage, x = accelerate(make_stage(device)), feature_map((2, 16, 9, 9), device=device)
    x.requires_grad_(who == "x")
    if who == "identity":  # alone: the main branch is frozen
        stage[0].downsample = torch.nn.Conv2d(16, 16, 1, device=device)
    for parameter in itertools.chain(*(stage[at].parameters() for at in (1, 3))):
        parameter.requires_grad_(who == "block")
    stage.train(who == "nobody, in training mode")
    with use_backend("triton"), launch.recorded() as launched:
        stage(x)
    assert "add_relu_layer_fwd_kernel" not in [variant.kernel for variant, _ in launched]
