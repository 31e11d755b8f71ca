"""Where a value lies in memory, for kernels that serve NCHW and channels_last."""

import triton
import triton.language as tl


@triton.jit
def offset_in_sample(channel, pixel, hw, C: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Elements from the start of a sample (C, H, W) to (channel, pixel); integers as wide as the two given."""
    if CHANNELS_LAST:
        return pixel * C + channel
    return channel * hw + pixel
