"""The tuning of an architecture, its file, and which tuning a launch takes."""

import dataclasses
import json

import pytest
import torch

from mod_kernels.backends.triton import TRITON, in_force, launch, tuning, tuning_file
from mod_kernels.backends.triton.compile import CAPABILITIES
from mod_kernels.backends.triton.tuning import DEFAULT, Tuning, of_capability

from ...support import feature_map, make_spec

GPU, VERSION = "NVIDIA H100 80GB HBM3", "3.8.0"
CHANGED = dataclasses.replace(DEFAULT, pool_warps=4, pool_blocks=((None, 512, 8),))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, 80), (86, 86), (87, 86), (89, 86), (90, 90), (100, 100), (103, 100), (110, 100), (120, 120), (121, 120)],
)
def test_a_capability_takes_the_newest_class_not_above_it(capability, expected):
    assert of_capability(capability) is tuning.BY_CLASS[expected]


def test_what_is_newer_than_all_takes_the_newest_and_what_is_older_is_refused():
    assert of_capability(150) is tuning.BY_CLASS[max(tuning.BY_CLASS)]
    with pytest.raises(ValueError, match="compute capability must be 80 or newer, got 75"):
        of_capability(75)


def test_every_architecture_that_is_compiled_for_has_a_class():
    assert {id(of_capability(one)) for one in CAPABILITIES} == {id(one) for one in tuning.BY_CLASS.values()}


def test_no_class_differs_before_one_was_measured():
    """But for registers, which ptxas shows. When one does, this test goes, and the number gets a reason."""
    sizes = [dataclasses.replace(one, block_registers=None) for one in tuning.BY_CLASS.values()]
    assert all(dataclasses.asdict(one) == dataclasses.asdict(DEFAULT) for one in sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": 3000}, "tile must be a power of two, got 3000"),
        ({"tile": "4096"}, "tile must be a power of two"),
        ({"plane_k": True}, "plane_k must be a power of two"),
        ({"block_warps": 64}, "block_warps must be 2, 4, 8, 16 or 32, got 64"),
        ({"block_warps": 32}, "tail_values must be given for 2, 4, 16, 32 warps"),
        ({"tail_values": ((2, ((None, 8),)),)}, "tail_values must be given for"),
        ({"tail_values": 8}, "tail_values must be pairs"),
        ({"max_block_hw": 32}, "plane_channels must be at most 32, got 128"),
        ({"tile": 16}, "split_chunk must be at most 32, got 64"),
        ({"pool_shares": 0}, "pool_shares must be 1 or more, got 0"),
        ({"batch_samples": -1}, "batch_samples must be a whole number, 0 or more, got -1"),
        ({"pool_blocks": ((64, 64, 64),)}, "pool_blocks must be rows"),
        ({"pool_blocks": ((64, 64, 64), (32, 64, 64), (None, 64, 64))}, "pool_blocks must be rows"),
        ({"pool_blocks": ((None, 64),)}, "pool_blocks must be rows"),
        ({"first_layer_tile": (8, 16, 16)}, "first_layer_tile must be three powers of two, 16 or more"),
    ],
)
def test_numbers_that_no_kernel_can_be_built_with_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Tuning(**fields)


# ---- the file


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("MOD_KERNELS_CACHE", str(tmp_path / "cache"))
    return tuning_file.path_of(GPU, VERSION)


def test_the_file_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MOD_KERNELS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning_file.path_of(GPU, VERSION) == tmp_path / "own" / "tuning-NVIDIA-H100-80GB-HBM3-triton-3.8.0.json"
    monkeypatch.delenv("MOD_KERNELS_CACHE")
    assert tuning_file.cache_folder() == tmp_path / "xdg" / "mod_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning_file.cache_folder() == tmp_path / ".cache" / "mod_kernels"


def test_what_is_saved_is_loaded(path):
    tuning_file.save(path, CHANGED, GPU, VERSION, ["pool_warps 4"])
    assert dataclasses.asdict(tuning_file.load(path, GPU, VERSION)) == dataclasses.asdict(CHANGED)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_save_that_is_stopped_leaves_the_file_as_it_was(path, monkeypatch, error):
    tuning_file.save(path, CHANGED, GPU, VERSION, [])
    before = path.read_text()

    def stop(*_):
        raise error

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(error):
        tuning_file.save(path, DEFAULT, GPU, VERSION, [])
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def _with(path, **fields):
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | fields))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text(path.read_text()[:100]), "it is not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "it is not JSON"),
        (lambda path: path.write_text("[]"), "it holds no JSON object"),
        (lambda path: _with(path, schema=0), "its schema is 0, here it is 1"),
        (lambda path: _with(path, gpu="NVIDIA L4"), "its gpu is 'NVIDIA L4', here it is 'NVIDIA H100 80GB HBM3'"),
        (lambda path: _with(path, triton="3.7.0"), "its triton is '3.7.0', here it is '3.8.0'"),
        (lambda path: _with(path, tuning={"tile": 4096}), "its tuning must have the fields batch_samples, "),
        (lambda path: _with(path, tuning=None), "its tuning must have the fields"),
        (
            lambda path: _with(path, tuning=dataclasses.asdict(DEFAULT) | {"tile": 3}),
            "tile must be a power of two, got 3",
        ),
    ],
)
def test_a_file_that_may_not_be_used_is_not_and_the_reason_is_told(path, spoil, reason, gpu):
    tuning_file.save(path, CHANGED, GPU, VERSION, [])
    spoil(path)
    found = in_force.of_device(gpu)
    assert found.tuning is of_capability(89)
    assert found.file.startswith(f"{path} is not used: {reason}")
    assert described(gpu) == ("built in", found.file)


# ---- what is in force


@pytest.fixture
def gpu(monkeypatch):
    """The index of a GPU of capability 8.9 that is not there, and not looked up yet."""
    monkeypatch.setattr(in_force, "names", lambda device: (GPU, VERSION))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(in_force, "_in_force", dict(in_force._in_force))
    return 7


def described(gpu):
    """What `mod-kernels info` says of the engine's tuning."""
    pytest.importorskip("triton")
    from mod_kernels.backends import triton as engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_interpreting", lambda: False)
        said = TRITON.describe()
        return said["tuning"], said["tuning file"]


def test_without_a_file_the_architecture_decides(path, gpu):
    assert in_force.of_device(gpu).tuning is of_capability(89)
    none = "none: `mod-kernels tune` was not run for this GPU and Triton 3.8.0"
    assert described(gpu) == ("built in", none)


def test_the_file_is_used_and_read_once(path, gpu):
    tuning_file.save(path, CHANGED, GPU, VERSION, [])
    found = in_force.of_device(gpu)
    assert dataclasses.asdict(found.tuning) == dataclasses.asdict(CHANGED)
    assert described(gpu) == ("tuned: pool_warps=4 pool_blocks=((None, 512, 8),)", str(path))
    path.unlink()
    assert in_force.of_device(gpu) is found


def test_a_call_takes_the_tuning_that_is_in_force(device, with_tuning, monkeypatch):
    """And one that was planned before under another tuning does not keep its plan."""
    launched = []
    monkeypatch.setattr(launch, "run", lambda variant, *_: launched.append(variant.num_warps))
    x, spec = feature_map((2, 24, 3, 5), device=device), make_spec(24, 4, device=device)

    def warps(op, *arguments):
        launched.clear()
        TRITON.ops[op](*arguments)
        return launched[0]

    calls = [
        ("mod_block", x, *spec.selector_arguments, None, 4, *spec.conv_arguments),
        ("select_channels", x, *spec.selector_arguments, None, 4),
        ("add_relu_pool", x, None, True),
        ("tail_", x, torch.zeros(2, 4), torch.zeros(2, 4, dtype=torch.int64), *spec.conv_arguments),
    ]
    assert [warps(*call) for call in calls] == [8, 8, 8, 2]
    with_tuning(block_warps=8, pool_warps=4, tail_warps=8)
    assert [warps(*call) for call in calls] == [4, 4, 4, 4]


def test_what_was_in_force_is_again_after_an_exception():
    before = in_force.of_device(-1)
    with pytest.raises(RuntimeError), in_force.using(CHANGED, -1):
        assert in_force.of_device(-1).tuning is CHANGED
        raise RuntimeError
    assert in_force.of_device(-1) is before


def test_a_call_does_not_hash_all_numbers_of_its_tuning():
    """It is looked up in the plans at every call: by identity that costs nothing."""
    assert hash(DEFAULT) == object.__hash__(DEFAULT)
