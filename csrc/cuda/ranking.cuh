// The k channels of the largest logits, in descending order, ties to the lower channel, NaN first.
#pragma once

#include "numeric.h"
#include "parameters.h"

namespace mod_kernels {

// Bits whose order as integers is that of the logits: every NaN the same, above all else; -0.0 is +0.0.
__device__ __forceinline__ uint32_t ordered_bits(float logit) {
  const uint32_t bits = logit != logit ? 0x7fc00000u : bits_of(logit + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float from_ordered(uint32_t ordered) {
  return from_bits(ordered ^ (ordered >> 31 != 0 ? 0x80000000u : 0xffffffffu));
}

// Behind the C channels stand zeros up to so many, below the bits of any logit: all threads count as often.
__device__ __forceinline__ int padded(int c) {
  return quotient(c + kBlockThreads - 1, kBlockThreads) * kBlockThreads;
}

// No two channels have the same.
__device__ __forceinline__ unsigned long long rank_key(uint32_t ordered, int channel) {
  return static_cast<unsigned long long>(ordered) << 32 | ~static_cast<uint32_t>(channel);
}

inline constexpr int kWarps = kBlockThreads / kWarp;

// Shared memory of the ranking.
struct RankingMemory {
  int* counts;                     // (2 * kWarps + 1)
  unsigned long long* candidates;  // (max(k, 2 * kWarps))
};

struct KeyRange {
  unsigned long long lowest, highest;
};

__device__ __forceinline__ KeyRange range_of_both(KeyRange a, KeyRange b) {
  return {a.lowest < b.lowest ? a.lowest : b.lowest, a.highest > b.highest ? a.highest : b.highest};
}

// The smallest and the largest key, to every thread.
__device__ __forceinline__ KeyRange range_of_keys(const uint32_t* ordered, int c,
                                                  unsigned long long* memory) {
  const int thread = static_cast<int>(threadIdx.x);
  KeyRange range{~0ull, 0};
#pragma unroll 1
  for (int i = thread; i < c; i += kBlockThreads) {
    const unsigned long long key = rank_key(ordered[i], i);
    range = range_of_both(range, {key, key});
  }
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    range = range_of_both(range, {__shfl_xor_sync(0xffffffffu, range.lowest, apart),
                                  __shfl_xor_sync(0xffffffffu, range.highest, apart)});
  }
  if (thread % kWarp == 0) {
    memory[thread / kWarp] = range.lowest;
    memory[kWarps + thread / kWarp] = range.highest;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp)
    range = range_of_both(range, {memory[warp], memory[kWarps + warp]});
  __syncthreads();
  return range;
}

// A key that exactly k keys are no smaller than. There is one, as no two are equal: halving the range finds
// it, in a step for each bit that must be told apart, some twelve of them, or all 44 where logits are equal.
__device__ __forceinline__ unsigned long long key_of_rank(const uint32_t* ordered, int c, int k,
                                                          const RankingMemory& memory) {
  const int thread = static_cast<int>(threadIdx.x);
  const KeyRange range = range_of_keys(ordered, c, memory.candidates);
  unsigned long long low = range.lowest, high = range.highest + 1;  // as many as c, and none
  if (k == c) return low;
  // Two sets of counts in turn: one barrier a step.
  for (int step = 0;; ++step) {
    const unsigned long long middle = low + (high - low) / 2;
    int* counts = memory.counts + step % 2 * kWarps;
    int count = 0;
#pragma unroll 4
    for (int i = thread; i < padded(c); i += kBlockThreads) {
      count += __builtin_popcount(__ballot_sync(0xffffffffu, rank_key(ordered[i], i) >= middle));
    }
    if (thread % kWarp == 0) counts[thread / kWarp] = count;
    __syncthreads();
    count = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) count += counts[warp];
    if (count == k) return middle;
    (count > k ? low : high) = middle;
  }
}

// chosen[j] and scores[j], sigmoid of the logit, for j below k, by all threads of the block. ordered
// (padded(c)) must be there, a barrier passed, and at the end another is.
__device__ __forceinline__ void rank_channels(const uint32_t* ordered, int c, int k,
                                              const RankingMemory& memory, int* chosen, float* scores) {
  const int thread = static_cast<int>(threadIdx.x);
  int* taken = memory.counts + 2 * kWarps;
  if (thread == 0) *taken = 0;
  const unsigned long long least = key_of_rank(ordered, c, k, memory);
#pragma unroll 1
  for (int i = thread; i < c; i += kBlockThreads) {
    const unsigned long long key = rank_key(ordered[i], i);
    // In whatever order: a key's rank says where it goes.
    if (key >= least) memory.candidates[atomicAdd(taken, 1)] = key;
  }
  __syncthreads();
#pragma unroll 1
  for (int j = thread; j < k; j += kBlockThreads) {
    const unsigned long long key = memory.candidates[j];
    int rank = 0;
#pragma unroll 4
    for (int i = 0; i < k; ++i) rank += memory.candidates[i] > key;
    chosen[rank] = static_cast<int>(~static_cast<uint32_t>(key));
    scores[rank] = sigmoid(from_ordered(static_cast<uint32_t>(key >> 32)));
  }
  __syncthreads();
}

}  // namespace mod_kernels
