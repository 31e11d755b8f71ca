"""Results made up for the tests of the report: rows as every suite leaves them."""

from mod_kernels.bench import paper, store
from mod_kernels.bench.store import Results, Row

MACHINE = {
    "cpu": "Made Up",
    "cores": 2,
    "isa": "AVX2",
    "caches": {"L1 Data": "32K"},
    "gpu": None,
    "torch": "2.14.0",
    "triton": None,
    "commit": "0123456789ab",
    "dirty": False,
    "date": "2026-01-01 00:00 UTC",
}
OTHER_MACHINE = MACHINE | {"cpu": "Another"}
GPU_MACHINE = MACHINE | {"gpu": "Graphics 9000", "triton": "3.8.0"}


def row(provider, median_ms=1.0, name="256x14x14", batch=8, kind="bottleneck", **fields):
    where = {"threads": 1, "device": "cpu", "dtype": "float32", "mode": "eager", "cache": "warm", "check": "ok"}
    return Row(name, kind, batch, provider=provider, median_ms=median_ms, **where | fields)


def cell(plain_ms, ours_ms, **fields):
    """A block's providers: clone and cat slower than in place, and ours by copy slower than in place."""
    clone, cat = row("plain-clone", plain_ms * 1.5, **fields), row("plain-cat", plain_ms * 1.2, **fields)
    ours = [row("cpu", ours_ms * 2, **fields), row("cpu-inplace", ours_ms, **fields)]
    return [clone, cat, row("plain-inplace", plain_ms, **fields), *ours]


def results(suite, rows, started="2026-01-01T00:00:00", machine=MACHINE, **fields):
    return Results(machine, f"mod-kernels bench {suite}", list(rows), suite=suite, started=started, **fields)


def block(shapes=("256x56x56", "2048x7x7"), batches=(1, 8), **fields):
    rows = []
    for name in shapes:
        for batch in batches:
            rows += cell(2.0 * batch, 0.5 * batch, name=name, batch=batch, bytes=10**6 * batch, **fields)
            rows += [row("floor", 0.4 * batch, name=name, batch=batch, check="none", **fields)]
            rows += [row("compile", None, name=name, batch=batch, check="left out: time", **fields)]
    return rows


def scaling():
    rows = cell(1.0, 0.5)  # the base: C=256, 14x14, N=8, k=4
    for batch in (1, 64):
        rows += cell(batch / 8, batch / 16, batch=batch)
    rows += cell(4.0, 2.0, name="256x28x28")
    rows += cell(2.0, 8.0, name="1024x14x14")  # a quarter as fast, twice as fast at 256: even halfway
    rows += cell(1.0, 4.0, k=16) + cell(9.0, 9.0, batch=1, name="256x28x28")  # the last on no axis
    return rows


def table():
    networks, rows = {}, []
    for name, dense in (("resnet50_mod", "resnet50"), ("resnet75_mod", "resnet50")):
        printed = {"top1": 75.0, "cpu_speedup": paper.MOD[name].cpu_speedup, "gpu_speedup": 1.1}
        networks[name] = {"paper": printed, "dense": dense, "parameters": 1, "multiply_adds": 1}
        networks[dense] = {"paper": {"top1": 76.0}, "parameters": 1, "multiply_adds": 1}
        of_it = {"name": name, "kind": store.PAPER, "batch": 1}
        rows += [row("dense", 90.0, **of_it), row("dense-optimized", 45.0, **of_it)]
        rows += [row("plain", 70.0, speedup=(1.29, 1.2, 1.3), **of_it)]
        rows += [row("plain-cat", 60.0, speedup=(1.5, 1.4, 1.6), **of_it)]
        rows += [row("fused", 50.0, speedup=(1.8, 1.7, 1.9), share=(0.3, 0.2, 0.4), **of_it)]
        rows += [row("optimized", 30.0, speedup=(1.5, 1.45, 1.55), **of_it)]
    return results("table", rows, networks=networks)


def sweep():
    networks = {f"resnet50_mod c={c}": {"paper": {"top1": 70.0 + c / 16}} for c in (2, 64)}
    rows = []
    for c in (64, 2):
        of_it = {"name": "resnet50_mod", "kind": store.SWEEP, "batch": 1, "c": c}
        rows += [
            row("plain", 60 + 20 / c, **of_it),
            row("fused", 50 + 10 / c, **of_it),
            row("identity", 45, **of_it),
        ]
        rows += cell(2.0 / c, 1.0 / c, kind=store.SWEEP_BLOCK, batch=1, c=c)
    return results("sweep", rows, networks=networks)


def profile():
    parts = {"plain/pool": 2.0, "plain/add": 1.0, "plain/other blocks": 40.0, "fused/MoD block": 1.5}
    return [row(part, ms, name="resnet50_mod", batch=1, kind="part") for part, ms in parts.items()]


def every_suite():
    """A run of each suite on one machine."""
    ops = [row(f"gather_channels:{how}", ms, kind="op") for how, ms in (("plain", 3.0), ("cpu", 1.0))]
    overhead = [row(p, ms, name="mod_block_", kind="op") for p, ms in (("public", 0.01), ("op", 0.005))]
    peaks = [row(p, None, peak_mib=mib) for p, mib in (("plain-clone", 40.0), ("cpu-inplace", 2.0))]
    steps = {f"resnet75_mod N=16 {way}": [(0.0, 1.0), (0.5, peak), (1.0, 0.0)] for way, peak in
             (("plain", 9.0), ("fused", 7.0))}  # fmt: skip
    network = [row(p, ms, name="resnet50_mod", kind="network") for p, ms in (("plain", 50.0), ("fused", 40.0))]
    return [
        results("block", block(bandwidth_gbs=20.0), notes=["a note"]),
        results("scaling", scaling()),
        results("ops", ops),
        results("overhead", overhead),
        results("memory", peaks),
        results("network-train", network, memory=steps),
        results("profile", profile()),
        table(),
        sweep(),
    ]


def save_all(runs, folder):
    for run in runs:
        store.save(run, folder / f"{run.suite}.jsonl")
    return folder
