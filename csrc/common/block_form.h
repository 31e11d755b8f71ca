// What a block is, for the kernels of every engine; the names that ops take are read in conv_block.h and
// position.h.
#pragma once

#include <cstdint>

namespace mod_kernels {

// Those of CONV_KINDS in mod_kernels/spec.py; conv_block.h says what each computes.
enum class BlockKind : int32_t { kBottleneck, kBasic, kInvertedResidual, kConv, kConvNeXt };

// Where a block's result is added: to the first k channels, the last k, or those that were gathered.
enum class Position : int32_t { kFirst, kLast, kOriginal };

}  // namespace mod_kernels
