// How a sample is shared out: how x is walked, groups of channels, lanes, the size of a cluster, shared
// memory. The first half of plan.h: from sizes and the device alone. Times are estimated: no GPU has run
// this.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_call.h"
#include "parameters.h"

namespace mod_kernels {

namespace planning {

inline constexpr int kLoadBytes = 16, kWarpLanes = 32;
inline constexpr int64_t kMostValues = (int64_t{1} << 31) - (1 << 20);  // of a sample: offsets in it are int
// Sections of the workspace begin apart by what a cache holds together.
inline constexpr int64_t kSectionBytes = 256;
// With clusters the first layer is added up in so many groups of channels, a block having one or more of
// them: so many blocks can share a sample, and a sample's bits do not depend on how many do.
inline constexpr int kGroups = 16;
// Without, every group is a block's, and there are no more than these.
inline constexpr int kMostGroups = 64;
// Sums of the first layer that a block holds: above it a cluster gets larger.
inline constexpr int kMostSlotBytes = 32 * 1024;
// Multiplications a multiprocessor does of a tail's, some 32 a clock.
inline constexpr double kProductsASecond = 32 * 1.5e9;

template <class I>
constexpr I divide_up(I a, I b) {
  return (a + b - 1) / b;
}
template <class I>
constexpr I round_up(I a, I b) {
  return divide_up(a, b) * b;
}
// The largest power of two that is no larger, between two others.
constexpr int power_of_two(int64_t value, int least, int most) {
  int power = least;
  while (2 * power <= std::min<int64_t>(value, most)) power *= 2;
  return power;
}
inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kLoadBytes == 0; }

// How x is walked, and its channels' groups: by the shape of a sample and how it lies in memory.
inline void choose_pooling(BlockParameters& p, int value_bytes, const Architecture& device) {
  const BlockTuning& tuning = device.tuning;
  const bool clusters = device.has_clusters();
  const int64_t plane = static_cast<int64_t>(p.h) * p.w * value_bytes, values = kLoadBytes / value_bytes;
  const bool copies = p.y != nullptr && p.y != p.x;
  // Of a single sample too: alone and in a batch it is read in the same way.
  const auto begins_aligned = [&](const void* data, int64_t stride) {
    return is_aligned(data) && stride * value_bytes % kLoadBytes == 0;
  };
  const bool aligned = begins_aligned(p.x, p.stride_xn) && (!copies || begins_aligned(p.y, p.stride_yn)) &&
                       p.c * plane % kLoadBytes == 0;
  int64_t together = 1;  // planes that are a whole number of 16 bytes
  while (together * plane % kLoadBytes != 0) together *= 2;
  if (p.channels_last) {
    p.pooling = aligned && p.c * value_bytes % kLoadBytes == 0 ? Pooling::kWide : Pooling::kScalar;
    const int64_t loads = p.pooling == Pooling::kWide ? values : 1;
    // An eighth of the channels side by side, but at most a warp's loads: other threads take other pixels.
    p.columns = power_of_two(p.c / (8 * loads), 4, kWarpLanes);
    together = 1;
  } else {
    const bool fits = together * plane <= tuning.stage_bytes &&
                      (clusters || plane % kLoadBytes != 0 || plane < tuning.short_plane);
    p.pooling = aligned && fits                      ? Pooling::kStaged
                : aligned && plane % kLoadBytes == 0 ? Pooling::kWide
                                                     : Pooling::kScalar;
    const int word = plane % 16 == 0 ? 16 : plane % 8 == 0 ? 8 : plane % 4 == 0 ? 4 : value_bytes;
    const int64_t words = plane / word;
    // Planes of an odd number of words: lanes with one each hit different banks. Of 16 bytes: eight lanes
    // side by side do. Longer planes are for more lanes.
    p.row_lanes = word == 16 ? power_of_two(std::min(words, std::max<int64_t>(words / 4, 8)), 1, kWarpLanes)
                             : power_of_two(words / 32, 1, kWarpLanes);
    if (word < 16 && words <= 64) p.row_lanes = 1;
    p.stage_rows = static_cast<int>(std::max(together, tuning.stage_bytes / plane / together * together));
  }
  const int64_t most =
      clusters ? kGroups : std::clamp<int64_t>(p.c * plane / tuning.group_bytes, 1, kMostGroups);
  // Rows of weights are read by 16 bytes too.
  p.group_channels = static_cast<int>(round_up(divide_up<int64_t>(p.c, most), std::max(together, values)));
  p.groups = divide_up(p.c, p.group_channels);
}

// Lanes for a row of weights: about as many as threads there are for `rows`, but two at least, for whole
// sectors.
inline int lanes_of_row(const Parameter& weight, int length, int value_bytes, int rows) {
  const int loads = weight.wide ? length * value_bytes / kLoadBytes : divide_up(length, 4);
  return power_of_two(std::min(loads, std::max(2, kBlockThreads / std::max(1, rows))), 1,
                      weight.wide ? kWarpLanes : 8);
}

inline void choose_layers(BlockParameters& p, int value_bytes) {
  const int fc1_bytes = p.fc1_weight.is_float ? 4 : value_bytes,
            fc2_bytes = p.fc2_weight.is_float ? 4 : value_bytes;
  p.fc1_weight.wide = is_aligned(p.fc1_weight.data) && p.c * fc1_bytes % kLoadBytes == 0;
  p.fc2_weight.wide = is_aligned(p.fc2_weight.data) && p.r * fc2_bytes % kLoadBytes == 0;
  // As if eight blocks shared a sample: another number must not add in another order.
  p.fc1_lanes = lanes_of_row(p.fc1_weight, p.group_channels, fc1_bytes, kGroups / 8 * p.r);
  p.hidden_lanes = power_of_two(std::min(p.groups, kBlockThreads / p.r), 1, kWarpLanes);
  p.fc2_lanes = lanes_of_row(p.fc2_weight, p.r, fc2_bytes, p.c / 8);
}

inline int choose_cluster(const BlockParameters& p, int value_bytes, const Architecture& device) {
  const int64_t sample_bytes = static_cast<int64_t>(p.c) * p.h * p.w * value_bytes;
  const int most = power_of_two(std::min(device.max_cluster, p.groups), 1, kGroups);
  // More than 8 blocks are not everywhere at once: where they would be all there is to do.
  int blocks = int64_t{16} * p.n <= device.multiprocessors ? most : std::min(most, 8);
  while (blocks > 1 && (p.n * blocks / 2 >= int64_t{kBlocksAtOnce} * device.multiprocessors ||
                        sample_bytes < int64_t{device.tuning.least_bytes} * blocks)) {
    blocks /= 2;
  }
  while (blocks < most && divide_up(p.groups, blocks) * int64_t{4} * p.r > kMostSlotBytes) blocks *= 2;
  return blocks;
}

// Shared memory of a block, with `slice` of the logits, and room for `ring` bytes of stages: fewer where the
// rest leaves less of the `most` that a block may have.
inline SharedLayout lay_out(BlockParameters& p, int value_bytes, bool clusters, int slice, int ring,
                            int most) {
  SharedLayout at;
  const auto take = [&](int64_t bytes) {
    const int begin = at.bytes;
    at.bytes += static_cast<int>(round_up<int64_t>(bytes, kLoadBytes));
    return begin;
  };
  take(clusters ? kMaxStages * 8 : 0);  // barriers of the stages, at 0
  at.pooled = take(int64_t{4} * p.block_groups * p.group_channels);
  if (clusters) at.slots = take(int64_t{4} * p.block_groups * p.r);
  at.hidden = take(int64_t{4} * p.r);
  if (clusters) at.logits = take(int64_t{4} * slice);
  at.chosen = take(int64_t{4} * p.k);
  at.scores = take(int64_t{4} * p.k);
  const int warps = kBlockThreads / kWarpLanes;
  at.counts = take(4 * (2 * warps + 1));
  int64_t reading = 0;
  if (p.channels_last) {
    reading = int64_t{4} * kBlockThreads * (p.pooling == Pooling::kWide ? kLoadBytes / value_bytes : 1);
  } else if (p.pooling == Pooling::kStaged) {
    const int64_t share = int64_t{p.block_groups} * p.group_channels;
    p.stage_rows = static_cast<int>(std::min<int64_t>(p.stage_rows, share));
    const int64_t stage = int64_t{p.stage_rows} * p.h * p.w * value_bytes;
    const int64_t stages = std::min(divide_up<int64_t>(share, p.stage_rows),
                                    std::max<int64_t>(1, std::min(ring, most - at.bytes) / stage));
    p.stages = clusters ? static_cast<int>(std::min<int64_t>(stages, kMaxStages)) : 1;
    reading = p.stages * stage;
  }
  const int64_t ordered = 4 * round_up<int64_t>(p.c, kBlockThreads);
  at.reused = take(std::max(reading, ordered + 8 * std::max(p.k, 2 * warps)));
  at.candidates = at.reused + static_cast<int>(ordered);
  return at;
}

}  // namespace planning
}  // namespace mod_kernels
