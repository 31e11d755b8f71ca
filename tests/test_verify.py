"""The numerics check finds what it is for: each way of being wrong is built in and must show, at its own stage."""

import pytest
import torch

from mod_kernels import MoDSpec, _remembered, _tolerances, _verify_table, backends, reference, verify
from mod_kernels._layout import memory_format_of
from mod_kernels._verify_inputs import _SMALL
from mod_kernels.spec import CONV_KINDS, POSITIONS, read_form, unpacked
from mod_kernels.verify import LAYOUTS, _reference_block_

from .oracle_engine import _fuse_channels, _fuse_channels_, _gather_channels, _select_channels_saving

pytestmark = pytest.mark.usefixtures("one_thread")


def _block(x, *arguments):
    y = x.clone(memory_format=torch.preserve_format if x.is_contiguous() else memory_format_of(x))
    return y, _reference_block_(y, *arguments)


def selecting(saving):
    """Both ops of a selection, from the one that returns everything."""
    return {"select_channels": lambda *a: saving(*a)[:2], "select_channels_saving": saving}


def selecting_block_(select):
    """mod_block_ with a selection of its own: scores, index and logits first of what ``select`` gives."""

    def block_(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form):
        selector = (fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k)
        scores, index, logits, *_ = select(x, *selector)
        kind, _, relu, position = read_form(form)
        spec = MoDSpec(fc1_weight, fc2_weight, k, kind, *unpacked(conv_parameters, form, k), final_relu=relu)
        z = reference.narrow_conv_block(reference.gather_channels(x, index), spec)
        reference.fuse_channels_(x, z, scores, index, position)
        return logits

    return block_


class Broken(backends.Engine):
    """Right in float32 and float16 until a test replaces an op."""

    name = "cpu"

    def __init__(self):
        self.ops = {
            **selecting(_select_channels_saving),
            "gather_channels": _gather_channels,
            "fuse_channels": _fuse_channels,
            "fuse_channels_": _fuse_channels_,
            "mod_block": _block,
            "mod_block_": _reference_block_,
        }

    def supports(self, call):
        if call.dtype not in (torch.float32, torch.float16):
            return backends.Support(False, f"{call.dtype} is not served")
        return backends.Support(call.op in self.ops, "" if call.op in self.ops else f"{call.op} is not served")


@pytest.fixture
def two_shapes(monkeypatch):
    monkeypatch.setattr(verify, "cases", lambda *_: (_SMALL[1], _SMALL[4]))


@pytest.fixture
def engine(monkeypatch):
    engine = Broken()
    monkeypatch.setitem(backends._ENGINES, "cpu", engine)
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(_remembered, "_passed", {})
    return engine


def run(dtype=torch.float32, **options):
    return verify.verify(dtypes=(dtype,), backends=("cpu",), quick=True, seed=7, **options)


def failed(report):
    return {(row.op.split()[0], row.stage) for row in report.failed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_right_engine_passes(engine, dtype):
    report = run(dtype)
    assert report.failed == []
    assert report.ok
    ops = {row.op.split()[0] for row in report.checked}
    assert ops == set(engine.ops)
    assert {row.layout for row in report.checked} == set(LAYOUTS[:2])
    # What is not served is there, with its reason.
    assert {row.note for row in report.rows if not row.served} == {
        "add_relu_pool is not served",
        "add_relu_pool_ is not served",
    }


def test_a_selector_in_low_precision_fails_stage_1(engine, two_shapes):
    def select(x, fc1_weight, fc2_weight, *rest):
        return _select_channels_saving(x, fc1_weight.half().float(), fc2_weight.half().float(), *rest)

    engine.ops |= selecting(select)
    found = failed(run())
    assert ("select_channels_saving", "logits") in found
    assert {op for op, _ in found} == {"select_channels_saving"}


def test_a_flipped_selection_fails_stage_2(engine, two_shapes):
    def select(*arguments):
        scores, index, *rest = _select_channels_saving(*arguments)
        return scores, index.flip(1), *rest

    engine.ops |= selecting(select)
    assert ("select_channels_saving", "selection") in failed(run())


def test_ties_to_the_higher_channel_fail_stage_2(engine, two_shapes):
    def select(*arguments):
        scores, index, logits, *rest = _select_channels_saving(*arguments)
        if logits.numel() and bool((logits == logits[0, 0]).all()):
            index = logits.shape[1] - 1 - index
        return scores, index, logits, *rest

    engine.ops |= selecting(select)
    report = run()
    assert {(row.stage, row.shape) for row in report.failed} == {("selection", "3x64x7x7 k=4 tied")}


def test_a_selection_of_its_own_wrong_logits_fails(engine, two_shapes):
    # Consistent with itself, so only the comparison with float64 can tell.
    def select(x, fc1_weight, fc2_weight, *rest):
        return _select_channels_saving(x, fc1_weight, -fc2_weight, *rest)

    engine.ops |= selecting(select)
    found = failed(run())
    assert {("select_channels_saving", "logits"), ("select_channels_saving", "chosen")} <= found


def test_a_wrong_score_fails(engine, two_shapes):
    def select(*arguments):
        scores, *rest = _select_channels_saving(*arguments)
        return scores * 1.001, *rest

    engine.ops |= selecting(select) | {"mod_block_": selecting_block_(select)}
    assert failed(run()) == {("select_channels_saving", "scores"), ("mod_block_", "values")}


@pytest.mark.parametrize("wrong", ["another channel", "another order"])
def test_a_block_that_selects_otherwise_fails_stage_3(engine, two_shapes, wrong):
    """A block says nothing of its index; what it writes does."""

    def select(*arguments):
        scores, index, logits, *rest = _select_channels_saving(*arguments)
        k = index.shape[1]
        if wrong == "another channel":  # the best of the others instead of the worst of its own
            index = torch.cat([index[:, :-1], reference.rank_channels(logits, k + 1)[:, -1:]], 1)
        else:
            index = torch.cat([index[:, :-2], index[:, -2:].flip(1)], 1)
        return scores, index, logits, *rest

    engine.ops["mod_block_"] = selecting_block_(_select_channels_saving)
    assert failed(run()) == set()
    engine.ops["mod_block_"] = selecting_block_(select)
    found = {(row.op, row.stage) for row in run().failed}
    blocks = {f"mod_block_ {kind} {position}" for kind in CONV_KINDS for position in POSITIONS}
    assert {op for op, stage in found if stage == "values"} == blocks
    assert {op for op, stage in found if stage != "values"} <= {op for op in blocks if op.endswith("original")}


def test_a_lean_selection_that_differs_in_a_bit_fails(engine, two_shapes):
    def lean(*arguments):
        scores, index, *_ = _select_channels_saving(*arguments)
        return torch.nextafter(scores, torch.ones_like(scores)), index.flip(1)

    engine.ops["select_channels"] = lean
    assert failed(run()) == {("select_channels", "scores"), ("select_channels", "selection")}


def test_reading_x_when_pooled_is_given_fails(engine, two_shapes):
    def select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
        outputs = _select_channels_saving(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, None, k)
        return outputs if pooled is None else (*outputs[:4], outputs[4].new_empty(0))

    engine.ops |= selecting(select)
    assert {row.op for row in run().failed} == {"select_channels_saving pooled"}


def test_writing_a_channel_that_passes_through_fails(engine, two_shapes):
    def fuse_(x, z, scores, index, position):
        _fuse_channels_(x, z, scores, index, position)
        if position == "first":
            x[:, -1] += 0.0  # -0.0 becomes +0.0: equal, but not the same bits

    engine.ops["fuse_channels_"] = fuse_
    assert {(row.op, row.stage) for row in run().failed} == {("fuse_channels_ first", "pass-through")}


def test_rounding_between_the_convolutions_fails_stage_3(engine, two_shapes):
    def block(x, *arguments):
        *selector, conv_parameters, form = arguments
        return _block(x, *selector, conv_parameters.half().float(), form)

    engine.ops["mod_block"] = block
    assert failed(run()) == {("mod_block", "values")}


def test_an_output_that_is_not_written_fails(engine, two_shapes):
    def fuse(x, z, scores, index, position):
        y = torch.empty_like(x)  # NaN, through the poisoning
        right = _fuse_channels(x, z, scores, index, position)
        y[:, 1:] = right[:, 1:]
        return y

    engine.ops["fuse_channels"] = fuse
    assert {("fuse_channels", "values"), ("fuse_channels", "pass-through")} <= failed(run())


def test_writing_into_the_input_fails(engine, two_shapes):
    def block(x, *arguments):
        return x, _reference_block_(x, *arguments)

    engine.ops["mod_block"] = block
    assert ("mod_block", "input") in failed(run())


def test_a_write_between_the_samples_of_a_view_fails(engine, two_shapes):
    def fuse_(x, z, scores, index, position):
        _fuse_channels_(x, z, scores, index, position)
        if x.shape[0] > 1 and not x.is_contiguous() and x.stride(0) == 2 * x[0].numel():
            torch.as_strided(x, (1,), (1,), x[0].numel()).fill_(0)

    engine.ops["fuse_channels_"] = fuse_
    report = verify.Report("cpu", 7)
    report.rows = list(verify._Checker("cpu", torch.float32, "sliced", "cpu", 7).rows(quick=True))
    assert failed(report) == {("fuse_channels_", "between samples")}


def test_a_lost_layout_fails(engine, two_shapes):
    engine.ops["fuse_channels"] = lambda *arguments: _fuse_channels(*arguments).contiguous()
    assert {(row.layout, row.stage) for row in run().failed} == {("channels_last", "values")}


def test_a_kernel_that_raises_is_a_failed_row(engine, two_shapes):
    def gather(x, index):
        raise RuntimeError("no kernel image\nmore")

    engine.ops["gather_channels"] = gather
    report = run()
    assert failed(report) == {("gather_channels", "ran")}
    assert report.failed[0].note == "no kernel image"


def test_nothing_served_is_not_ok():
    report = verify.verify(dtypes=(torch.float32,), backends=("cuda",), quick=True)
    assert report.checked == []
    assert not report.ok
    assert report.rows
    assert list(_verify_table.not_served(report)) == ["cuda"]


def test_the_state_of_torch_is_restored(engine, two_shapes):
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    run()
    after = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    assert after == before


def test_the_same_seed_draws_the_same_inputs(engine, two_shapes):
    errors = [[row.error for row in run().checked] for _ in range(2)]
    assert errors[0] == errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_reference_against_float64(dtype, two_shapes):
    report = verify.verify(dtypes=(dtype,), backends=("reference",), quick=True)
    assert report.failed == []
    assert report.ok


def test_the_worst_row_of_a_group_is_the_failed_one(engine, two_shapes):
    test_rounding_between_the_convolutions_fails_stage_3(engine, two_shapes)
    worst = _verify_table.worst(run())
    assert not worst["cpu", "mod_block", "float32", "nchw"].ok
    assert worst["cpu", "mod_block_", "float32", "nchw"].ok


def test_norms():
    one = torch.ones(3)
    assert _tolerances.relative_norm(one, one) == 0
    assert _tolerances.relative_norm(torch.zeros(0), torch.zeros(0)) == 0
    assert _tolerances.relative_norm(one, torch.zeros(3)) == float("inf")
    assert not _tolerances.relative_norm(torch.full((3,), float("nan")), one) <= 1
    assert _tolerances.relative_to_largest(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2.0])) == 1
