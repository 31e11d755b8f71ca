// The one pass over a feature map: read it (and copy it, or write relu(a + b)) and sum each channel.
#pragma once

#include "../common/layout.h"

namespace mod_kernels {

// What a pooling pass does with each element on its way into the sum.
enum class PassKind { kRead, kCopy, kRelu, kAdd, kAddRelu };

struct PoolPass {
  PassKind kind = PassKind::kRead;
  const float* a = nullptr;  // one sample of the input
  const float* b = nullptr;  // second summand, laid out as a (kAdd, kAddRelu)
  float* y = nullptr;        // output laid out as a; may be a itself
};

// Channels are summed in groups of this many: work is split between threads at its multiples.
inline constexpr int64_t kPoolGroup = 64;

// pooled[c] = mean of y's channel c over H*W, for channels begin <= c < end of one sample. The order of each
// sum depends on H*W and the layout only, never on begin, end or the number of threads.
void pool_sample(const PoolPass& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                 int64_t end, float* pooled);

}  // namespace mod_kernels
