// The one pass over a feature map: read it (and copy it, or write relu(a + b)) and sum each channel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/dtype.h"
#include "runtime.h"

namespace mod_kernels {

// What a pooling pass does with each element on its way into the sum.
enum class PassKind { kRead, kCopy, kRelu, kAdd, kAddRelu };

template <class T>
struct PoolPass {
  PassKind kind = PassKind::kRead;
  const T* a = nullptr;  // one sample of the input
  const T* b = nullptr;  // second summand, laid out as a (kAdd, kAddRelu)
  T* y = nullptr;        // output laid out as a; may be a itself, but for kCopy
};

// Channels are summed in groups of this many: work is split between threads at its multiples.
inline constexpr int64_t kPoolGroup = 64;

// pooled[c] = mean of y's channel c over H*W, for channels begin <= c < end of one sample; of what was
// written, where something is. The order of each sum depends on the shape and the layout only, never on
// begin, end or the number of threads.
template <class T>
void pool_sample(const PoolPass<T>& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                 int64_t end, Accumulate<T>* pooled);

// work(n, begin, end) for all channels of all samples, in whole groups.
template <class F>
void for_pool_groups(int64_t threads, int64_t samples, int64_t channels, const F& work) {
  const int64_t groups = (channels + kPoolGroup - 1) / kPoolGroup;
  parallel(threads, samples * groups, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t n = i / groups, group = i % groups, count = std::min(groups - group, end - i);
      work(n, group * kPoolGroup, std::min((group + count) * kPoolGroup, channels));
      i += count;
    }
  });
}

}  // namespace mod_kernels
