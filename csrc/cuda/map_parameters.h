// What the kernels on whole maps take by value: gather, fuse, add_relu_pool, input_gradient.
//
// Maps are (N, C, H, W) of float16, bfloat16 or float32, H*W written `pixels`; all of a call in one layout
// but for a NarrowMap's own. Samples are dense and stride_n values apart, and need not begin at multiples of
// 16 bytes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/layout.h"

namespace mod_kernels {

struct InputMap {
  const void* data = nullptr;
  int64_t stride_n = 0;
};
struct OutputMap {
  void* data = nullptr;
  int64_t stride_n = 0;
};
// A map of k channels, with its distance between channels and between pixels.
struct NarrowMap {
  const void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_p = 0;
};
struct MapShape {
  int64_t samples = 0;
  int channels = 0, pixels = 0;
};
// How the blocks of a launch share a sample out: set by map_plan.h. Of a map in channels_last a block takes
// `lanes` pieces of 16 bytes side by side, a chunk of the channels.
struct MapGrid {
  int parts = 1, chunks = 1, lanes = 1;
};

// out[n, j] = x[n, index[n, j]]; zero where the index is no channel. index (samples, k).
struct GatherChannels {
  InputMap x;
  OutputMap out;
  const int64_t* index = nullptr;
  MapShape shape;
  int k = 0;
  MapGrid grid;
};

// y = x, then y[n, P_j] += scores[n, j] * z[n, j]. P_j is index[n, j] if there is an index, else first + j.
// In place, y is x, and what is outside of P is not touched. scores, index (samples, k).
struct FuseChannels {
  InputMap x;
  OutputMap y;
  NarrowMap z;
  const float* scores = nullptr;
  const int64_t* index = nullptr;
  MapShape shape;
  int k = 0, first = 0;
  MapGrid grid;
};

// y = relu(a + b), pooled = mean of y over the pixels, as y is rounded. b may be null; y may be a. pooled
// (samples, C).
struct AddReluPool {
  InputMap a, b;
  OutputMap y;
  float* pooled = nullptr;
  MapShape shape;
  bool relu = true;
  MapGrid grid;
};

// dx = dy + dpooled / pixels, plus dgathered[n, j] at channel index[n, j]; then zero where y <= 0, y being
// that of `overwritten` at its channels: those that index names (original) or first to first + overwritten_k
// - 1. Every part but dy and dx may be null; overwritten needs y. dpooled (samples, C); index (samples, k).
struct InputGradient {
  InputMap dy, y;
  OutputMap dx;
  NarrowMap dgathered, overwritten;
  const float* dpooled = nullptr;
  const int64_t* index = nullptr;
  MapShape shape;
  int k = 0, overwritten_k = 0, first = 0;
  bool original = false;
  MapGrid grid;
};

template <class P>
inline constexpr bool kIsParameters = std::is_trivially_copyable_v<P> && std::is_standard_layout_v<P>;
static_assert(kIsParameters<GatherChannels> && kIsParameters<FuseChannels>);
static_assert(kIsParameters<AddReluPool> && kIsParameters<InputGradient>);

inline NarrowMap narrow_map(const void* data, int64_t stride_n, int64_t k, int64_t pixels, Layout layout) {
  const bool channels_last = layout == Layout::kChannelsLast;
  return {data, stride_n, channels_last ? 1 : pixels, channels_last ? k : 1};
}

}  // namespace mod_kernels
