"""Every variant of the paper's shapes compiles, for six architectures, within its registers. No GPU needed."""

import os

import pytest

from mod_kernels.backends.triton import compile as ahead_of_time
from mod_kernels.backends.triton import configs

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are Python functions under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

# ptxas now and then spills two or three registers rather than take a step down in occupancy; which variant it
# picks changes with Triton's version. More than that is a tile too large for its threads.
MOST_SPILLED = 16  # bytes
MOST_SHARED = 32 * 1024  # bytes: three programs fit where a multiprocessor has 100 KB (8.6, 8.9, 12.0)


def everywhere(variant):
    """What is compiled for every architecture: the tail, which has the most registers and ranks as well.

    The rest is compiled for 9.0 only, to keep the whole at some four minutes of processor time.
    """
    return variant.kernel == "tail_fwd_kernel"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", configs.PAPER_SHAPES, ids=lambda s: f"{s.kind}-{s.channels}-{s.hw}")
@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_variants(capability, shape, dtype):
    for variant in dict.fromkeys(configs.variants(shape, dtype)):
        if capability == 90 or everywhere(variant):
            resources = ahead_of_time.compile_variant(variant, capability)
            assert resources.spill_stores <= MOST_SPILLED, (variant, resources)
            assert resources.spill_loads <= MOST_SPILLED, (variant, resources)
            assert resources.shared <= MOST_SHARED, (variant, resources)


def test_spills_would_be_seen():
    """A tile far too large for its threads: the numbers above are read, not assumed."""
    selector = configs.Selector(("fp32",) * 5, 1, 64, 4, 2, 4096, 16)
    variant = configs.pool_variant(selector)
    constants = dict(variant.constexprs) | {"CHUNK_C": 64, "BLOCK_HW": 1024}
    oversized = configs.Variant(variant.kernel, variant.signature, tuple(constants.items()), num_warps=4)
    assert ahead_of_time.compile_variant(oversized, 80).spill_stores > MOST_SPILLED
