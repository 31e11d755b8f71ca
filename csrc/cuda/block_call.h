// What is asked of a block, and of which device: what ops.cpp says and plan.h reads. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../common/block_form.h"
#include "../common/dtype.h"
#include "parameters.h"

namespace mod_kernels {

struct ConvForm {
  BlockKind kind = BlockKind::kBottleneck;
  int64_t mid_channels = 0;  // bottleneck, inverted residual and ConvNeXt
  bool final_relu = false;
  Position position = Position::kFirst;
};

// A weight or a bias of the selector, dense: of x's dtype or of float32. Null: there is no such bias.
struct SelectorParameter {
  const void* data = nullptr;
  bool is_float = false;
};

// mod_block, mod_block_, select_channels and select_channels_saving. Outputs that are null are not wanted.
struct BlockCall {
  DType dtype = DType::kFloat;  // of x and y; not kDouble
  // x (n, c, h, w), every sample dense in NCHW or channels_last order; y the same, or x itself (in place), or
  // null: the selection is all that is wanted.
  const void* x = nullptr;
  void* y = nullptr;
  int64_t stride_xn = 0, stride_yn = 0;
  int64_t n = 0, c = 0, h = 0, w = 0;
  bool channels_last = false;
  int64_t r = 0, k = 0;
  SelectorParameter fc1_weight, fc2_weight, fc1_bias, fc2_bias;  // (r, c), (c, r), (r), (c)
  const float* pooled = nullptr;                                 // (n, c); null: the means of x are taken
  float* logits = nullptr;                                       // (n, c)
  float* hidden = nullptr;                                       // (n, r)
  float* pooled_out = nullptr;  // (n, c), the means; null where pooled is given
  float* scores = nullptr;      // (n, k)
  int64_t* index = nullptr;     // (n, k)
  const float* conv =
      nullptr;  // packed convolutions, of the size that packed_size says; read where y is not null
  ConvForm form;
  int32_t* counters = nullptr;  // (n), zero, and left so; where BlockPlan::uses_counters
};

// Numbers that are a device's to choose, none of which decides whether a result is right. Smaller ones let a
// small sample be shared out as a large one is: tests use that.
struct BlockTuning {
  // A stage is what one bulk copy brings. All stages of a block, 32 KB on several blocks of a multiprocessor,
  // are more bytes on their way than any of these memories needs (3.35 TB/s times 1 us over 132 of them: 25
  // KB). A block that has a multiprocessor to itself has more.
  int stage_bytes = 16 * 1024, ring_bytes = 32 * 1024, lone_ring_bytes = 96 * 1024;
  // Without the copy engine the detour through shared memory pays where planes are shorter.
  int short_plane = 1024;
  // What a block pools without clusters, in bytes of x.
  int group_bytes = 24 * 1024;
  // A cluster has no blocks with less than this of x.
  int least_bytes = 4096;
  // The rule without clusters: up to so many weights in the second layer (C = 1024 at R = C / 16) a block is
  // one launch, whose last block of a sample reads them all. At C = 2048 they are 0.5 MB, some 5 us for one
  // block: two launches, the second with a slice of the channels a block. The Triton engine has the same
  // numbers (docs/gpu.md).
  int one_launch_weights = 65536, slice_channels = 256;
  // What a launch costs, in a CUDA graph.
  double launch_seconds = 2e-6;
};

struct Architecture {
  int capability = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int shared_bytes = 99 * 1024;  // a block may ask for, at most
  int max_cluster = 1;           // from sm_90 on: 8, 16 where the device allows it, fewer on a part of one
  BlockTuning tuning;

  bool has_clusters() const { return capability >= 90; }
};

}  // namespace mod_kernels
