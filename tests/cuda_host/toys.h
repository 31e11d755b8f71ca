// Toy kernels for every part of the machine, each right, and broken in some ways. Of self_test.cpp.
#pragma once

#include <bit>
#include <cmath>

#include "cuda_host.h"

namespace toys {

using namespace mod_kernels;
using cuda_host::Launch;
using cuda_host::Order;

constexpr unsigned kAll = 0xffffffffu;

template <class T>
T* shared_at(size_t offset) {
  return reinterpret_cast<T*>(shared_memory() + offset);
}

// A kernel with out (N), and what out must be. What it launches: `one` with order and seed set.
struct Toy {
  size_t size;
  Launch one;
  void (*kernel)(float* out, const float* in);
  float (*expected)(size_t i);
};

float input(size_t i) { return static_cast<float>(i % 97) - 31.0f; }

// out[i] = in[neighbour of i in its block], through shared memory, twice.
enum class Rotate {
  kRight,
  kNoBarrier,
  kNoSecondBarrier,
  kReadPast,
  kWritePast,
  kGlobalReadPast,
  kGlobalWritePast
};
template <Rotate kBroken>
__global__ void rotate(float* out, const float* in) {
  float* values = shared_at<float>(0);
  const unsigned count = blockDim.x, i = threadIdx.x, first = blockIdx.x * count;
  const bool last = i == count - 1 && blockIdx.x == gridDim.x - 1;
  values[i + (kBroken == Rotate::kWritePast)] = in[first + i + (kBroken == Rotate::kGlobalReadPast && last)];
  if (kBroken != Rotate::kNoBarrier) __syncthreads();
  const float once = kBroken == Rotate::kReadPast ? values[i + 1] : values[(i + 1) % count];
  if (kBroken != Rotate::kNoSecondBarrier) __syncthreads();
  values[i] = once;
  __syncthreads();
  out[first + i + (kBroken == Rotate::kGlobalWritePast && last)] = values[(i + 1) % count];
}
float rotated(size_t i) { return input(i / 128 * 128 + (i + 2) % 128); }
template <Rotate kBroken>
constexpr Toy kRotate{512, {.grid = 4, .threads = 128, .shared_bytes = 512}, rotate<kBroken>, rotated};

// out[warp] = sum of its lanes; all shuffles and votes.
enum class Warps { kRight, kLanesMissing, kOneEnds, kMask, kApart };
template <Warps kBroken>
__global__ void warps(float* out, const float* in) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), lane = i % 32;
  if (kBroken == Warps::kOneEnds && lane == 31) return;
  float by_xor = in[i], by_down = in[i];
  if (kBroken != Warps::kLanesMissing || lane < 16) {
    for (int apart = 16; apart > 0; apart /= 2) {
      by_xor += __shfl_xor_sync(kBroken == Warps::kMask ? 0xffffu : kAll, by_xor, apart);
    }
  }
  if (kBroken == Warps::kApart && lane == 0) by_down += __shfl_down_sync(kAll, by_down, 0u) * 0.0f;
  for (int apart = 16; apart > 0; apart /= 2) by_down += __shfl_down_sync(kAll, by_down, apart);
  by_down = __shfl_sync(kAll, by_down, 0);
  const bool agree = by_xor == by_down;
  const bool odd = __ballot_sync(kAll, lane % 2) == 0xaaaaaaaau;
  const bool any = __any_sync(kAll, lane == 7) && !__any_sync(kAll, lane == 32);
  const uint64_t wide = __shfl_sync(kAll, uint64_t{1} << lane, 31);
  __syncwarp();
  out[i] = agree && odd && any && wide == uint64_t{1} << 31 ? by_xor : NAN;
}
float warp_total(size_t i) {
  float sum = 0;
  for (size_t lane = 0; lane < 32; ++lane) sum += input(i / 32 * 32 + lane);
  return sum;
}
template <Warps kBroken>
constexpr Toy kWarps{256, {.grid = 2, .threads = 128}, warps<kBroken>, warp_total};

// Every block of a cluster of 4 puts together what its neighbour has, and gives it to the one before.
enum class Ring { kRight, kNoFirstSync, kNoLastSync, kNoMiddleSync, kOneBlockMissing, kHalfMissing, kKept };
template <Ring kBroken>
__global__ void ring(float* out, const float* in) {
  float* mine = shared_at<float>(0);
  float* given = shared_at<float>(64 * sizeof(float));
  const unsigned i = threadIdx.x, at = blockIdx.x * 64 + i;
  const int rank = cluster_rank(), size = cluster_size();
  mine[i] = in[at];
  if (kBroken != Ring::kNoFirstSync) cluster_sync();
  const float sum = mine[i] + remote_shared(mine, (rank + 1) % size)[63 - i];
  remote_shared(given, (rank + size - 1) % size)[i] = sum;
  if (kBroken == Ring::kOneBlockMissing && rank == 2) {
    out[at] = 0;
    return;
  }
  if (kBroken != Ring::kNoMiddleSync) cluster_arrive();
  if (kBroken != Ring::kNoMiddleSync && kBroken != Ring::kHalfMissing) cluster_wait();
  out[at] = given[i];
  if (kBroken == Ring::kKept) {
    const float* theirs = remote_shared(mine, (rank + 1) % size);
    cluster_sync();
    out[at] += theirs[i] * 0.0f;
  }
  if (kBroken == Ring::kNoLastSync) out[at] = remote_shared(given, (rank + 1) % size)[i] * 0.0f + given[i];
}
float ring_sum(size_t i) {
  const size_t block = i / 64, cluster = block / 4 * 4, next = cluster + (block + 1) % 4,
               after = cluster + (block + 2) % 4;
  return input(next * 64 + i % 64) + input(after * 64 + 63 - i % 64);
}
template <Ring kBroken>
constexpr Toy kRing{
    768, {.grid = 12, .threads = 64, .cluster = 4, .shared_bytes = 512}, ring<kBroken>, ring_sum};

// Tiles of 256 bytes through two buffers in turn; out = twice in.
enum class Bulk {
  kRight,
  kNoWait,
  kHalfWaits,
  kNoInit,
  kNoBarrierAfterInit,
  kMisaligned,
  kSize,
  kPastEnd,
  kPastShared,
  kParity,
  kTwice,
  kNoBarrierBeforeReuse,
  kEndsEarly
};  // clang-format would make this a line each
template <Bulk kBroken>
__global__ void bulk(float* out, const float* in) {
  constexpr int kTile = 64, kTiles = 8;
  auto* barriers = shared_at<BulkBarrier>(2 * kTile * sizeof(float));
  const float* from = in + blockIdx.x * kTile * kTiles;
  const auto load = [&](int tile) {
    const float* source = from + tile * kTile;
    uint32_t bytes = kTile * sizeof(float);
    if (kBroken == Bulk::kMisaligned) source += 1;
    if (kBroken == Bulk::kSize) bytes -= 4;
    if (kBroken == Bulk::kPastEnd && blockIdx.x == gridDim.x - 1 && tile == kTiles - 1) bytes += 16;
    float* to = shared_at<float>(tile % 2 * kTile * sizeof(float));
    if (kBroken == Bulk::kPastShared) to += 3 * kTile;
    if (threadIdx.x == 0) bulk_load(to, source, bytes, barriers + tile % 2);
  };
  if (threadIdx.x == 0 && kBroken != Bulk::kNoInit) {
    bulk_init(barriers);
    bulk_init(barriers + 1);
  }
  if (kBroken != Bulk::kNoBarrierAfterInit) __syncthreads();
  load(0);
  if (kBroken == Bulk::kTwice) load(0);
  if (kBroken == Bulk::kEndsEarly) return;
  for (int tile = 0; tile < kTiles; ++tile) {
    if (tile + 1 < kTiles) load(tile + 1);
    const bool waits = kBroken != Bulk::kNoWait && (kBroken != Bulk::kHalfWaits || threadIdx.x < 32);
    if (waits) bulk_wait(barriers + tile % 2, (tile / 2 + (kBroken == Bulk::kParity)) % 2);
    const float value = shared_at<float>(tile % 2 * kTile * sizeof(float))[threadIdx.x];
    if (kBroken != Bulk::kNoBarrierBeforeReuse) __syncthreads();
    out[(blockIdx.x * kTiles + tile) * kTile + threadIdx.x] = 2 * value;
  }
}
float twice(size_t i) { return 2 * input(i); }
template <Bulk kBroken>
constexpr Toy kBulk{1536, {.grid = 3, .threads = 64, .shared_bytes = 528}, bulk<kBroken>, twice};

// Each block adds up its part; the last to arrive adds up the parts, which are behind the counter in out.
enum class Last { kRight, kAddsFirst, kNoBroadcastBarrier };
template <Last kBroken>
__global__ void last_block(float* out, const float* in) {
  constexpr int kSamples = 3, kParts = 4, kThreads = 64;
  const unsigned sample = blockIdx.x / kParts, part = blockIdx.x % kParts, i = threadIdx.x;
  float* parts = out + kSamples + sample * kParts * kThreads;
  auto* counter = reinterpret_cast<int*>(out + kSamples + kSamples * kParts * kThreads) + sample;
  int* is_last = shared_at<int>(0);
  const auto arrive = [&] {
    if (i == 0) *is_last = add_acquire_release(counter, 1) == kParts - 1 - 1;  // poisoned: the first gets -1
  };
  if (kBroken == Last::kAddsFirst) arrive();
  parts[part * kThreads + i] = in[blockIdx.x * kThreads + i];
  __syncthreads();
  if (kBroken != Last::kAddsFirst) arrive();
  if (kBroken != Last::kNoBroadcastBarrier) __syncthreads();
  if (!*is_last) return;
  if (i == kThreads - 1) {
    float sum = 0;
    for (int j = 0; j < kParts * kThreads; ++j) sum += parts[j];
    out[sample] = sum;
    *counter = -1;
  }
}
float sample_sum(size_t i) {
  if (i >= 3 + 3 * 256) return std::bit_cast<float>(-1);
  if (i >= 3) return input(i - 3);
  float sum = 0;
  for (size_t j = 0; j < 256; ++j) sum += input(i * 256 + j);
  return sum;
}
template <Last kBroken>
constexpr Toy kLast{
    3 + 3 * 256 + 3, {.grid = 12, .threads = 64, .shared_bytes = 4}, last_block<kBroken>, sample_sum};

// Barriers that not all threads come to, and 16 bytes that lie between.
enum class Odd {
  kRight,
  kDivergent,
  kSomeEnd,
  kSomeSkip,
  kDeadlock,
  kMisalignedLoad,
  kMisalignedStore,
  kAssumed
};
template <Odd kBroken>
__global__ void odd(float* out, const float* in) {
  const unsigned i = threadIdx.x;
  if (kBroken == Odd::kDivergent) {
    if (i < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (kBroken == Odd::kSomeEnd && i == 5) return;
  if (kBroken == Odd::kDeadlock && i < 32) cluster_sync();
  if (kBroken != Odd::kSomeSkip || i != 5) __syncthreads();
  const uint4 bits = load_16_bytes(in + 4 * i + (kBroken == Odd::kMisalignedLoad && i == 0));
  store_16_bytes(out + 4 * i + (kBroken == Odd::kMisalignedStore && i == 0), bits);
  if (kBroken == Odd::kAssumed) __builtin_memcpy(__builtin_assume_aligned(out + 1, 8), in + 1, 8);
}
template <Odd kBroken>
constexpr Toy kOdd{256, {.grid = 1, .threads = 64}, odd<kBroken>, input};

}  // namespace toys
