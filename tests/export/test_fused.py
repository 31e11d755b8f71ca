"""torch.export in mode "fused": the ops stay in the graph, AOTInductor calls them, what is loaded needs them."""

import subprocess
import sys

import pytest
import torch

from mod_kernels import accelerate, export_mode, use_backend
from mod_kernels._tolerances import relative_norm
from mod_kernels.backends.native import CPU

from .support import AGREES, CONV_BLOCKS, operators, small_network

FUSED = {"mod_kernels_cpu.add_relu_pool_.default": 1, "mod_kernels_cpu.mod_block_.default": 1}


def exported(network, x, strict=False):
    with torch.no_grad(), export_mode("fused"):
        return torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)


def ours(program):
    names = [name for name in operators(program) if "mod_kernels" in name]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("strict", [False, True])
def test_an_accelerated_block_stays_one_op(strict):
    network, x = accelerate(small_network()), torch.randn(2, 3, 6, 5)
    program = exported(network, x, strict)
    assert ours(program) == FUSED
    for n in (1, 5):
        x = torch.randn(n, 3, 6, 5)
        with torch.no_grad():
            assert torch.equal(program.module()(x), network(x))


def test_a_block_that_is_not_accelerated_is_the_ops_around_its_convolutions():
    network, x = small_network(), torch.randn(2, 3, 6, 5)
    program = exported(network, x)
    names = ("add_relu_pool_", "select_channels", "gather_channels", "fuse_channels_")
    assert ours(program) == {f"mod_kernels_cpu.{name}.default": 1 for name in names}
    with torch.no_grad():
        assert torch.equal(program.module()(x), network(x))


def test_with_gradients_the_numbers_are_the_same():
    network, x = accelerate(small_network()), torch.randn(2, 3, 6, 5)
    with export_mode("fused"):
        program = torch.export.export(network, (x,))
    assert ours(program)
    assert relative_norm(program.module()(x).detach(), network(x).detach()) <= AGREES


def test_what_no_engine_serves_is_plain():
    """The reference has no op that could stay."""
    network, x = accelerate(small_network()), torch.randn(2, 3, 6, 5)
    with use_backend("reference"):
        program = exported(network, x)
    assert not ours(program)


def test_the_mode_is_left_as_it_was():
    network, x = accelerate(small_network()), torch.randn(2, 3, 6, 5)
    with pytest.raises(KeyError), export_mode("fused"):
        raise KeyError
    with torch.no_grad():
        assert not ours(torch.export.export(network, (x,)))
        with export_mode("fused"), export_mode("portable"):
            assert not ours(torch.export.export(network, (x,)))


def test_a_mode_that_is_none_is_refused():
    message = "export mode must be one of 'portable', 'fused', got 'onnx'"
    with pytest.raises(ValueError, match=message), export_mode("onnx"):
        pass


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A network compiled by AOTInductor, the file, and a folder with an input and eager's output."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("package")
    network, x = accelerate(small_network()), torch.randn(3, 3, 6, 5)
    path = torch._inductor.aoti_compile_and_package(exported(network, x), package_path=str(folder / "network.pt2"))
    with torch.inference_mode():
        torch.save((x, network(x)), folder / "example.pt")
    return network, path, folder


def test_aotinductor_calls_the_op(package):
    network, path, _ = package
    compiled = torch._inductor.aoti_load_package(path)
    for n in (1, 5):
        x = torch.randn(n, 3, 6, 5)
        given = x.clone()
        with torch.inference_mode(), torch.profiler.profile() as profile:
            y = compiled(x)
        calls = {event.key.replace("::", ".") + ".default": event.count for event in profile.key_averages()}
        assert {name: calls.get(name, 0) for name in FUSED} == FUSED
        assert torch.equal(x, given)
        with torch.inference_mode():
            assert relative_norm(y, network(x)) <= AGREES


# In a process of its own: {first} is what it does before it loads the package.
RUN = """
import sys, torch
{first}
compiled = torch._inductor.aoti_load_package(sys.argv[1] + "/network.pt2")
x, expected = torch.load(sys.argv[1] + "/example.pt")
y = compiled(x)
print("error", float((y - expected).norm() / expected.norm()))
"""
# What a program without this package needs: the schemas of the ops it calls, and the library.
SCHEMAS_AND_LIBRARY = """
schemas = torch.library.Library("mod_kernels_cpu", "DEF")
for schema in {schemas}:
    schemas.define(schema)
torch.ops.load_library({library!r})
"""


def run_fresh(first, folder):
    command = [sys.executable, "-c", RUN.format(first=first), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_fresh_process_needs_the_import_only(package):
    done = run_fresh("import mod_kernels", package[2])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("error")[1]) <= AGREES


def test_a_fresh_process_without_it_is_told_which_op_is_missing(package):
    done = run_fresh("", package[2])
    assert done.returncode != 0
    assert "Could not find schema for mod_kernels_cpu::" in done.stderr


def test_schemas_and_the_library_are_enough(package):
    schemas = [str(getattr(torch.ops.mod_kernels_cpu, name.split(".")[1]).default._schema) for name in FUSED]
    schemas = [schema.partition("::")[2] for schema in schemas]
    done = run_fresh(SCHEMAS_AND_LIBRARY.format(schemas=schemas, library=str(CPU.library)), package[2])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("error")[1]) <= AGREES


def test_what_is_saved_loads_again(tmp_path):
    network, x = accelerate(small_network(CONV_BLOCKS["basic"](8))), torch.randn(2, 3, 6, 5)
    torch.export.save(exported(network, x), tmp_path / "network.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "network.pt2").module()(x), network(x))
