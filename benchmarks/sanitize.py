"""The short list that compute-sanitizer watches: every Triton kernel, small and odd shapes, in place and not.

Runs on a GPU, or under TRITON_INTERPRET=1 on a CPU (a rehearsal). Prints how many calls it made.
"""

from __future__ import annotations

import torch

from mod_kernels import backends, functional
from mod_kernels._verify_inputs import Case, Inputs
from mod_kernels.spec import CONV_KINDS, POSITIONS

# H*W of 49, 35 and 196, several samples: what is out of bounds or races shows here as well as in a large one.
CASES = (Case(2, 64, 7, 7, 4, 8), Case(1, 40, 5, 7, 5, 3, bias=True), Case(3, 64, 14, 14, 4, 8))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = 0
    with torch.inference_mode(), backends.use_backend("triton"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for case in CASES if device == "cuda" else CASES[1:2]:
                calls += run(Inputs(case, dtype, "nchw", device, seed=0))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls on {device}")


def run(inputs: Inputs) -> int:
    """Every op on one case; a call that Triton does not serve raises."""
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
    return calls


if __name__ == "__main__":
    main()
