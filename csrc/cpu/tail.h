// The narrowed conv block on the selected channels of one sample: gather, convolutions with folded BN, scale,
// add, in place.
#pragma once

#include "../common/conv_block.h"
#include "../common/dtype.h"
#include "../common/layout.h"
#include "fuse.h"

namespace mod_kernels {

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
