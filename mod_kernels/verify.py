"""The numerics check: every op of every backend that can run here, against float64, in three stages.

A flipped selection is a jump, so one comparison of outputs can't judge a kernel:

1. the kernel's logits against float64, within the tolerance of the table in :mod:`mod_kernels._tolerances`;
2. its selection: exactly the top k of its own logits under the tie rule, and no chosen channel's float64 logit
   below the k-th float64 logit by more than twice that tolerance;
3. the rest, given the kernel's own index and scores: against float64, and bit for bit where x passes through.

A block returns its logits alone: index and scores follow from them (``reference.rank_channels``, sigmoid). Its
stage 2 is thereby part of stage 3: a block that selected anything else writes other values.

Gradients are checked the same way, given the forward's own selection (:mod:`mod_kernels._verify_gradients`).

Fresh outputs are filled with NaN before a kernel sees them, so that what it forgets to write shows.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.backends import cudnn

from . import _verify_gradients, backends, functional, reference
from ._fresh_memory import poisoned
from ._layout import layout_of
from ._library import accumulation_dtype
from ._tolerances import LOGITS, VALUES, relative_norm, relative_to_largest
from ._verify_inputs import Case, Inputs, cases, spec_in_float64, special_cases
from .spec import CONV_KINDS, MoDSpec, read_form, unpacked

LAYOUTS = ("nchw", "channels_last", "sliced")
BACKENDS = ("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Row:
    """One comparison. ``served`` is False where the backend does not take the case; ``note`` then says why."""

    backend: str
    op: str
    dtype: str
    layout: str
    shape: str
    stage: str
    error: float
    bound: float
    ok: bool
    served: bool = True
    note: str = ""


@dataclass
class Report:
    """What :func:`verify` found; ``seed`` draws the same inputs again."""

    device: str
    seed: int
    rows: list[Row] = field(default_factory=list)

    @property
    def checked(self) -> list[Row]:
        return [row for row in self.rows if row.served]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Something was checked, and none of it failed."""
        return bool(self.checked) and not self.failed


def verify(
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    backends: tuple[str, ...] = BACKENDS,
    quick: bool = False,
    seed: int | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Check ``backends`` on ``device``: every op, every kind of block, three positions, every layout.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: of x; the weights are of the same dtype in some cases and float32 in others.
        backends: names; one that can't serve a case is reported with its reason, never left out.
        quick: small shapes only, without the paper's, and no sliced views.
        seed: of the inputs; drawn if None.
        on_row: called with each row as it is found.
    """
    report = Report(device, random.randrange(2**31) if seed is None else seed)
    # cuDNN runs float32 convolutions in tf32 unless told not to; only the reference has any.
    with cudnn.flags(enabled=True, allow_tf32=False):
        for backend, dtype, layout in itertools.product(backends, dtypes, LAYOUTS[:2] if quick else LAYOUTS):
            for row in _Checker(backend, dtype, layout, device, report.seed).rows(quick):
                report.rows.append(row)
                on_row(row)
    return report


class _Checker:
    """All checks of one backend, dtype and layout; each method yields rows."""

    def __init__(self, backend: str, dtype: torch.dtype, layout: str, device: str, seed: int) -> None:
        self.backend, self.dtype, self.layout, self.device, self.seed = backend, dtype, layout, device, seed
        self.interpreted = backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        self.shape = ""

    def rows(self, quick: bool) -> Iterator[Row]:
        if self.backend == "reference" and self.dtype == torch.float64:
            yield self._row("all", "served", served=False, note="it is the oracle: nothing to compare it with")
            return
        for number, case in enumerate(cases(quick or self.backend == "reference", self.interpreted, self.layout)):
            inputs = self._begin(case, number)
            yield from self._select(inputs, given_pooled=False)
            yield from self._select(inputs, given_pooled=True)
            yield from self._gather(inputs)
            for position, in_place in itertools.product(case.positions, (False, True)):
                yield from self._fuse(inputs, position, in_place, other_layout=number % 2 == 1)
            yield from self._add_relu_pool(inputs, in_place=False)
            yield from self._add_relu_pool(inputs, in_place=True)
            for kind, position, in_place in itertools.product(CONV_KINDS, case.positions, (False, True)):
                yield from self._mod_block(inputs, kind, position, in_place)
            yield from self._gradients(inputs)
        for number, case in enumerate(special_cases(self.interpreted)):
            yield from self._select(self._begin(case, 100 + number), given_pooled=False)

    def _begin(self, case: Case, number: int) -> Inputs:
        self.shape = str(case)
        return Inputs(case, self.dtype, self.layout, self.device, self.seed + number)

    # ---- one op each

    def _select(self, inputs: Inputs, given_pooled: bool) -> Iterator[Row]:
        name, ending = "select_channels", " pooled" if given_pooled else ""
        label = f"{name}_saving{ending}"
        x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
        pooled = inputs.pooled() if given_pooled else None
        if given_pooled:
            x.fill_(float("nan"))  # must not be read
        w1, w2, b1, b2 = spec.selector_arguments
        ops = yield from self._served(name, label, x, w1, w2, spec.k, b1, b2, pooled)
        if ops is None:
            return
        before = x.clone()
        arguments = (x, w1, w2, b1, b2, pooled, spec.k)
        outputs = yield from self._run(label, ops[f"{name}_saving"], *arguments)
        if outputs is None:
            return
        scores, index, logits, hidden, pooled_out = outputs
        lean = yield from self._run(name + ending, ops[name], *arguments)
        if lean is not None:
            yield self._bitwise(name + ending, "scores", lean[0], scores)
            yield self._bitwise(name + ending, "selection", lean[1], index)
        if not given_pooled:
            yield self._bitwise(label, "input", x, before)
        yield from self._stages_1_and_2(label, inputs, self._exact_logits(x, pooled, spec), scores, index, logits)
        if inputs.case.values == "nan":
            return
        mean = x.double().mean((2, 3)) if pooled is None else pooled
        if pooled is None:
            yield self._row(label, "pooled", relative_to_largest(pooled_out, mean), LOGITS[self.dtype])
        bias = None if b1 is None else b1.double()
        expected = torch.relu(torch.nn.functional.linear(mean.double(), w1.double(), bias))
        yield self._row(label, "hidden", relative_to_largest(hidden, expected), LOGITS[self.dtype])

    def _gather(self, inputs: Inputs) -> Iterator[Row]:
        x, index = inputs.feature_map(), inputs.index()
        x = inputs.with_specials(x, index[:, :1])
        name = "gather_channels"
        ops = yield from self._served(name, name, x, index)
        if ops is None:
            return
        out = yield from self._run(name, ops[name], x, index)
        if out is not None:
            yield self._bitwise(name, "values", out, reference.gather_channels(x, index))

    def _fuse(self, inputs: Inputs, position: str, in_place: bool, other_layout: bool) -> Iterator[Row]:
        name = "fuse_channels_" if in_place else "fuse_channels"
        label = f"{name} {position}"
        z, scores, index = inputs.branch(other_layout), inputs.scores(), inputs.index()
        touched = _touched(inputs.case, index, position)
        untouched = (
            (~touched).int().argsort(dim=1, descending=True, stable=True)[:, : inputs.case.c - inputs.case.k]
        )
        # In the first and the last channel that passes through.
        x = inputs.with_specials(inputs.feature_map(), untouched[:, :: max(1, untouched.shape[1] - 1)])
        ops = yield from self._served(name, label, x, z, scores, index, position)
        if ops is None:
            return
        target = _Target(x, self.layout) if in_place else None
        y = yield from self._run(
            label, ops[name], target.x if in_place else x, z, scores, index, position, in_place=in_place
        )
        if y is None:
            return
        oracle = reference.fuse_channels(x.double(), z.double(), scores.double(), index, position)
        yield from self._stage_3(label, y, oracle, x, touched, target)

    def _add_relu_pool(self, inputs: Inputs, in_place: bool) -> Iterator[Row]:
        name = "add_relu_pool_" if in_place else "add_relu_pool"
        a, b = inputs.feature_map(), inputs.residual()
        ops = yield from self._served(name, name, a, b, True)
        if ops is None:
            return
        target = _Target(a, self.layout) if in_place else None
        outputs = yield from self._run(name, ops[name], target.x if in_place else a, b, True)
        if outputs is None:
            return
        y, pooled = (target.x, outputs) if in_place else outputs
        oracle, _ = reference.add_relu_pool(a.double(), b.double())
        yield from self._stage_3(name, y, oracle, a, torch.ones(a.shape[:2], dtype=torch.bool), target)
        mean = y.double().mean((2, 3))
        yield self._row(name, "pooled", relative_norm(pooled, mean), VALUES[accumulation_dtype(self.dtype)])

    def _mod_block(self, inputs: Inputs, kind: str, position: str, in_place: bool) -> Iterator[Row]:
        name = "mod_block_" if in_place else "mod_block"
        label = f"{name} {kind} {position}"
        x, spec = inputs.feature_map(), inputs.spec(kind, position)
        ops = yield from self._served(name, label, x, spec)
        if ops is None:
            return
        target = _Target(x, self.layout) if in_place else None
        arguments = (*spec.selector_arguments, None, spec.k, *spec.conv_arguments)
        before = x.clone()
        outputs = yield from self._run(label, ops[name], target.x if in_place else x, *arguments)
        if outputs is None:
            return
        y, logits = (target.x, outputs) if in_place else outputs
        if not in_place:
            yield self._bitwise(label, "input", x, before)
        yield self._logits_row(label, logits, self._exact_logits(x, None, spec))
        index = reference.rank_channels(logits, spec.k)
        scores = torch.sigmoid(logits.double().gather(1, index))
        x64, spec64 = x.double(), spec_in_float64(spec)
        z = reference.narrow_conv_block(reference.gather_channels(x64, index), spec64)
        oracle = reference.fuse_channels(x64, z, scores, index, position)
        yield from self._stage_3(label, y, oracle, x, _touched(inputs.case, index, position), target)

    def _gradients(self, inputs: Inputs) -> Iterator[Row]:
        if inputs.case.n == 0 or not _verify_gradients.served(self.backend, inputs):
            return  # the forward's rows say why
        checks = {
            "select_channels": _verify_gradients.of_select(inputs, given_pooled=False),
            "select_channels pooled": _verify_gradients.of_select(inputs, given_pooled=True),
            "add_relu_pool": _verify_gradients.of_ending(inputs),
        }
        checks |= {f"block {p}": _verify_gradients.of_block(inputs, p) for p in inputs.case.positions}
        with backends.use_backend(self.backend):
            for label, check in checks.items():
                try:
                    for one in check:
                        yield self._row(f"{label} gradient", f"d{one.name}", one.error, one.bound)
                except RuntimeError as error:
                    yield self._failed_to_run(f"{label} gradient", error)

    # ---- the stages

    def _exact_logits(self, x: Tensor, pooled: Tensor | None, spec: MoDSpec) -> Tensor:
        given = None if pooled is None else pooled.double()
        return reference.selector_logits(x.double(), *spec_in_float64(spec).selector_arguments, pooled=given)

    def _logits_row(self, label: str, logits: Tensor, exact: Tensor) -> Row:
        """Stage 1."""
        return self._row(label, "logits", relative_to_largest(logits, exact), LOGITS[self.dtype])

    def _stages_1_and_2(self, label, inputs, exact, scores, index, logits) -> Iterator[Row]:
        """Rows for logits, selection and scores."""
        finite = inputs.case.values != "nan"
        if finite:
            yield self._logits_row(label, logits, exact)
        expected = reference.rank_channels(logits, inputs.case.k)
        wrong = int((index != expected).sum()) if index.shape == expected.shape else float("inf")
        yield self._row(label, "selection", wrong, 0)
        if wrong or not finite:
            return  # a wrong index may not even be in range
        yield self._row(label, "chosen", _shortfall(exact, index), 2 * LOGITS[self.dtype])
        own = torch.sigmoid(logits.double().gather(1, index))
        yield self._row(label, "scores", relative_norm(scores, own), VALUES[accumulation_dtype(self.dtype)])

    def _stage_3(self, label, y, oracle, x, touched, target) -> Iterator[Row]:
        """Rows for the written channels and for those that pass through."""
        if y.shape != x.shape or y.dtype != x.dtype or layout_of(y) != layout_of(x):
            got = f"{tuple(y.shape)} {y.dtype} {layout_of(y)}, not as x"
            yield self._row(label, "values", float("inf"), VALUES[self.dtype], note=got)
            return
        touched = touched.to(x.device)
        yield self._row(label, "values", relative_norm(y[touched], oracle[touched]), VALUES[self.dtype])
        yield self._bitwise(label, "pass-through", y[~touched], x[~touched])
        if target is not None and target.between is not None:
            yield self._row(label, "between samples", int((~target.between.isnan()).sum()), 0)

    def _bitwise(self, label: str, stage: str, actual: Tensor, expected: Tensor) -> Row:
        """A row whose error is the number of elements that differ in any bit."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return self._row(label, stage, float("inf"), 0, note=f"got {tuple(actual.shape)} {actual.dtype}")
        return self._row(label, stage, int((_bits(actual) != _bits(expected)).sum()), 0)

    # ---- running

    def _served(self, op: str, label: str, *arguments) -> Iterator[Row]:
        """The raw ops of the backend if it serves the call (asked through explain), else a row saying why not."""
        with backends.use_backend(self.backend):
            explanation = functional.explain(op, *arguments)
            if explanation.backend == self.backend:
                engine = backends.choose(functional._CALLS[op](*arguments))
                return _REFERENCE if engine is None else engine.ops
        yield self._row(
            label, "served", served=False, note=explanation.reasons.get(self.backend, "no reason given")
        )
        return None

    def _run(self, label: str, op: Callable, *arguments, in_place: bool = False) -> Iterator[Row]:
        """The op's result (its first argument if it returns none), fresh memory poisoned; or a failed row."""
        try:
            with poisoned():
                result = op(*arguments)
        except RuntimeError as error:
            yield self._failed_to_run(label, error)
            return None
        return arguments[0] if in_place else result

    def _failed_to_run(self, label: str, error: RuntimeError) -> Row:
        return self._row(label, "ran", float("inf"), 0, note=str(error).partition("\n")[0])

    def _row(self, op, stage, error=0.0, bound=0.0, served=True, note="") -> Row:
        dtype = str(self.dtype).removeprefix("torch.")
        ok = not served or error <= bound  # a NaN is not
        return Row(self.backend, op, dtype, self.layout, self.shape, stage, float(error), bound, ok, served, note)


class _Target:
    """A copy of x to be written into; a sliced one has NaN between its samples, which must stay."""

    def __init__(self, x: Tensor, layout: str) -> None:
        self.between = None
        if layout == "sliced":
            wide = torch.full((2 * x.shape[0], *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
            self.x, self.between = wide[::2], wide[1::2]
            self.x.copy_(x)
        else:
            self.x = x.clone()


def _touched(case: Case, index: Tensor, position: str) -> Tensor:
    """(N, C) bool: the channels that a block at ``position`` writes."""
    touched = torch.zeros((case.n, case.c), dtype=torch.bool, device=index.device)
    if position == "original":
        return touched.scatter(1, index, True)
    first = 0 if position == "first" else case.c - case.k
    touched[:, first : first + case.k] = True
    return touched


def _shortfall(exact: Tensor, index: Tensor) -> float:
    """How far the worst chosen channel is below the k-th best, as a share of the largest logit."""
    if exact.numel() == 0:
        return 0.0
    lowest_allowed = exact.topk(index.shape[1]).values[:, -1:]
    shortfall = (lowest_allowed - exact.gather(1, index)).amax().clamp(min=0)
    return float(shortfall / exact.abs().amax().clamp(min=torch.finfo(exact.dtype).tiny))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_BITS[x.element_size()])


def _reference_select_saving(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    """The reference with a raw op's arguments and returns: its sanity row is measured like any engine."""
    logits = reference.selector_logits(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled)
    scores, index = reference.select_channels(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)
    dtype = logits.dtype
    mean = x.mean((2, 3), dtype=dtype) if pooled is None else pooled
    bias = None if fc1_bias is None else fc1_bias.to(dtype)
    hidden = torch.relu(torch.nn.functional.linear(mean, fc1_weight.to(dtype), bias))
    return scores, index, logits, hidden, mean if pooled is None else mean.new_empty(0)


def _reference_select(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k):
    return reference.select_channels(x, fc1_weight, fc2_weight, k, fc1_bias, fc2_bias, pooled)


def _reference_block_(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled, k, conv_parameters, form):
    kind, _, relu, position = read_form(form)
    weights, biases = unpacked(conv_parameters, form, k)
    spec = MoDSpec(fc1_weight, fc2_weight, k, kind, weights, biases, fc1_bias, fc2_bias, position, relu)
    logits = reference.selector_logits(x, fc1_weight, fc2_weight, fc1_bias, fc2_bias, pooled)
    reference.mod_block_(x, spec, pooled)
    return logits


def _reference_block(x, *arguments):
    y = x.clone(memory_format=torch.channels_last if layout_of(x) == "channels_last" else torch.contiguous_format)
    return y, _reference_block_(y, *arguments)


_REFERENCE: dict[str, Callable] = {
    "select_channels": _reference_select,
    "select_channels_saving": _reference_select_saving,
    "gather_channels": reference.gather_channels,
    "fuse_channels": reference.fuse_channels,
    "fuse_channels_": reference.fuse_channels_,
    "add_relu_pool": reference.add_relu_pool,
    "add_relu_pool_": lambda a, b, relu: reference.add_relu_pool_(a, b, relu)[1],
    "mod_block": _reference_block,
    "mod_block_": _reference_block_,
}
