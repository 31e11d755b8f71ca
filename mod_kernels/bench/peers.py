"""The same network in other runtimes: onnxruntime and OpenVINO, from the graph that torch.onnx exports.

A peer is called without arguments, as the clocks of :mod:`mod_kernels.bench.timing` do, and returns its output,
the same tensor each time. It reads the example's memory at every call: what is written there is what it runs on.
Both runtimes get their best: all graph optimisations, float32 throughout, the threads that were asked for, and no
copy of input or output. Needs the extra ``export``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """``model`` on inputs of the example's shape as an ONNX file's bytes, weights included.

    Args:
        model: in eval mode, on the CPU, float32, from one tensor to one tensor; its graph must be plain ATen (ours
            is, accelerated or not).
        example: float32, on the CPU, contiguous.

    Raises:
        ImportError: the extra ``export`` is not installed.
        ValueError: model is in training mode, or example is not of that kind.
    """
    if model.training:
        raise ValueError("model must be in eval mode, it is in training mode")
    _check_example(example)
    _needed("onnx")
    _needed("onnxscript")
    with torch.no_grad():
        program = torch.onnx.export(model, (example,), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def onnxruntime_peer(model: nn.Module | bytes, example: Tensor, threads: int) -> Callable[[], Tensor]:
    """``model`` (or what :func:`to_onnx` made of it) on ``example`` in onnxruntime.

    Raises:
        ImportError, ValueError: as :func:`to_onnx`; and for a number of threads below 1.
    """
    runtime = _needed("onnxruntime")
    _check_threads(threads)
    session = onnxruntime_session(_exported(model, example), threads)
    return _OnnxruntimePeer(runtime, session, example)


def onnxruntime_session(exported: bytes, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU."""
    runtime = _needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads wait for work by spinning, which they may while it runs, and not while another is being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return runtime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])


class _OnnxruntimePeer:
    """A session bound to the example's memory and to one output tensor."""

    def __init__(self, runtime: ModuleType, session: Any, example: Tensor) -> None:
        self._session, self._input = session, example
        # The first run is by copy: it tells the output's shape.
        first = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
        self._output = torch.from_numpy(first.copy())
        binding = session.io_binding()
        float32, shape = "float32", tuple(example.shape)
        binding.bind_input(session.get_inputs()[0].name, "cpu", 0, float32, shape, example.data_ptr())
        shape, address = tuple(self._output.shape), self._output.data_ptr()
        binding.bind_output(session.get_outputs()[0].name, "cpu", 0, float32, shape, address)
        self._binding = binding

    def __call__(self) -> Tensor:
        self._session.run_with_iobinding(self._binding)
        return self._output


def openvino_peer(model: nn.Module | bytes, example: Tensor, threads: int) -> Callable[[], Tensor]:
    """``model`` (or what :func:`to_onnx` made of it) on ``example`` in OpenVINO.

    Raises:
        ImportError, ValueError: as :func:`to_onnx`; and for a number of threads below 1.
    """
    runtime = _needed("openvino")
    _check_threads(threads)
    return _OpenvinoPeer(runtime, openvino_compiled(_exported(model, example), threads), example)


def openvino_compiled(exported: bytes, threads: int) -> Any:
    """An ``openvino.CompiledModel`` on the CPU, for one request at a time.

    Left to itself it runs in bfloat16 where the CPU has it: not the network that the others run.
    """
    core = _needed("openvino").Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core.compile_model(core.read_model(exported), "CPU", settings)


class _OpenvinoPeer:
    """A request on the example's memory and on one output tensor."""

    def __init__(self, runtime: ModuleType, compiled: Any, example: Tensor) -> None:
        self._input, self._output = example, torch.empty(tuple(compiled.output(0).shape))
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(runtime.Tensor(example.numpy(), shared_memory=True))
        self._request.set_output_tensor(runtime.Tensor(self._output.numpy(), shared_memory=True))

    def __call__(self) -> Tensor:
        self._request.infer()
        return self._output


# By the name that goes into a result.
PEERS: dict[str, Callable[[nn.Module | bytes, Tensor, int], Callable[[], Tensor]]] = {
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}


def _exported(model: nn.Module | bytes, example: Tensor) -> bytes:
    _check_example(example)
    return model if isinstance(model, bytes) else to_onnx(model, example)


def _check_example(example: Tensor) -> None:
    if example.dtype != torch.float32 or example.device.type != "cpu" or not example.is_contiguous():
        raise ValueError(
            "example must be a contiguous float32 tensor on the CPU, "
            f"got {example.dtype} on {example.device} with strides {example.stride()}"
        )


def _check_threads(threads: int) -> None:
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"threads must be an int of at least 1, got {threads!r}")


def _needed(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is needed for this: pip install 'mod_kernels[export]' ({error})", name=module
        ) from error
