// The gradient of fuse's addition.
#pragma once

#include "fuse.h"

namespace mod_kernels {

// With P the channels of position and n a sample, j a gathered channel:
//   dz[n, j] = scores[n, j] * dy[n, P_j]           rounded once
//   dscores[n, j] = sum over the plane of z[n, j] * dy[n, P_j]
// Each is left out where its pointer is null; dy's k planes are read once for both.
template <class T>
struct FuseGradient {
  FeatureMap<T> dy;                       // (N, C, H, W)
  FeatureMap<T> z, dz;                    // (N, k, H, W), laid out as dy
  const Accumulate<T>* scores = nullptr;  // (N, k)
  const int64_t* index = nullptr;         // (N, k); read for position "original" alone
  Position position = Position::kFirst;
  Accumulate<T>* dscores = nullptr;  // (N, k)
};

// On as many threads as pay. The order of each sum depends on the shape and the layout only.
template <class T>
void fuse_backward(const FuseGradient<T>& gradient);

}  // namespace mod_kernels
