"""The CUDA engine around its kernels: what it serves and why not, its ops in torch.library, its library.

No GPU is needed for any of it. The kernels run elsewhere: on a host (``tests/cuda_host``), and in ``test_gpu.py``.
"""

import ctypes.util
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mod_kernels import _library, backends
from mod_kernels.backends import Call, Support, _compiled_library, cuda
from mod_kernels.backends.cuda import COUNTING, CUDA, NAMESPACE, OPS, runs_on
from mod_kernels.backends.triton import TRITON

from ..support import feature_map, make_spec

CALL = Call("mod_block", "cuda", torch.float16, "nchw", 64, 3, "basic", "first", torch.float32)
BUILT = ("80", "86", "89", "90a", "100", "120", "100+PTX")
needs_library = pytest.mark.skipif(bool(CUDA.problem), reason=CUDA.problem)


@pytest.fixture
def an_h100(monkeypatch):
    """As where the library is there, for a GPU of 9.0."""
    monkeypatch.setattr(CUDA, "problem", "")
    monkeypatch.setattr(CUDA, "architectures", BUILT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize(
    "change,word",
    [
        ({}, ""),
        ({"device": "cpu"}, "run on cuda, not on cpu"),
        ({"dtype": torch.bfloat16, "layout": "channels_last"}, ""),
        ({"dtype": torch.float64}, "feature maps, not float64"),
        ({"dtype": torch.int32}, "int32"),
        ({"weight_dtype": torch.float64}, "weights, not float64"),
        ({"layout": "other"}, "not other"),
        ({"channels": 4097}, "C=4097"),
        ({"channels": 4096, "k": 256}, ""),
        ({"k": 257}, "k=257"),
        *[({"kind": kind}, "") for kind in cuda.KINDS],
        ({"kind": "attention"}, "kind 'attention'"),
        ({"op": "select_channels_saving", "channels": 8192}, "C=8192"),
        ({"op": "gather_channels", "channels": 8192, "k": 512}, ""),
        ({"op": "input_gradient", "channels": 8192}, ""),
        ({"op": "add_relu_pool_", "dtype": torch.float64}, "float64"),
        ({"op": "select_channels_backward"}, "select_channels_backward has no CUDA kernel"),
        ({"op": "conv_block_saving"}, "conv_block_saving has no CUDA kernel"),
    ],
)
def test_says_what_it_serves(change, word, an_h100):
    answer = CUDA.supports(CALL._replace(**change))
    assert answer.ok == (not word) and word in answer.reason and bool(answer.reason) == bool(word)


def test_a_gpu_it_was_not_built_for_is_named(an_h100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    answer = CUDA.supports(CALL)
    built = "8.0, 8.6, 8.9, 9.0, 10.0, 12.0, 10.0 and newer"
    assert answer.reason == f"the library is built for {built}; this GPU has compute capability 7.5"


@pytest.mark.parametrize(
    "capability,architectures,served",
    [
        ((8, 0), BUILT, True),
        ((8, 7), BUILT, True),  # binaries of 8.6
        ((9, 0), BUILT, True),
        ((10, 3), BUILT, True),
        ((11, 0), BUILT, True),  # from PTX
        ((12, 1), BUILT, True),
        ((13, 0), BUILT, True),
        ((7, 5), BUILT, False),
        ((9, 0), ("80", "120"), False),
        ((9, 1), ("90a",), False),  # 9.0 alone
        ((8, 0), ("86",), False),
        ((12, 0), ("100",), False),
        ((9, 0), ("100+PTX",), False),
    ],
)
def test_which_gpus_run_which_binaries(capability, architectures, served):
    assert runs_on(capability, architectures) == served


@pytest.fixture
def native(tmp_path, monkeypatch):
    """A folder of libraries, empty."""
    monkeypatch.setattr(cuda, "NATIVE", tmp_path)
    monkeypatch.setattr(_compiled_library, "REASON_FILE", tmp_path / "build_failure.txt")
    return tmp_path


def test_a_torch_without_cuda_has_no_library(native):
    path, reason = cuda.library_of(None)
    assert path is None and reason == f"torch {torch.__version__} is built without CUDA"


def test_what_the_build_said_is_the_reason(native):
    (native / "build_failure.txt").write_text(
        "mod_kernels._native.mod_kernels_cpu_v4 was not built: no such luck\n"
        "mod_kernels._native.mod_kernels_cuda was not built: no CUDA toolkit was found\n"
    )
    path, reason = cuda.library_of("13.0")
    assert path is None and reason == (
        "libmod_kernels_cuda_13.so is not there; mod_kernels._native.mod_kernels_cuda was not built: no CUDA "
        "toolkit was found"
    )


def test_a_library_for_another_cuda_is_named(native):
    (native / "libmod_kernels_cuda_12.so").touch()
    path, reason = cuda.library_of("13.0")
    assert path is None and "libmod_kernels_cuda_12.so can't serve torch's CUDA 13.0" in reason
    assert cuda.library_of("12.8")[0].name == "libmod_kernels_cuda_12.so"


def test_the_loaders_words_are_kept(tmp_path):
    broken = tmp_path / "libmod_kernels_cuda_13.so"
    broken.write_text("not a library")
    said = _compiled_library.load(broken, NAMESPACE, OPS, "CUDA")
    assert said.startswith(f"{broken.name} could not be loaded: ") and ("too short" in said or "invalid" in said)


def test_without_a_library_the_reason_is_the_answer(an_h100, monkeypatch):
    monkeypatch.setattr(CUDA, "problem", "libmod_kernels_cuda_13.so is not there")
    said = "the compiled library is not available: libmod_kernels_cuda_13.so is not there"
    assert CUDA.supports(CALL) == Support(False, said)
    assert CUDA.describe() == {"status": "libmod_kernels_cuda_13.so is not there"}
    with (
        backends.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"can't serve mod_block: .* is not there"),
    ):
        backends._decide("cuda", CALL)


def engines_that_serve(monkeypatch, **answers):
    for engine in (TRITON, CUDA):
        answer = Support(answers[engine.name], "" if answers[engine.name] else "not here")
        monkeypatch.setattr(engine, "supports", lambda call, answer=answer: answer)


@pytest.mark.parametrize(
    "triton,cuda,chosen",
    [(True, True, "triton"), (True, False, "triton"), (False, True, "cuda"), (False, False, "reference")],
)
def test_the_order_on_a_gpu(triton, cuda, chosen, monkeypatch):
    engines_that_serve(monkeypatch, triton=triton, cuda=cuda)
    backends._choices.clear()
    engine = backends._decide("auto", CALL)
    assert (engine.name if engine else "reference") == chosen
    with backends.use_backend("auto"):
        said = backends.explain(CALL)
    assert said.backend == chosen
    assert set(said.reasons) == {"reference", "cpu", "triton", "cuda"} - {chosen}
    backends._choices.clear()


def test_by_name_it_comes_before_triton(monkeypatch):
    engines_that_serve(monkeypatch, triton=True, cuda=True)
    assert backends._decide("cuda", CALL) is CUDA


# ---- the ops


@pytest.mark.parametrize("name", OPS)
def test_schemas_are_the_tables(name):
    arguments, returns, _ = _library.OPS[name]
    if name in COUNTING:
        arguments += ", Tensor(counters!) counters"
    schema = getattr(getattr(torch.ops, NAMESPACE), name).default._schema
    assert schema == torch._C.parse_schema(f"{NAMESPACE}::{name}({arguments}) -> {returns}")


def raw_calls():
    """(op, arguments) of every op."""
    x = feature_map((2, 24, 3, 5))
    spec = make_spec(24, 4, bias=True)
    selector, counters = spec.selector_arguments, torch.zeros(2, dtype=torch.int32)
    z, scores, index = x[:, :4].contiguous(), x[:, :4, 0, 0].contiguous(), torch.zeros(2, 4).long()
    pooled = torch.zeros(2, 24)
    for given in (None, pooled):
        yield "select_channels", (x, *selector, given, 4, counters)
        yield "select_channels_saving", (x, *selector, given, 4, counters)
    yield "gather_channels", (x, index)
    yield "fuse_channels", (x, z, scores, None, "last")
    yield "fuse_channels_", (x, z, scores, index, "original")
    yield "add_relu_pool", (x, x.clone(), True)
    yield "add_relu_pool_", (x, None, True)
    yield "mod_block", (x, *selector, None, 4, *spec.conv_arguments, counters)
    yield "mod_block_", (x, *selector, pooled, 4, *spec.conv_arguments, counters)
    yield "input_gradient", (x, pooled, z, index, x.clone(), z.clone(), "last")


def test_fakes_say_what_a_trace_needs():
    """On fake tensors of a GPU: no GPU is asked."""
    seen = set()

    def on_gpu(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for name, arguments in raw_calls():
        with FakeTensorMode():
            given = [on_gpu(one) if isinstance(one, torch.Tensor) else one for one in arguments]
            outputs = getattr(getattr(torch.ops, NAMESPACE), name).default(*given)
            if outputs is not None:
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                assert all(one.device.type == "cuda" for one in outputs)
            seen.add(name)
    assert seen == set(OPS)


@needs_library
def test_every_op_is_registered_for_cuda_alone():
    for name in OPS:
        assert _compiled_library.is_served(NAMESPACE, name, "CUDA")
        assert not _compiled_library.is_served(NAMESPACE, name, "CPU")
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.mod_kernels_cuda.gather_channels.default(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1).long())


@needs_library
def test_loading_asks_nothing_of_a_gpu():
    source = (
        "import torch\n"
        "from mod_kernels.backends.cuda import CUDA\n"
        "assert CUDA.library is not None and not CUDA.problem, CUDA.describe()\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(CUDA.describe()['built for'])\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("8.0 ")


@needs_library
def test_the_library_says_what_it_was_built_for():
    assert cuda.architectures_of(CUDA.library) == CUDA.architectures
    assert {"80", "86", "89", "90a"} <= set(CUDA.architectures)
    with pytest.raises((AttributeError, OSError)):
        cuda.architectures_of(ctypes.util.find_library("c") or "libc.so.6")
