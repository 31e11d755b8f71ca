// What the kernels of a block take, by value: the block's tensors, its convolutions as a list of steps, and
// where in shared memory things lie. plan.h fills in what is not the caller's.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/block_form.h"
#include "../common/dtype.h"

namespace mod_kernels {

inline constexpr int kMaxK = 256;  // channels selected, at most
inline constexpr int kMaxChannels = 4096;
inline constexpr int kMaxSteps = 4;   // of a conv block
inline constexpr int kMaxStages = 8;  // bulk copies under way
inline constexpr int kTile = 4;  // side of the tile of outputs and pixels that a thread does in a long tail

// Threads of a block, and blocks that a multiprocessor must have registers for: 80 a thread. Left to itself
// ptxas spills a few of them to get down to 64, for a fourth block.
inline constexpr int kBlockThreads = 256, kBlocksAtOnce = 3;

// How a share of x comes to be pooled (and copied):
//  - kStaged: NCHW, runs of whole planes by way of shared memory: loads of 16 bytes, however short a plane is
//  - kWide: 16 bytes at a time from x to registers
//  - kScalar: a value at a time, where a sample is not aligned
enum class Pooling : int32_t { kStaged, kWide, kScalar };

// What a launch does of a block. With clusters it is always kWhole.
//  - kWhole: all; the last block of a sample to have pooled its share does the rest alone
//  - kPool: pooling and the first layer's sums, of one share a block
//  - kRank: from those sums on; a slice of the second layer's channels a block, the rest by the last of them
enum class Phase : int32_t { kWhole, kPool, kRank };

// One of the weights or biases of the selector: of x's dtype, or float32.
struct Parameter {
  const void* data = nullptr;
  bool is_float = false;
  bool wide = false;  // every row that is read begins at a multiple of 16 bytes, and is one long
};

//  - kPointwise: out[o] = bias[o] + sum_i weight[o, i] * in[i]
//  - kDense: the same with 3x3 kernels
//  - kDepthwise: out[o] = bias[o] + weight[o] * in[o], kernels of `side`
//  - kNormalise: mean 0 and variance 1 over the channels of a pixel, in place
//  - kPass: out[o] = in[o]
enum class StepKind : int32_t { kPointwise, kDense, kDepthwise, kNormalise, kPass };
enum class Then : int32_t { kNothing, kRelu, kRelu6, kGelu };
// The selected channels of x, float32 planes in the workspace, or the channels of y where the result is
// added.
enum class Operand : int32_t { kSelected, kPlanesA, kPlanesB, kResult };

struct TailStep {
  StepKind kind = StepKind::kPass;
  Then then = Then::kNothing;
  Operand from = Operand::kSelected, to = Operand::kResult;
  int32_t inputs = 0, outputs = 0, side = 1;
  int64_t weight = 0, bias = 0;  // elements from the start of the packed convolutions
};

// Bytes from the start of a block's shared memory.
struct SharedLayout {
  int32_t pooled = 0;      // float, of the block's channels
  int32_t slots = 0;       // float (groups of the block, R): with clusters
  int32_t hidden = 0;      // float (R)
  int32_t logits = 0;      // uint32, ordered bits of the block's slice of logits: with clusters
  int32_t chosen = 0;      // int (k)
  int32_t scores = 0;      // float (k)
  int32_t counts = 0;      // int (2, warps) and a few more
  int32_t reused = 0;      // stages; sums of channels_last; then ordered bits (C) and candidates (k)
  int32_t candidates = 0;  // uint64 (k)
  int32_t bytes = 0;
};

struct BlockParameters {
  // x (n, c, h, w); y is x, or dense in x's layout, or null where only the selection is wanted
  const void* x = nullptr;
  void* y = nullptr;
  int64_t stride_xn = 0, stride_yn = 0;
  int32_t n = 0, c = 0, h = 0, w = 0, k = 0, r = 0;
  bool channels_last = false;
  Position position = Position::kFirst;
  // selector: fc1 (r, c), fc2 (c, r)
  const float* pooled = nullptr;  // (n, c); null: x is pooled
  Parameter fc1_weight, fc2_weight, fc1_bias, fc2_bias;
  // outputs, null where not wanted
  float* logits = nullptr;      // (n, c); without clusters wanted always
  float* hidden = nullptr;      // (n, r)
  float* pooled_out = nullptr;  // (n, c)
  float* scores = nullptr;      // (n, k)
  int64_t* index = nullptr;     // (n, k)
  // conv block: packed weights and biases, and what is done with them
  const float* conv = nullptr;
  TailStep steps[kMaxSteps];
  int32_t step_count = 0;
  // workspace
  float* planes_a = nullptr;  // (n, planes_a_count, h, w)
  float* planes_b = nullptr;
  float* slots = nullptr;       // (n, groups, r): without clusters
  int32_t* counters = nullptr;  // (n), zero before and after: without clusters
  int32_t planes_a_count = 0, planes_b_count = 0;
  // shares, all of them by the shape of a sample and never by n, so that its bits are the same in any batch:
  // only how many groups a block takes depends on n
  Phase phase = Phase::kWhole;
  int32_t blocks = 1;          // blocks a sample
  int32_t group_channels = 0;  // the first layer is summed up in groups of so many channels
  int32_t groups = 0;
  int32_t block_groups = 1;              // groups a block
  int32_t fc1_lanes = 1, fc2_lanes = 1;  // lanes that share a row of weights
  int32_t hidden_lanes = 1;              // and the groups of a hidden unit
  Pooling pooling = Pooling::kScalar;
  int32_t row_lanes = 1;   // lanes that share a plane in shared memory
  int32_t stage_rows = 0;  // planes a stage
  int32_t stages = 1;      // stages there is memory for
  int32_t columns = 1;     // channels_last: loads side by side, of all threads of a block
  SharedLayout shared;
};

static_assert(std::is_trivially_copyable_v<BlockParameters> && std::is_standard_layout_v<BlockParameters>);
static_assert(sizeof(BlockParameters) <= 1024, "a launch takes at most 4096 bytes of parameters");

}  // namespace mod_kernels
