// Moving channels: gather, and the scaled addition that fuses them back.
#pragma once

#include "../common/dtype.h"
#include "../common/layout.h"
#include "../common/position.h"

namespace mod_kernels {

// The channel that gathered channel j is added to.
inline int64_t target_channel(Position position, int64_t j, int64_t k, int64_t channels,
                              const int64_t* index) {
  switch (position) {
    case Position::kFirst:
      return j;
    case Position::kLast:
      return channels - k + j;
    case Position::kOriginal:
      return index[j];
  }
  return j;
}

// out[j] = x[index[j]] for one sample, bit for bit; out has k channels, and x's layout or either where both
// fit.
template <class T>
void gather_sample(const FeatureMap<T>& x, int64_t sample, const int64_t* index, const FeatureMap<T>& out);

// y[target(j)] += scores[j] * z[j] for one sample, j ascending (duplicates in index add up). y and z may
// differ in layout.
template <class T>
void fuse_sample(const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample, const Accumulate<T>* scores,
                 const int64_t* index, Position position);

// The same out of place: y = x, then the addition; x and y have the same layout.
template <class T>
void copy_fuse_sample(const FeatureMap<T>& x, const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample,
                      const Accumulate<T>* scores, const int64_t* index, Position position);

}  // namespace mod_kernels
