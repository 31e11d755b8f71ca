// The narrowed conv block on the selected channels of one sample: gather, convolutions with folded BN, scale,
// add, in place.
#pragma once

#include "../common/layout.h"
#include "fuse.h"

namespace mod_kernels {

enum class BlockKind { kBottleneck, kBasic };

// Weights are dense OIHW, in order of use. kBottleneck: 1x1 (m, k), 3x3 (m, m), 1x1 (k, m), ReLU after the
// first two. kBasic: 3x3 (k, k), 3x3 (k, k), ReLU after the first. final_relu adds one after the last.
struct ConvBlock {
  BlockKind kind = BlockKind::kBottleneck;
  bool final_relu = false;
  Position position = Position::kFirst;
  int64_t k = 0, m = 0;
  const float* weight[3] = {};
  const float* bias[3] = {};
};

// x[target(j)] += scores[j] * block(x[index])[j] for one sample. All of x[index] is read before x is written.
// Scratch is per thread, kept between calls, and at most 4 * (k + m) planes of (H + 2) * (W + 2) floats and a
// few vectors more each.
void tail_sample(const FeatureMap& x, int64_t sample, const ConvBlock& block, const float* scores,
                 const int64_t* index);

}  // namespace mod_kernels
