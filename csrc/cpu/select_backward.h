// The gradient of the selector, from that of the k scores.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace mod_kernels {

// A layer's weight, row-major; float or a 16-bit format where sums are float, float or double where double.
struct Weight {
  const void* data = nullptr;
  DType dtype = DType::kFloat;
};

// With dl[n, j] = dscores[n, j] * s * (1 - s), s = scores[n, j], and i = index[n, j]:
//   dfc2[i] += dl[n, j] * hidden[n],  db2[i] += dl[n, j]        from zeros, n then j ascending
//   dhidden[n] = sum_j dl[n, j] * fc2[i], zero where hidden[n] <= 0 (not where it is NaN)
//   dfc1 = dhidden' pooled,  db1 = sum_n dhidden[n],  dpooled = dhidden fc1
// An output that is null is left out, and so is what only it would need. All is row-major and dense.
template <class A>
struct SelectGradient {
  int64_t samples = 0, channels = 0, units = 0, k = 0;
  const A *dscores = nullptr, *scores = nullptr;  // (N, k)
  const int64_t* index = nullptr;                 // (N, k)
  const A *hidden = nullptr, *pooled = nullptr;   // (N, R), (N, C)
  Weight fc1, fc2;                                // (R, C), (C, R)
  A* dpooled = nullptr;                           // (N, C)
  A *dfc1 = nullptr, *dfc2 = nullptr;             // (R, C), (C, R)
  A *db1 = nullptr, *db2 = nullptr;               // (R), (C)
};

// On as many threads as pay; every sum has one order, whatever their number.
template <class A>
void select_backward(const SelectGradient<A>& gradient);

}  // namespace mod_kernels
