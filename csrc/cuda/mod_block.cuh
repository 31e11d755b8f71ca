// The whole block: y = x, then y[:, P] += sigmoid(logits[index]) * conv_block(x[index]), index the k best
// channels.
//
// With clusters (sm_90 and newer) the blocks of a cluster share a sample from the first value pooled to the
// last one added: means and sums of the first layer stay in the shared memory of the block that made them,
// and others read them there. Without, the blocks of a sample share out pooling and the first layer, and the
// last of them to arrive does the rest. The layout of x is a run-time value: of all this it only changes how
// x is walked, and two kernels for it would double what is compiled.
#pragma once

#include "numeric.h"
#include "parameters.h"
#include "pooling.cuh"
#include "ranking.cuh"
#include "selector.cuh"
#include "tail_steps.cuh"

namespace mod_kernels {

// A kernel for devices with clusters is empty in the code of others, and the other way round: none is built
// that no launch would choose (plan.h).
#if defined(__CUDA_ARCH__)
template <bool kClusters>
inline constexpr bool kIsBuilt = kClusters == kBulkCopies;
#else
template <bool kClusters>
inline constexpr bool kIsBuilt = true;
#endif

template <class U>
__device__ __forceinline__ U* shared_at(int offset) {
  return reinterpret_cast<U*>(shared_memory() + offset);
}

__device__ __forceinline__ RankingMemory ranking_memory(const BlockParameters& p) {
  return {shared_at<int>(p.shared.counts), shared_at<unsigned long long>(p.shared.candidates)};
}

// Which channels a block pools, and multiplies with the first layer.
struct BlockShare {
  int first_group, groups, first, end;

  __device__ BlockShare(const BlockParameters& p, int block)
      : first_group(block * p.block_groups),
        groups(max_of(0, min_of(p.block_groups, p.groups - first_group))),
        first(min_of(p.c, first_group * p.group_channels)),
        end(min_of(p.c, (first_group + groups) * p.group_channels)) {}
};

// Means of the block's channels to shared memory (and x to y), then their part of the first layer to slots.
template <class T, bool kClusters>
__device__ void pool_and_multiply(const BlockParameters& p, int64_t n, const BlockShare& share,
                                  float* slots) {
  const int thread = static_cast<int>(threadIdx.x), threads = kBlockThreads;
  float* means = shared_at<float>(p.shared.pooled);
  const bool copies = p.y != nullptr && p.y != p.x;
  if (p.pooled == nullptr || copies) {
    const MapShare<T> map{static_cast<const T*>(p.x) + n * p.stride_xn,
                          copies ? static_cast<T*>(p.y) + n * p.stride_yn : nullptr,
                          share.first,
                          share.end,
                          p.c,
                          p.h * p.w};
    pool_share<T, kClusters>(p, map, shared_at<char>(p.shared.reused), shared_at<BulkBarrier>(0), means);
    __syncthreads();
  }
#pragma unroll 1
  for (int i = thread; i < share.end - share.first; i += threads) {
    const int64_t place = n * p.c + share.first + i;
    if (p.pooled != nullptr) {
      means[i] = p.pooled[place];
    } else if (p.pooled_out != nullptr) {
      p.pooled_out[place] = means[i];
    }
  }
  __syncthreads();
  first_layer_sums<T>(p, share.first_group, share.groups, means, slots);
}

// Scores and index of a sample from shared memory, where they are wanted.
__device__ __forceinline__ void store_selection(const BlockParameters& p, int64_t n) {
  const int* chosen = shared_at<int>(p.shared.chosen);
  const float* scores = shared_at<float>(p.shared.scores);
  for (int j = static_cast<int>(threadIdx.x); j < p.k; j += kBlockThreads) {
    if (p.scores != nullptr) p.scores[n * p.k + j] = scores[j];
    if (p.index != nullptr) p.index[n * p.k + j] = chosen[j];
  }
}

__device__ __forceinline__ void store_hidden(const BlockParameters& p, int64_t n, const float* hidden) {
  if (p.hidden == nullptr) return;
  for (int unit = static_cast<int>(threadIdx.x); unit < p.r; unit += kBlockThreads) {
    p.hidden[n * p.r + unit] = hidden[unit];
  }
}

// A cluster does one sample. Three barriers over it up to the selection: sums of the first layer are there;
// logits are there; the selection is made. One more between two steps of the tail. None ends before all have
// read what is in its shared memory.
template <class T>
__device__ void block_of_cluster(const BlockParameters& p) {
  const int thread = static_cast<int>(threadIdx.x), threads = kBlockThreads;
  const int blocks = cluster_size(), rank = cluster_rank();
  const int64_t n = blockIdx.x / static_cast<unsigned>(blocks);
  float *slots = shared_at<float>(p.shared.slots), *hidden = shared_at<float>(p.shared.hidden);
  auto* logits = shared_at<uint32_t>(p.shared.logits);
  pool_and_multiply<T, true>(p, n, BlockShare(p, rank), slots);
  cluster_sync();

  hidden_layer<T>(
      p,
      [&](int group) {
        const int owner = quotient(group, p.block_groups);
        return remote_shared(slots + (group - owner * p.block_groups) * p.r, owner);
      },
      hidden);
  __syncthreads();
  if (rank == 0) store_hidden(p, n, hidden);
  const int slice = (p.c + blocks - 1) / blocks;
  const int first = min_of(p.c, rank * slice), end = min_of(p.c, first + slice);
  second_layer<T>(p, first, end, hidden, [&](int c, float logit) {
    logits[c - first] = ordered_bits(logit);
    if (p.logits != nullptr) p.logits[n * p.c + c] = logit;
  });
  cluster_sync();

  // Every block makes the whole selection: it needs it, and to be told would take another barrier.
  auto* ordered = shared_at<uint32_t>(p.shared.reused);
#pragma unroll 1
  for (int c = thread; c < padded(p.c); c += threads) {
    const int owner = quotient(c, slice);
    ordered[c] = c < p.c ? *remote_shared(logits + (c - owner * slice), owner) : 0;
  }
  __syncthreads();
  cluster_arrive();
  int* chosen = shared_at<int>(p.shared.chosen);
  float* scores = shared_at<float>(p.shared.scores);
  rank_channels(ordered, p.c, p.k, ranking_memory(p), chosen, scores);
  if (rank == 0) store_selection(p, n);
  cluster_wait();

  const TailSample<T> sample = tail_sample<T>(p, n, chosen, scores);
  for (int step = 0; step < p.step_count; ++step) {
    if (step > 0) cluster_sync();
    tail_step<1>(p, sample, p.steps[step], Team{rank * threads + thread, blocks * threads});
  }
}

// Whether this block is the last of its sample's to come here. Then it sees what all of them have stored, and
// the counter is zero again.
__device__ __forceinline__ bool is_last(const BlockParameters& p, int64_t n) {
  int* answer = shared_at<int>(p.shared.counts);
  __syncthreads();
  if (threadIdx.x == 0) {
    *answer = add_acquire_release(p.counters + n, 1) == p.blocks - 1;
    if (*answer) p.counters[n] = 0;
  }
  __syncthreads();
  const bool last = *answer != 0;
  __syncthreads();
  return last;
}

template <class T>
__device__ void block_without_cluster(const BlockParameters& p) {
  const int thread = static_cast<int>(threadIdx.x), threads = kBlockThreads;
  const int64_t n = blockIdx.x / static_cast<unsigned>(p.blocks);
  int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.blocks)), blocks = p.blocks;
  float *slots = p.slots + n * p.groups * p.r, *hidden = shared_at<float>(p.shared.hidden);
  float* logits = p.logits + n * p.c;
  if (p.phase != Phase::kRank) {
    const BlockShare share(p, block);
    pool_and_multiply<T, false>(p, n, share, slots + share.first_group * p.r);
    if (p.phase == Phase::kPool) return;
    if (!is_last(p, n)) return;
    block = 0, blocks = 1;
  }

  hidden_layer<T>(p, [&](int group) { return slots + group * p.r; }, hidden);
  __syncthreads();
  if (block == 0) store_hidden(p, n, hidden);
  const int slice = (p.c + blocks - 1) / blocks;
  const int first = min_of(p.c, block * slice), end = min_of(p.c, first + slice);
  second_layer<T>(p, first, end, hidden, [&](int c, float logit) { logits[c] = logit; });
  if (p.phase == Phase::kRank) {
    if (!is_last(p, n)) return;
  } else {
    __syncthreads();
  }

  auto* ordered = shared_at<uint32_t>(p.shared.reused);
  for (int c = thread; c < padded(p.c); c += threads) ordered[c] = c < p.c ? ordered_bits(logits[c]) : 0;
  __syncthreads();
  int* chosen = shared_at<int>(p.shared.chosen);
  float* scores = shared_at<float>(p.shared.scores);
  rank_channels(ordered, p.c, p.k, ranking_memory(p), chosen, scores);
  store_selection(p, n);
  const TailSample<T> sample = tail_sample<T>(p, n, chosen, scores);
  for (int step = 0; step < p.step_count; ++step) {
    if (step > 0) __syncthreads();
    tail_step<1>(p, sample, p.steps[step], Team{thread, threads});
  }
}

// Grid: n * blocks; kBlockThreads threads; clusters of `blocks`.
template <class T, bool kClusters>
__global__ void __launch_bounds__(kBlockThreads, kBlocksAtOnce)
    mod_block_kernel(const __grid_constant__ BlockParameters p) {
  if constexpr (kIsBuilt<kClusters>) {
    if constexpr (kClusters) {
      block_of_cluster<T>(p);
    } else {
      block_without_cluster<T>(p);
    }
  }
}

// Step `step` of a tail by a launch of its own, p.blocks blocks a sample: where a tail is long and the blocks
// above are too few for it. The end of a launch is the barrier. Scores and index come from memory.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
    tail_step_kernel(const __grid_constant__ BlockParameters p, int step) {
  const int64_t n = blockIdx.x / static_cast<unsigned>(p.blocks);
  const int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(p.blocks)), threads = kBlockThreads;
  int* chosen = shared_at<int>(p.shared.chosen);
  float* scores = shared_at<float>(p.shared.scores);
  for (int j = static_cast<int>(threadIdx.x); j < p.k; j += threads) {
    chosen[j] = static_cast<int>(p.index[n * p.k + j]);
    scores[j] = p.scores[n * p.k + j];
  }
  __syncthreads();
  const Team team{block * threads + static_cast<int>(threadIdx.x), p.blocks * threads};
  tail_step<kTile>(p, tail_sample<T>(p, n, chosen, scores), p.steps[step], team);
}

}  // namespace mod_kernels
