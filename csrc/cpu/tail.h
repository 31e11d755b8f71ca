// The narrowed conv block on the selected channels of one sample: gather, convolutions with folded BN, scale,
// add, in place.
#pragma once

#include "../common/dtype.h"
#include "../common/layout.h"
#include "fuse.h"

namespace mod_kernels {

// Those of CONV_KINDS in mod_kernels/spec.py.
enum class BlockKind { kBottleneck, kBasic, kInvertedResidual, kConv, kConvNeXt };

// Weights are dense OIHW, in order of use:
//   kBottleneck        1x1 (m, k), 3x3 (m, m), 1x1 (k, m); ReLU after the first two
//   kBasic             3x3 (k, k), 3x3 (k, k); ReLU after the first
//   kInvertedResidual  1x1 (m, k), depthwise 3x3 (m), 1x1 (k, m); ReLU6 after the first two
//   kConv              3x3 (k, k)
//   kConvNeXt          depthwise 7x7 (k), layer norm over the channels of a pixel, 1x1 (m, k), exact GELU,
//                      1x1 (k, m)
// m is read where it stands above. final_relu adds a ReLU after the last.
template <class A>
struct ConvBlock {
  BlockKind kind = BlockKind::kBottleneck;
  bool final_relu = false;
  Position position = Position::kFirst;
  int64_t k = 0, m = 0;
  const A* weight[3] = {};
  const A* bias[3] = {};
};

// Elements of A that tail_sample needs as scratch. Planes of H * W, with a halo or without: 2 m
// (kBottleneck), 2 k (kBasic), m + 1 (kInvertedResidual), k (kConv), k + 1 (kConvNeXt); and some 4096
// elements (or 64 for each channel) for each band: of the k channels (kConv: of its result), and of
// kConvNeXt's m.
template <class T>
int64_t tail_scratch(const FeatureMap<T>& x, const ConvBlock<Accumulate<T>>& block);

// x[target(j)] += scores[j] * block(x[index])[j] for one sample. All of x[index] is read before x is written.
template <class T>
void tail_sample(const FeatureMap<T>& x, int64_t sample, const ConvBlock<Accumulate<T>>& block,
                 const Accumulate<T>* scores, const int64_t* index, Accumulate<T>* scratch);

}  // namespace mod_kernels
