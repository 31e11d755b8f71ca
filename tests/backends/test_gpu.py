"""What only a GPU shows of its engines: graphs, streams, unaligned views, large tensors, repeatability."""

import copy

import pytest
import torch

from mod_kernels import MoDBlock, accelerate, functional
from mod_kernels.backends import Call, use_backend
from mod_kernels.backends.cuda import CUDA
from mod_kernels.backends.triton import TRITON
from mod_kernels.nn import NarrowBottleneck

from ..support import feature_map, make_spec
from .triton.checks import check_block, differing_runs, same_bits

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]

SHAPES = [(3, 256, 56, 56), (3, 512, 28, 28), (2, 2048, 7, 7)]
# Clock ticks that a stream waits for, some 0.1 ms: what is queued behind on two streams then starts together.
WAIT = 200_000


@pytest.fixture(params=[TRITON, CUDA], ids=lambda engine: engine.name)
def engine(request):
    answer = request.param.supports(Call("mod_block", "cuda", torch.float16, "nchw", 64, 1))
    if not answer.ok:
        pytest.skip(answer.reason)
    return request.param


def paper_spec(channels, dtype=torch.float16):
    return make_spec(channels, channels // 64, dtype=dtype, device="cuda")


def block(engine, x, spec, op="mod_block"):
    return engine.ops[op](x, *spec.selector_arguments, None, spec.k, *spec.conv_arguments)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_a_graph_replays_on_new_values_and_beside_another(shape, op, engine):
    """Two graphs captured on streams of their own, replayed at once, again and again, on fresh inputs."""
    spec = paper_spec(shape[1])
    inputs = [feature_map(shape, torch.float16, device="cuda") for _ in range(2)]
    graphs, outputs, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    with torch.inference_mode(), use_backend(engine.name):
        getattr(functional, op)(inputs[0].clone(), spec)
        for x, stream in zip(inputs, streams, strict=True):
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                outputs.append(getattr(functional, op)(x, spec))
            graphs.append(graph)
        for _ in range(5):
            fresh = [feature_map(shape, torch.float16, device="cuda") for _ in inputs]
            for x, value in zip(inputs, fresh, strict=True):
                x.copy_(value)
            torch.cuda.synchronize()
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(WAIT)
                    graph.replay()
            torch.cuda.synchronize()
            for y, value in zip(outputs, fresh, strict=True):
                assert same_bits(y, functional.mod_block(value, spec))


def test_the_current_stream_is_used(engine):
    """Queued behind a long kernel on a side stream, the op sees what that stream has written before."""
    x, spec, side = (
        torch.zeros((2, 256, 56, 56), device="cuda"),
        paper_spec(256, torch.float32),
        torch.cuda.Stream(),
    )
    value = feature_map((2, 256, 56, 56), device="cuda")
    torch.cuda.synchronize()
    with torch.inference_mode(), torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.copy_(value)
        before = x.clone()
        result = block(engine, x, spec)
    side.synchronize()
    check_block(before, spec, *result)


@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_views_that_are_not_aligned(op, engine):
    storage = feature_map((1, 1, 1, 2 * 64 * 49 + 1), torch.float16, device="cuda").flatten()
    x, spec = storage[1:].view(2, 64, 7, 7), paper_spec(64)
    assert x.data_ptr() % 16
    before = x.clone()
    result = block(engine, x, spec, op)
    check_block(before, spec, *(result if op == "mod_block" else (x, result)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_two_streams_at_once(op, shape, engine):
    """Calls queued behind a wait on each of two streams, on values of their own: each its own bits every time."""
    spec, streams = paper_spec(shape[1]), [torch.cuda.Stream(), torch.cuda.Stream()]
    values = [feature_map(shape, torch.float16, device="cuda") for _ in streams]
    expected = [block(engine, value, spec)[0] for value in values]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10 * WAIT)
        for _ in range(10):
            for stream, value, right, count in zip(streams, values, expected, wrong, strict=True):
                with torch.cuda.stream(stream):
                    x = value.clone()
                    result = block(engine, x, spec, op)
                    y = x if op == "mod_block_" else result[0]
                    count += torch.ne(y.view(torch.int16), right.view(torch.int16)).any()
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


@pytest.mark.parametrize("op", ["mod_block", "mod_block_"])
def test_a_batch_of_more_than_2_to_the_31_elements(op, engine):
    """The first sample and the last, which begins beyond; out of place y is as large."""
    shape, spec = (2677, 256, 56, 56), paper_spec(256)
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    ends = [slice(0, 1), slice(-1, None)]
    before = [x[end].clone() for end in ends]
    result = block(engine, x, spec, op)
    y, logits = result if op == "mod_block" else (x, result)
    for end, sample in zip(ends, before, strict=True):
        check_block(sample, spec, y[end], logits[end])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_thousand_runs_give_the_same_bits(shape, dtype, engine):
    x, spec = feature_map(shape, dtype, device="cuda"), paper_spec(shape[1], dtype)
    assert differing_runs(lambda: block(engine, x, spec), 10_000) == 0


def test_torch_compile_with_cuda_graphs(engine):
    x, spec = feature_map((3, 512, 28, 28), torch.float16, device="cuda"), paper_spec(512)

    def block(x):
        return functional.mod_block(x.relu(), spec) + 1

    with torch.inference_mode(), use_backend(engine.name):
        compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            x.copy_(feature_map(x.shape, torch.float16, device="cuda"))
            torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("engine", [TRITON], indirect=True, ids=["triton"])
def test_an_ending_with_its_block_in_a_graph_and_ten_thousand_times(engine):
    """Replayed on fresh inputs; of the two launches the first leaves partial sums for the second."""
    shape, spec = (2, 2048, 7, 7), paper_spec(2048)
    a, b = (feature_map(shape, torch.float16, device="cuda") for _ in range(2))

    def pair(a, b):
        engine.ops["add_relu_mod_block_"](a, b, True, *spec.selector_arguments, spec.k, *spec.conv_arguments)
        return a

    with torch.inference_mode():
        pair(a.clone(), b)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pair(a, b)
        for _ in range(5):
            fresh = [feature_map(shape, torch.float16, device="cuda") for _ in range(2)]
            for one, value in zip((a, b), fresh, strict=True):
                one.copy_(value)
            graph.replay()
            assert same_bits(a, pair(*fresh))
        value = feature_map(shape, torch.float16, device="cuda")
        assert differing_runs(lambda: (pair(value.clone(), b),), 10_000) == 0


def test_weights_folded_inside_a_capture_are_not_kept(engine):
    """They are made when the graph is replayed: a call before that must not read them."""
    block = accelerate(MoDBlock(256, NarrowBottleneck(4), 4)).cuda().eval()
    x = feature_map((2, 256, 56, 56), device="cuda")
    with torch.no_grad(), use_backend(engine.name):
        expected = copy.deepcopy(block)(x)  # its kernels are compiled, block's weights are not folded
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            block(x)
        assert same_bits(block(x), expected)
