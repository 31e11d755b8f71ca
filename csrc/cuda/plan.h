// How a block is launched: which launches, of how many blocks, with which parameters. From sizes and the
// device alone, so that a test sees what a GPU does.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_call.h"
#include "conv_steps.h"
#include "parameters.h"
#include "plan_shares.h"

namespace mod_kernels {

struct BlockLaunch {
  bool is_step = false;  // of tail_step_kernel, else of mod_block_kernel
  int step = 0;          // which
  Phase phase = Phase::kWhole;
  int blocks_a_sample = 1;
  int cluster = 0;  // blocks of a cluster; 0: mod_block_kernel without clusters
  int shared_bytes = 0;
};

struct BlockPlan {
  const char* refused = nullptr;  // why nothing can be launched, in words that stay
  DType dtype = DType::kFloat;
  BlockParameters parameters;
  BlockLaunch launches[2 + kMaxSteps];
  int count = 0;
  bool uses_counters = false, has_apart_tail = false;
  int64_t workspace_bytes = 0;
  // Where in the workspace: -1 is nowhere, or in a tensor of the caller's.
  int64_t planes_a = -1, planes_b = -1, slots = -1, logits = -1, scores = -1, index = -1;
};

namespace planning {

inline const char* refusal(const BlockCall& call, const ConvSteps& steps) {
  const int64_t hw = call.h * call.w;
  if (call.dtype == DType::kDouble) return "float64 is not for this engine";
  if (call.k < 1 || call.k > std::min<int64_t>(call.c, kMaxK))
    return "k must be between 1 and C, and at most 256";
  if (call.c > kMaxChannels) return "x may have at most 4096 channels";
  if (call.r < 1 || call.r > kMaxChannels) return "the selector may have 1 to 4096 hidden units";
  if (std::max({call.c, steps.planes_a, steps.planes_b}) * hw > kMostValues) {
    return "a sample, and the planes of its conv block, must have fewer than 2^31 values";
  }
  if (steps.packed_size > kMostValues) return "the conv block must have fewer than 2^31 weights";
  return nullptr;
}

inline BlockParameters parameters_of(const BlockCall& call) {
  const auto parameter = [](const SelectorParameter& from) {
    return Parameter{from.data, from.is_float, false};
  };
  BlockParameters p;
  p.x = call.x;
  p.y = call.y;
  p.stride_xn = call.stride_xn;
  p.stride_yn = call.stride_yn;
  p.n = static_cast<int>(call.n);
  p.c = static_cast<int>(call.c);
  p.h = static_cast<int>(call.h);
  p.w = static_cast<int>(call.w);
  p.k = static_cast<int>(call.k);
  p.r = static_cast<int>(call.r);
  p.channels_last = call.channels_last;
  p.position = call.form.position;
  p.pooled = call.pooled;
  p.fc1_weight = parameter(call.fc1_weight);
  p.fc2_weight = parameter(call.fc2_weight);
  p.fc1_bias = parameter(call.fc1_bias);
  p.fc2_bias = parameter(call.fc2_bias);
  p.logits = call.logits;
  p.hidden = call.hidden;
  p.pooled_out = call.pooled_out;
  p.scores = call.scores;
  p.index = call.index;
  p.conv = call.conv;
  p.counters = call.counters;
  return p;
}

// Whether launches for the steps of a tail cost less than what they gain: all multiprocessors instead of
// those that have a block of the launch before.
inline bool tail_is_long(const BlockParameters& p, int64_t working, const Architecture& device) {
  int64_t products = 0;
  for (int i = 0; i < p.step_count; ++i) products += products_of(p.steps[i]);
  const double all = static_cast<double>(products) * p.h * p.w * p.n / kProductsASecond;
  const double alone = all / static_cast<double>(std::min<int64_t>(working, device.multiprocessors));
  return alone > all / device.multiprocessors + p.step_count * device.tuning.launch_seconds;
}

// A launch for every step, as many blocks a sample as have something to do and as the device has room for.
inline void add_steps(BlockPlan& plan, const Architecture& device) {
  const BlockParameters& p = plan.parameters;
  const int64_t hw = static_cast<int64_t>(p.h) * p.w, room = 8 * int64_t{device.multiprocessors};
  for (int i = 0; i < p.step_count; ++i) {
    const TailStep& step = p.steps[i];
    const bool sums = step.kind == StepKind::kPointwise || step.kind == StepKind::kDense;
    int64_t threads = step.kind == StepKind::kNormalise ? 8 * hw : step.outputs * hw;
    if (sums) threads /= kTile * kTile;
    const int64_t blocks =
        std::clamp<int64_t>(room / p.n, 1, divide_up<int64_t>(std::max<int64_t>(threads, 1), kBlockThreads));
    plan.launches[plan.count++] = {true, i, Phase::kWhole, static_cast<int>(blocks), 0, 8 * p.k};
  }
}

}  // namespace planning

inline BlockPlan plan_block(const BlockCall& call, const Architecture& device) {
  using namespace planning;
  BlockPlan plan;
  plan.dtype = call.dtype;
  ConvSteps steps;
  if (call.y != nullptr) steps = conv_steps(call.form, call.k);
  plan.refused = refusal(call, steps);
  if (plan.refused != nullptr || call.n == 0 || call.c == 0 || call.h * call.w == 0) return plan;

  BlockParameters& p = plan.parameters = parameters_of(call);
  std::copy_n(steps.steps, steps.count, p.steps);
  p.step_count = steps.count;
  p.planes_a_count = static_cast<int>(steps.planes_a);
  p.planes_b_count = static_cast<int>(steps.planes_b);
  const int value_bytes = static_cast<int>(size_of(call.dtype));
  const bool clusters = device.has_clusters();
  choose_pooling(p, value_bytes, device);
  choose_layers(p, value_bytes);

  const int cluster = clusters ? choose_cluster(p, value_bytes, device) : 0;
  const bool one_launch = clusters || int64_t{p.c} * p.r <= device.tuning.one_launch_weights;
  const int blocks = clusters ? cluster : p.groups, slices = divide_up(p.c, device.tuning.slice_channels);
  p.block_groups = divide_up(p.groups, blocks);
  const bool lone = int64_t{p.n} * blocks <= device.multiprocessors;
  const int slice = divide_up(p.c, clusters ? cluster : 1);
  p.shared = lay_out(p, value_bytes, clusters, slice,
                     lone ? device.tuning.lone_ring_bytes : device.tuning.ring_bytes, device.shared_bytes);
  if (p.shared.bytes > device.shared_bytes) {
    plan.refused = "the selector has too many hidden units for a block's shared memory";
    return plan;
  }
  if (one_launch) {
    plan.launches[plan.count++] = {false, 0, Phase::kWhole, blocks, cluster, p.shared.bytes};
  } else {
    plan.launches[plan.count++] = {false, 0, Phase::kPool, blocks, cluster, p.shared.bytes};
    plan.launches[plan.count++] = {false, 0, Phase::kRank, slices, cluster, p.shared.bytes};
  }
  plan.uses_counters = !clusters;
  plan.has_apart_tail = tail_is_long(p, int64_t{p.n} * (clusters ? cluster : 1), device);
  if (plan.has_apart_tail) add_steps(plan, device);

  const int64_t n = p.n, hw = static_cast<int64_t>(p.h) * p.w;
  const auto take = [&](bool wanted, int64_t bytes) {
    if (!wanted) return int64_t{-1};
    const int64_t begin = plan.workspace_bytes;
    plan.workspace_bytes += round_up(bytes, kSectionBytes);
    return begin;
  };
  plan.planes_a = take(steps.planes_a > 0, 4 * n * steps.planes_a * hw);
  plan.planes_b = take(steps.planes_b > 0, 4 * n * steps.planes_b * hw);
  plan.slots = take(!clusters, 4 * n * p.groups * p.r);
  plan.logits = take(!clusters && p.logits == nullptr, 4 * n * p.c);
  plan.scores = take(plan.has_apart_tail && p.scores == nullptr, 4 * n * p.k);
  plan.index = take(plan.has_apart_tail && p.index == nullptr, 8 * n * p.k);
  return plan;
}

// What launch i takes, with a workspace of plan.workspace_bytes, 256-byte aligned.
inline BlockParameters launch_parameters(const BlockPlan& plan, int i, void* workspace) {
  BlockParameters p = plan.parameters;
  const BlockLaunch& launch = plan.launches[i];
  char* base = static_cast<char*>(workspace);
  if (plan.planes_a >= 0) p.planes_a = reinterpret_cast<float*>(base + plan.planes_a);
  if (plan.planes_b >= 0) p.planes_b = reinterpret_cast<float*>(base + plan.planes_b);
  if (plan.slots >= 0) p.slots = reinterpret_cast<float*>(base + plan.slots);
  if (plan.logits >= 0) p.logits = reinterpret_cast<float*>(base + plan.logits);
  if (plan.scores >= 0) p.scores = reinterpret_cast<float*>(base + plan.scores);
  if (plan.index >= 0) p.index = reinterpret_cast<int64_t*>(base + plan.index);
  p.phase = launch.phase;
  p.blocks = launch.blocks_a_sample;
  if (launch.is_step) {
    p.shared = SharedLayout{};
    p.shared.scores = 4 * p.k;
    p.shared.bytes = launch.shared_bytes;
  } else if (plan.has_apart_tail) {
    p.step_count = 0;
  }
  return p;
}

}  // namespace mod_kernels
