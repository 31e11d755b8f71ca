"""The portable graph as an ONNX file: onnxruntime and OpenVINO run it and agree with eager."""

import numpy
import pytest
import torch

from mod_kernels import accelerate, models
from mod_kernels._tolerances import relative_norm
from mod_kernels.spec import POSITIONS

from ..blocks import CHANNELS, K, make_block, without_ties
from .support import AGREES, CONV_BLOCKS

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

pytestmark = pytest.mark.usefixtures("one_thread")


def check(model, shape, path, dynamic):
    """Export, run the file in both runtimes on fresh inputs (of other batches too, if dynamic) against eager."""
    batch = ({0: torch.export.Dim("batch")},) if dynamic else None
    with torch.no_grad():
        torch.onnx.export(model, (torch.randn(shape),), path, dynamo=True, dynamic_shapes=batch, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    for n in (shape[0], 1, 5) if dynamic else (shape[0],):
        x = torch.randn(n, *shape[1:])
        with torch.inference_mode():
            expected = model(x)
        outputs = {
            "onnxruntime": session.run(None, {session.get_inputs()[0].name: x.numpy()})[0],
            "openvino": compiled([x.numpy()])[0],
        }
        for runtime, output in outputs.items():
            error = relative_norm(torch.from_numpy(numpy.array(output)), expected)
            assert error <= AGREES, (runtime, n, error)


@pytest.mark.parametrize("kind", CONV_BLOCKS)
def test_every_conv_block(kind, tmp_path):
    block = make_block(CONV_BLOCKS[kind](K)).eval()
    check(block, (3, CHANNELS, 7, 5), tmp_path / "block.onnx", dynamic=True)


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position(position, tmp_path):
    check(make_block(position=position).eval(), (3, CHANNELS, 7, 5), tmp_path / "block.onnx", dynamic=False)


def test_a_block_that_processes_every_channel(tmp_path):
    block = make_block(CONV_BLOCKS["basic"](CHANNELS), k=CHANNELS).eval()
    check(block, (2, CHANNELS, 5, 5), tmp_path / "block.onnx", dynamic=True)


@pytest.mark.parametrize("accelerated, dynamic", [(False, True), (True, False), (True, True)])
def test_resnet18_mod(accelerated, dynamic, tmp_path):
    network = without_ties(models.resnet18_mod(c=16, num_classes=10, stem="cifar")).eval()
    network = accelerate(network) if accelerated else network
    check(network, (2, 3, 16, 16), tmp_path / "network.onnx", dynamic)


def test_resnet50_mod(tmp_path):
    check(without_ties(models.resnet50_mod()).eval(), (2, 3, 64, 64), tmp_path / "network.onnx", dynamic=True)
