// The narrowed conv block on the selected channels of one sample: gather, convolutions with folded BN, scale,
// add, in place.
#pragma once

#include "../common/dtype.h"
#include "../common/layout.h"
#include "fuse.h"

namespace mod_kernels {

enum class BlockKind { kBottleneck, kBasic };

// Weights are dense OIHW, in order of use. kBottleneck: 1x1 (m, k), 3x3 (m, m), 1x1 (k, m), ReLU after the
// first two. kBasic: 3x3 (k, k), 3x3 (k, k), ReLU after the first. final_relu adds one after the last.
template <class A>
struct ConvBlock {
  BlockKind kind = BlockKind::kBottleneck;
  bool final_relu = false;
  Position position = Position::kFirst;
  int64_t k = 0, m = 0;
  const A* weight[3] = {};
  const A* bias[3] = {};
};

// Elements of A that tail_sample needs as scratch: two planes of (H + 2) * (W + 2) for each of a bottleneck's
// m, or of a basic block's k channels, and some 4096 elements (or 64 for each of k) for a band of k channels.
template <class T>
int64_t tail_scratch(const FeatureMap<T>& x, const ConvBlock<Accumulate<T>>& block);

// x[target(j)] += scores[j] * block(x[index])[j] for one sample. All of x[index] is read before x is written.
template <class T>
void tail_sample(const FeatureMap<T>& x, int64_t sample, const ConvBlock<Accumulate<T>>& block,
                 const Accumulate<T>* scores, const int64_t* index, Accumulate<T>* scratch);

}  // namespace mod_kernels
