"""pytest-benchmark suite of the block: every engine that runs here against the plain forms, grouped by shape.

    python -m pytest benchmarks/test_block.py                       one thread
    python -m pytest benchmarks/test_block.py --benchmark-autosave  keep the results

A provider is checked against float64 before it is timed. An engine that this machine has, but that does not serve
the block, fails its benchmark instead of being timed as something else.
"""

from __future__ import annotations

import pytest
import torch

from mod_kernels import backends, functional
from mod_kernels.bench import providers
from mod_kernels.bench.check import check, exact_logits
from mod_kernels.bench.shapes import BOTTLENECK, make_spec, make_x

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
FORMS = (*providers.PLAIN, "ours", "ours-inplace")
# The buffer of an in-place form is refilled between rounds; so many calls leave its values finite.
CALLS_A_ROUND, ROUNDS, WARMUP_ROUNDS = 10, 20, 3


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _provider(form: str, engine: str, spec, x):
    if form in providers.PLAIN:
        return providers.plain_provider(form.removeprefix("plain-"), spec)
    op = functional.mod_block_ if form == "ours-inplace" else functional.mod_block
    explanation = functional.explain(op, x, spec)
    assert explanation.backend == engine, str(explanation)
    assert not explanation.copies
    return providers.engine_provider(engine, spec, form == "ours-inplace", x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("shape", BOTTLENECK, ids=lambda shape: shape.name)
@pytest.mark.parametrize("device", DEVICES)
def test_block(benchmark, one_thread, device, shape, batch, form):
    engine, dtype = providers.ENGINES[device], torch.float32 if device == "cpu" else torch.float16
    benchmark.group = f"{device} {shape.name} N={batch}, {CALLS_A_ROUND} calls"
    spec = make_spec(shape, dtype, device)
    x = make_x(shape, batch, spec)
    with torch.inference_mode(), backends.use_backend(engine):
        if form.startswith("ours") and backends.engines()[engine]["status"] != "ok":
            pytest.skip(f"{engine}: {backends.engines()[engine]['status']}")
        provider = _provider(form, engine, spec, x)
        assert check(provider, x, spec, exact_logits(x, spec), ours=form.startswith("ours")) == ""
        given = x.clone() if provider.in_place else x

        def refill():
            if provider.in_place:
                given.copy_(x)

        def calls():
            for _ in range(CALLS_A_ROUND):
                provider.run(given)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(calls, setup=refill, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
