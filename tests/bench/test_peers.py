"""onnxruntime and OpenVINO beside eager: the same numbers, on the threads that were asked for."""

import sys

import pytest
import torch

from mod_kernels import models
from mod_kernels._tolerances import relative_norm
from mod_kernels.bench import peers

from ..blocks import without_ties

# Two runtimes' float32 sums through some twenty layers, normalised: a wrong layer is off by 1e-1.
AGREES = 1e-5
RUNTIMES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return without_ties(models.resnet18_mod(c=16, num_classes=10, stem="cifar")).eval()


@pytest.fixture(scope="module")
def exported(network):
    pytest.importorskip("onnxscript")
    return peers.to_onnx(network, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_agrees_with_eager_on_what_the_example_holds_now(name, network, exported):
    for module in RUNTIMES[name]:
        pytest.importorskip(module)
    x = torch.randn(2, 3, 16, 16)
    peer = peers.PEERS[name](exported, x, threads=1)
    with torch.inference_mode():
        assert relative_norm(peer(), network(x)) <= AGREES
        before = peer().clone()
        x.normal_()
        assert relative_norm(peer(), network(x)) <= AGREES
        assert relative_norm(before, network(x)) > AGREES


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_exports_a_network_by_itself(name, network):
    for module in RUNTIMES[name]:
        pytest.importorskip(module)
    block, x = network.layer1, torch.randn(1, 64, 8, 8)
    peer = peers.PEERS[name](block, x.clone(), threads=1)
    with torch.inference_mode():
        assert relative_norm(peer(), block(x)) <= AGREES


@pytest.mark.parametrize("threads", [1, 2])
def test_the_runtimes_report_the_threads(threads, exported):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    options = peers.onnxruntime_session(exported, threads).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (threads, 1)
    compiled = peers.openvino_compiled(exported, threads)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


@pytest.mark.parametrize("name", peers.PEERS)
def test_a_runtime_that_is_not_installed_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # what the import system takes for "not there"
    with pytest.raises(ImportError, match=rf"{name} is needed.*mod_kernels\[export\]"):
        peers.PEERS[name](b"", torch.zeros(1, 3, 4, 4), 1)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize(
    "example, threads, message",
    [
        (torch.zeros(1, 3, 4, 4), 0, "threads must be an int of at least 1, got 0"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float16), 1, "example must be a contiguous float32.*float16"),
        (torch.zeros(1, 3, 4, 8)[..., ::2], 1, "example must be a contiguous float32.*strides"),
    ],
)
def test_bad_input(name, example, threads, message, network):
    pytest.importorskip(name)
    with pytest.raises(ValueError, match=message):
        peers.PEERS[name](network, example, threads)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match="model must be in eval mode"):
        peers.to_onnx(torch.nn.Conv2d(3, 3, 1).train(), torch.zeros(1, 3, 4, 4))
