"""The short list that compute-sanitizer watches: every kernel of both GPU engines, small and odd shapes, in
place and not.

Runs on a GPU, or under TRITON_INTERPRET=1 on a CPU (a rehearsal, of Triton alone). Prints how many calls it made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mod_kernels import backends, functional
from mod_kernels._verify_inputs import Case, Inputs
from mod_kernels.backends import Engine
from mod_kernels.backends.cuda import CUDA
from mod_kernels.backends.triton import TRITON
from mod_kernels.spec import CONV_KINDS, POSITIONS, MoDSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# H*W of 49, 35 and 196, several samples: what is out of bounds or races shows here as well as in a large one.
CASES = (Case(2, 64, 7, 7, 4, 8), Case(1, 40, 5, 7, 5, 3, bias=True), Case(3, 64, 14, 14, 4, 8))
# The plans of a selector too large for one program, for a small batch and for a large one; of the paper's sizes,
# whose variants are compiled by then.
LARGE_SELECTORS = (Case(1, 2048, 7, 7, 32, 128), Case(65, 2048, 7, 7, 32, 128))


def main() -> None:
    if not torch.cuda.is_available():
        print(f"{run_all(rehearsal(), 'cpu', TRITON)} calls on cpu")
        return
    for engine in (TRITON, CUDA):
        status = engine.describe()["status"]
        if status == "ok":
            status = f"{run_all(jobs(), 'cuda', engine)} calls on cuda"
            torch.cuda.synchronize()
        print(f"{engine.name}: {status}")


Job = tuple[Callable[[Inputs, Engine], int], Case, torch.dtype, str]


def jobs() -> list[Job]:
    """What to run, on which case, dtype and layout."""
    found = [(run, case, dtype, "nchw") for dtype in DTYPES for case in CASES]
    found.append((run, CASES[1], torch.float16, "channels_last"))
    return found + [(run_large, case, torch.float16, "nchw") for case in LARGE_SELECTORS]


def rehearsal() -> list[Job]:
    """What the interpreter does in seconds."""
    return [(run, CASES[1], dtype, "nchw") for dtype in DTYPES]


def run_all(wanted: list[Job], device: str, engine: Engine) -> int:
    """The number of calls made; one that the engine does not serve raises."""
    with torch.inference_mode(), backends.use_backend(engine.name):
        return sum(
            work(Inputs(case, dtype, layout, device, seed=0), engine) for work, case, dtype, layout in wanted
        )


def run(inputs: Inputs, engine: Engine) -> int:
    """Every op on one case."""
    calls = 0
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
    functional.select_channels(x, spec.fc1_weight, spec.fc2_weight, spec.k, spec.fc1_bias, spec.fc2_bias)
    functional.gather_channels(x, inputs.index())
    functional.add_relu_pool(x, inputs.residual())
    functional.add_relu_pool_(inputs.feature_map())
    calls += 4
    for position in POSITIONS:
        z, scores, index = inputs.branch(False), inputs.scores(), inputs.index()
        functional.fuse_channels(x, z, scores, index, position)
        functional.fuse_channels_(inputs.feature_map(), z, scores, index, position)
        calls += 2
        for kind in CONV_KINDS:
            spec = inputs.spec(kind, position)
            functional.mod_block(x, spec)
            functional.mod_block_(inputs.feature_map(), spec)
            calls += 2
            calls += call(engine, "tail_", inputs.feature_map(), scores, index, *spec.conv_arguments)
            calls += call_pair(inputs, spec, engine)
    return calls + run_backward(inputs, engine)


def call(engine: Engine, name: str, *arguments: object) -> int:
    """Run a raw op if the engine has it: 1 if it has, else 0."""
    if name not in engine.ops:
        return 0
    engine.ops[name](*arguments)
    return 1


def call_pair(inputs: Inputs, spec: MoDSpec, engine: Engine) -> int:
    """An ending and a block as one op, in place, if the engine has it."""
    arguments = (*spec.selector_arguments, spec.k, *spec.conv_arguments)
    return call(engine, "add_relu_mod_block_", inputs.feature_map(), inputs.residual(), True, *arguments)


def run_backward(inputs: Inputs, engine: Engine) -> int:
    """The backward ops, with every part and every gradient."""
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
    scores, index, pooled = inputs.scores(), inputs.index(), inputs.pooled()
    hidden = torch.relu(pooled @ spec.fc1_weight.float().t())
    forward = (scores, index, hidden, pooled, spec.fc1_weight, spec.fc2_weight)
    calls = call(engine, "select_channels_backward", inputs.scores(), *forward, *[True] * 5)
    for position in POSITIONS:
        z, y = inputs.branch(False), inputs.residual().relu()
        calls += call(engine, "fuse_channels_backward", x, z, scores, index, position, True, True)
        before = inputs.branch(False).relu()
        calls += call(engine, "input_gradient", x, pooled, z, index, y, before, position)
    return calls


def run_large(inputs: Inputs, engine: Engine) -> int:
    """The selector and a block, by itself and with its ending."""
    x, spec = inputs.feature_map(), inputs.spec("bottleneck", "first")
    functional.select_channels(x, spec.fc1_weight, spec.fc2_weight, spec.k)
    functional.mod_block(x, spec)
    functional.mod_block_(x, spec)
    return 3 + call_pair(inputs, spec, engine)


if __name__ == "__main__":
    main()
