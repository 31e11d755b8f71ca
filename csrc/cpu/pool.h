// The one pass over a feature map: read it (and copy it, or write relu(a + b)) and sum each channel.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

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

}  // namespace mod_kernels
