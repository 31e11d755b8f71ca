// The one pass over a feature map's gradient.
#pragma once

#include "fuse.h"

namespace mod_kernels {

// For every element of (N, C, H, W):
//   dx[n, c] = dy[n, c] + dpooled[n, c] / (H W) + sum of dgathered[n, j] over the j with index[n, j] == c
// and zero where the ReLU's output is <= 0 (not where it is NaN): y[n, c], but at the channels P of position
// overwritten[n, j]. Summed in the accumulation dtype, rounded once. What is null is left out.
template <class T>
struct InputGradient {
  FeatureMap<T> dy, dx, y;                 // (N, C, H, W), in one layout
  FeatureMap<T> dgathered, overwritten;    // (N, k, H, W), in that layout too
  const Accumulate<T>* dpooled = nullptr;  // (N, C)
  const int64_t* index = nullptr;  // (N, k), for dgathered and the P of "original"; repeats are added up
  Position position = Position::kFirst;
};

// On as many threads as pay; the same bits on any number.
template <class T>
void input_gradient(const InputGradient<T>& gradient);

}  // namespace mod_kernels
