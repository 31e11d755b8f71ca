"""``mod-kernels resources``: what compiled variants take, and that what must not be is seen. No GPU needed."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from mod_kernels import _resources_file, cli
from mod_kernels.backends.triton import compile as ahead_of_time
from mod_kernels.backends.triton import enumeration, launch, ptx, resources, variants
from mod_kernels.backends.triton.tuning import DEFAULT

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

SHAPE = enumeration.PAPER_SHAPES[1]  # 512x28x28
GATHER = variants.gather_variant(DEFAULT, "fp16", SHAPE.channels, SHAPE.k, SHAPE.hw, 16, 16, False)
POOL = variants.pool_variant(
    variants.Selector(DEFAULT, ("fp16",) * 5, SHAPE.channels, SHAPE.hidden, SHAPE.k, SHAPE.hw, 16, 16)
)


def _planted(variant, num_warps=None, **constants):
    changed = tuple((dict(variant.constexprs) | constants).items())
    return replace(variant, constexprs=changed, num_warps=num_warps or variant.num_warps)


# 64 x 1024 float32 values in 128 threads; 64 pixels for 256 threads: one element a thread; no power of two.
SPILLING = _planted(POOL, num_warps=4, CHUNK_C=64, BLOCK_HW=1024)
NARROW = _planted(POOL, CHUNK_C=1, BLOCK_HW=64)
BROKEN = _planted(GATHER, BLOCK_HW=48)


OPTIONS = ["--engine", "triton", "--capability", "90", "--shape", "512x28x28", "--dtype", "float16"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command on planted variants, in this process unless told how many.

    Returns the result, the file's records of kind "run", and its rows, of each the values by name.
    """

    def run(*planted, cores=1, arguments=()):
        monkeypatch.setattr(resources, "_variants", lambda *arguments: planted)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        path = tmp_path / "new" / "resources.jsonl"
        result = CliRunner().invoke(cli.app, ["resources", *OPTIONS, "--json", str(path), *arguments])
        records = [json.loads(line) for line in path.read_text().splitlines()]
        runs = [one for one in records if one["record"] == "run"]
        rows = [one for one in records if one["record"] == "triton"]
        for one in rows:
            one |= dict(zip(runs[0]["columns"], one.pop("values"), strict=True))
        return result, runs, rows

    return run


def test_a_compiled_variant():
    row = resources.row_of(SHAPE, "float16", POOL, 90)
    assert row.ok
    assert row.shape == "512x28x28"
    assert 0 < row.registers <= 255
    assert row.spill_bytes == row.stack_bytes == 0
    assert 0 < row.occupancy <= 1
    assert row.pool_load_widths == (16, 16)
    assert row.load_widths[1] == 16
    assert row.store_widths == (4, 4)
    loads = row.estimate_bytes_per_clock * row.estimate_loop_instructions / (4 * 32 * 16)
    assert loads in (1, 2, 4, 8)  # ptxas may unroll the loop
    assert loads < row.estimate_loop_instructions < row.instructions
    assert row.estimate_us >= row.estimate_floor_us > 0


def test_marks_do_not_change_the_code(monkeypatch):
    marked = ahead_of_time.disassemble_variant(POOL, 120)
    monkeypatch.setattr(ptx, "mark_arguments", lambda text, pointers: text)
    plain = ahead_of_time.disassemble_variant(POOL, 120)
    assert [one.name for one in marked.instructions] == [one.name for one in plain.instructions]
    assert marked.resources == plain.resources


def test_every_access_is_told_its_argument():
    binary = ahead_of_time.disassemble_variant(GATHER, 90)
    loads = {binary.argument(one) for one in binary.instructions if one.loads}
    stores = {binary.argument(one) for one in binary.instructions if one.stores}
    assert (loads, stores) == ({"x_ptr", "index_ptr"}, {"out_ptr"})


def test_a_spill_is_named(run):
    result, _, rows = run(SPILLING, GATHER)
    assert result.exit_code == 1
    assert "pool_fwd_kernel 512x28x28 float16 sm_90 POOLED=False" in result.stdout
    assert ": spills " in result.stdout
    assert "FAILED: 1 of 2 variants" in result.stdout
    spilling, gather = rows
    assert spilling["spill_bytes"] > 0
    assert spilling["problems"][0] == f"spills {spilling['spill_bytes']} bytes"
    assert not gather["problems"] and gather["error"] is None


def test_a_narrow_load_is_named(run):
    result, _, rows = run(NARROW)
    assert result.exit_code == 1
    assert ": loads x 2 bytes at a time where 16 are possible" in result.stdout
    assert rows[0]["pool_load_widths"] == [2, 2]


def test_a_narrow_load_is_right_where_nothing_is_aligned():
    shape = enumeration.PAPER_SHAPES[3]  # 7x7: rows begin anywhere
    selector = variants.Selector(DEFAULT, ("fp16",) * 5, shape.channels, shape.hidden, shape.k, shape.hw, 1, 1)
    row = resources.row_of(shape, "float16", _planted(variants.pool_variant(selector), RUN=0, BLOCK_HW=64), 90)
    assert row.pool_load_widths == (2, 2)
    assert row.ok
    assert row.estimate_lanes == 49 / 64


@pytest.mark.parametrize("channels,ok", [(512, True), (1024, False)])
def test_a_narrow_load_is_right_where_a_sample_is_small(channels, ok):
    """float16 4x4: 16 KiB of it, and 32."""
    shape = enumeration.Shape("conv", channels, channels // 16, 8, 8, 16)
    selector = variants.Selector(DEFAULT, ("fp16",) * 5, channels, shape.hidden, shape.k, shape.hw, 16, 16)
    variant = variants.pool_variant(selector)
    row = resources.row_of(shape, "float16", _planted(variant, CHUNK_C=64), 90)
    assert (row.pool_load_widths, row.ok) == ((8, 8), ok)


def test_short_planes_are_read_as_a_run_wherever_samples_are_aligned():
    shape = enumeration.PAPER_SHAPES[3]
    variant = next(one for one in enumeration.variants(shape, "float16") if one.kernel == "pool_fwd_kernel")
    row = resources.row_of(shape, "float16", variant, 90)
    assert (row.pool_load_widths, row.ok) == ((16, 16), True)
    narrow = _planted(variant, ALIGN=1)
    assert resources.row_of(shape, "float16", narrow, 90).ok


@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4], ids=resources.shape_name)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_blocks_pool_sixteen_bytes_at_a_time(channels_last, dtype, shape):
    """The launch that pools inside a block, as docs/gpu.md has it."""
    found = enumeration.variants(shape, dtype, channels_last=channels_last)
    row = resources.row_of(shape, dtype, next(found), 90)  # in place, not fed, a small batch
    assert not row.constants["COPY"] and not row.constants["POOLED"]
    assert (row.pool_load_widths, row.ok) == ((16, 16), True)


@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[2:4], ids=resources.shape_name)
@pytest.mark.parametrize("position", ["first", "last"])
def test_fuse_moves_sixteen_bytes_at_a_time_whatever_a_plane_is(position, shape):
    """Planes of 196 and 49 half-precision values begin at multiples of 8 and of 2 bytes, samples at more."""
    found = [one for one in enumeration.plane_variants(shape, "float16", position) if "fuse" in one.kernel]
    assert [dict(one.constexprs)["IN_PLACE"] for one in found] == [False, True]
    for variant, target in zip(found, ("y_ptr", "x_ptr"), strict=True):
        binary = ahead_of_time.disassemble_variant(variant, 90)
        loads = {(binary.argument(one), one.width) for one in binary.instructions if one.loads}
        assert loads == {("x_ptr", 16), ("z_ptr", 16), ("scores_ptr", 4)}
        assert {(binary.argument(one), one.width) for one in binary.instructions if one.stores} == {(target, 16)}


def test_fuse_moves_x_sixteen_bytes_at_a_time_beside_a_narrower_z():
    """With k = 3 the samples of z begin at multiples of 2 bytes, those of x as ever."""
    shape = replace(enumeration.PAPER_SHAPES[3], k=3)
    for variant in enumeration.plane_variants(shape, "float16", "last"):
        if dict(variant.constexprs).get("IN_PLACE") is False:
            binary = ahead_of_time.disassemble_variant(variant, 90)
            widths = {(binary.argument(one), one.width) for one in binary.instructions if one.loads or one.stores}
            assert widths == {("x_ptr", 16), ("z_ptr", 2), ("scores_ptr", 4), ("y_ptr", 16)}
            return
    pytest.fail("no flat fuse")


@pytest.mark.parametrize("shape", enumeration.PAPER_SHAPES[:4], ids=resources.shape_name)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_inputs_gradient_is_read_sixteen_bytes_at_a_time(dtype, channels_last, shape):
    """With all of its parts, as docs/gpu.md has it."""
    found = enumeration.plane_backward_variants(shape, dtype, channels_last=channels_last)
    row = resources.row_of(shape, dtype, list(found)[-1], 90)
    assert row.constants["HAS_OVERWRITTEN"] and row.constants["HAS_DGATHERED"]
    assert (row.pool_load_widths, row.ok) == ((16, 16), True)


def test_what_does_not_compile_is_a_row_and_the_others_go_on(run):
    result, _, rows = run(BROKEN, GATHER, cores=2)  # a process each
    assert result.exit_code == 1
    assert "gather_channels_fwd_kernel 512x28x28 float16 sm_90" in result.stdout
    assert ": does not compile: CompilationError" in result.stdout
    broken, gather = rows
    assert broken["error"].startswith("CompilationError")
    assert broken["registers"] is None
    assert gather["registers"] > 0


def test_the_file_says_what_of_what_and_by_what(run):
    result, (began,), (row,) = run(POOL)
    assert result.exit_code == 0
    assert "ok: 1 variants" in result.stdout
    assert {"torch", "triton", "commit"} <= began["machine"].keys()
    assert began["command"].startswith("mod-kernels")
    assert began["sources"].keys() == {"triton", "cuda"}
    assert (row["kernel"], row["dtype"], row["capability"]) == ("pool_fwd_kernel", "float16", 90)
    flags = {name: value for name, value in POOL.constexprs if isinstance(value, bool | str)}
    assert row["constants"] == flags and flags
    assert (row["num_warps"], row["num_stages"]) == (POOL.num_warps, POOL.num_stages)
    assert row["estimate_gpu"] == "H100 SXM"


def test_a_run_goes_on_where_the_file_ends(run, monkeypatch):
    run(SPILLING, GATHER)
    compiled = []
    row_of = resources.row_of
    monkeypatch.setattr(resources, "row_of", lambda *job: compiled.append(job[2]) or row_of(*job))
    result, runs, rows = run(SPILLING, GATHER, POOL, arguments=["--resume"])
    assert compiled == [POOL]
    assert (result.exit_code, len(runs), len(rows)) == (1, 2, 3)
    assert "FAILED: 1 of 3 variants" in result.stdout  # the spill in the file too


def test_rows_of_other_kernels_do_not_count(run, monkeypatch):
    run(GATHER)
    monkeypatch.setattr(
        _resources_file, "sources", lambda: {"triton": {GATHER.kernel: "changed"}, "cuda": "changed"}
    )
    result, _, rows = run(GATHER, arguments=["--resume"])
    assert len(rows) == 2
    assert "ok: 1 variants" in result.stdout
    assert "1 rows of " in result.stdout and "are of other kernels or another Triton: not counted" in result.stdout


def test_kernels_are_told_apart_by_their_code_and_by_what_reads_their_binaries(monkeypatch, tmp_path):
    """What chooses among variants is in a variant's own digest."""
    package = tmp_path / "mod_kernels"
    shutil.copytree(_resources_file._PACKAGE, package, ignore=shutil.ignore_patterns("_native", "__pycache__"))
    monkeypatch.setattr(_resources_file, "_PACKAGE", package)
    before = _resources_file.sources()["triton"]
    assert before.keys() == launch.kernels().keys()
    of_select = {"pool_fwd_kernel", "layers_fwd_kernel", "rank_fwd_kernel", "block_fwd_kernel"}
    for name, changed in (
        ("configs", set()),
        ("gather", {"gather_channels_fwd_kernel"}),
        ("select", of_select | {"add_relu_layer_fwd_kernel"}),
        ("add_relu_pool", {"add_relu_pool_fwd_kernel", "add_relu_layer_fwd_kernel"}),
        ("sass", set(before)),
    ):
        path = package / "backends" / "triton" / f"{name}.py"
        text = path.read_text()
        path.write_text(text + "# changed\n")
        now = _resources_file.sources()["triton"]
        assert {kernel for kernel in before if now[kernel] != before[kernel]} == changed, name
        path.write_text(text)


def test_a_line_that_was_cut_off_is_compiled_again(run, tmp_path):
    run(GATHER)
    path = tmp_path / "new" / "resources.jsonl"
    path.write_text(path.read_text()[:-20])
    for passed in range(2):  # once it was mended, it is not compiled a third time
        result = CliRunner().invoke(cli.app, ["resources", *OPTIONS, "--json", str(path), "--resume"])
        assert result.exit_code == 0 and "ok: 1 variants" in result.stdout
        assert "1 lines of " in result.stdout and "are cut off: passed over" in result.stdout
        assert path.read_text().count('{"record": "triton"') == 2, passed


def test_another_file_is_left_alone(tmp_path):
    for text, said in (('{"ok": true}\n', "'record'"), ("[]\n", "'[]'"), ("", "it says of no run")):
        path = tmp_path / "other.json"
        path.write_text(text)
        result = CliRunner().invoke(cli.app, ["resources", *OPTIONS, "--json", str(path), "--resume"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "other.json is no file of mod-kernels resources" in result.stderr and said in result.stderr
        assert path.read_text() == text


def test_resume_needs_a_file():
    result = CliRunner().invoke(cli.app, ["resources", *OPTIONS, "--resume"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--resume goes with --json" in result.stderr


def test_every_variant_has_a_job():
    jobs = resources.jobs([SHAPE], ["float16", "float32"], [80, 90])
    expected = len(
        {
            variant
            for dtype in ("float16", "float32")
            for channels_last in (False, True)
            for enumerated in (enumeration.variants, enumeration.backward_variants)
            for variant in enumerated(SHAPE, dtype, channels_last=channels_last)
        }
    )
    assert len(jobs) == len({job.key for job in jobs}) == 2 * expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--capability", "77"], "capability must be one of 80, 86, 89, 90, 100, 120, got '77'"),
        (["--dtype", "int8"], "dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message):
    result = CliRunner().invoke(cli.app, ["resources", *arguments])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"mod-kernels: {message}\n")


def test_an_unknown_shape_is_one_line_that_names_the_choices():
    result = CliRunner().invoke(cli.app, ["resources", "--shape", "1x2x3"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mod-kernels: shape must be one of 256x56x56, 512x28x28, ")
    assert result.stderr.count("\n") == 1


def test_without_a_compiler_it_says_why(monkeypatch):
    from mod_kernels.backends import triton as engine

    monkeypatch.setattr(engine, "_triton_problem", lambda: "Triton 3.5.0 is installed, 3.6 or newer is needed")
    result = CliRunner().invoke(cli.app, ["resources"])
    assert (result.exit_code, result.stderr) == (
        2,
        "mod-kernels: Triton 3.5.0 is installed, 3.6 or newer is needed\n",
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(cli.app, ["resources"])
    assert result.exit_code == 2
    assert result.stderr.startswith("mod-kernels: TRITON_INTERPRET=1 is set")
