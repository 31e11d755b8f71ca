// The ending of the block before: y = relu(a + b), and the means of y over the pixels, each map read once.
//
// y is rounded before it is summed. Sums are float32, always of the same values in the same order: it follows
// from C, H*W, layout and type alone, not from the batch or from where samples begin.
#pragma once

#include "map_pieces.cuh"

namespace mod_kernels {

// One value of y, as it is stored.
template <class T>
__device__ __forceinline__ T ending(const AddReluPool& p, T a, T b) {
  float value = widen(a);
  if (p.b.data) value += widen(b);
  return narrow<T>(p.relu ? relu(value) : value);
}

// ---- NCHW

// Where a block's planes lie, and what its threads share: head and tail of each piece of a round, the planes'
// sums.
template <class T>
struct PoolBlock {
  const AddReluPool& p;
  const T *a, *b;  // b may be null
  T* y;
  int count;  // values
  float *heads, *tails, *sums;

  __device__ PoolBlock(const AddReluPool& p_, int64_t n, int first_plane, int planes)
      : p(p_), count(planes * p.shape.pixels), heads(reinterpret_cast<float*>(shared_memory())) {
    const int64_t begin = static_cast<int64_t>(first_plane) * p.shape.pixels;
    a = sample_of<T>(p.a, n) + begin;
    b = p.b.data ? sample_of<T>(p.b, n) + begin : nullptr;
    y = sample_of<T>(p.y, n) + begin;
    tails = heads + kMapThreads * kMapSteps;
    sums = tails + kMapThreads * kMapSteps;
  }
  __device__ __forceinline__ bool is_wide() const {
    return count % kLanes<T> == 0 && begins_at_16_bytes(a) && begins_at_16_bytes(b) && begins_at_16_bytes(y);
  }

  // One round of pieces, from value `first` on; each by one instruction.
  __device__ __forceinline__ void wide_round(int first) const {
    constexpr int V = kLanes<T>;
    Piece<T> as[kMapSteps], bs[kMapSteps];
#pragma unroll
    for (int step = 0; step < kMapSteps; ++step) {
      const int at = first + (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
      if (at >= count) continue;
      as[step] = load_piece<V>(a + at);
      if (b) bs[step] = load_piece<V>(b + at);
    }
#pragma unroll
    for (int step = 0; step < kMapSteps; ++step) {
      const int slot = step * kMapThreads + static_cast<int>(threadIdx.x), at = first + slot * V;
      if (at >= count) continue;
      const int split = plane_left(at);
      float head = 0.0f, tail = 0.0f;
      Piece<T> piece;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        piece.values[i] = ending(p, as[step].values[i], bs[step].values[i]);
        const float value = widen(piece.values[i]);
        head += i < split ? value : 0.0f;
        tail += i < split ? 0.0f : value;
      }
      store_piece(y + at, piece);
      heads[slot] = head;
      tails[slot] = tail;
    }
  }
  // The same value by value, pieces of `width`.
  __device__ __forceinline__ void narrow_round(int first, int width) const {
#pragma unroll 1
    for (int slot = threadIdx.x; slot < kMapThreads * kMapSteps; slot += kMapThreads) {
      const int at = first + slot * width, split = plane_left(at);
      float head = 0.0f, tail = 0.0f;
#pragma unroll 1
      for (int i = 0; i < width && at + i < count; ++i) {
        const T y_value = ending(p, a[at + i], b ? b[at + i] : T{});
        y[at + i] = y_value;
        head += i < split ? widen(y_value) : 0.0f;
        tail += i < split ? 0.0f : widen(y_value);
      }
      heads[slot] = head;
      tails[slot] = tail;
    }
  }
  // Values of a plane from `at` on.
  __device__ __forceinline__ int plane_left(int at) const { return p.shape.pixels - at % p.shape.pixels; }
};

// A block takes grid.lanes planes of a sample, fewer than 2^31 values, in rounds of pieces, kMapSteps a
// thread. Planes are one run of values, which begins at a multiple of 16 bytes where the sample does,
// whatever H*W is: a piece of 16 bytes has the last values of one plane (head) and the first of the next
// (tail), and no more as long as no plane is shorter than it; of shorter ones a piece is a value. Each is
// loaded and stored by one thread, so y may be a. A plane's sum is then put together from its pieces in
// shared memory by a team of grid.parts threads that read neighbours: no two lanes of a warp, which reads a
// stretch of less than 32, meet in a bank. Grid: samples * grid.chunks. Shared: a PoolBlock's.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    add_relu_pool_planes_kernel(const __grid_constant__ AddReluPool p) {
  const int64_t n = blockIdx.x / p.grid.chunks;
  const int first_plane = static_cast<int>(blockIdx.x % p.grid.chunks) * p.grid.lanes;
  const int left = p.shape.channels - first_plane, planes = left < p.grid.lanes ? left : p.grid.lanes;
  const int hw = p.shape.pixels, team = p.grid.parts, lane_of_team = static_cast<int>(threadIdx.x) % team;
  const int width = hw < kLanes<T> ? 1 : kLanes<T>, round = kMapThreads * kMapSteps * width;
  const PoolBlock<T> block(p, n, first_plane, planes);
  const int count = block.count;
  const bool wide = width > 1 && block.is_wide();
  for (int plane = threadIdx.x; plane < planes; plane += kMapThreads) block.sums[plane] = 0.0f;
  for (int first = 0; first < count; first += round) {
    if (wide) {
      block.wide_round(first);
    } else {
      block.narrow_round(first, width);
    }
    __syncthreads();
    const int end = count - first < round ? count : first + round;
    const int plane_end = (end - 1) / hw + 1;
    for (int base = first / hw; base < plane_end; base += kMapThreads / team) {
      const int plane = base + static_cast<int>(threadIdx.x) / team, plane_at = plane * hw;
      float sum = 0.0f;
      if (plane < plane_end) {
        const int from = plane_at > first ? plane_at : first, to = end - plane_at < hw ? end : plane_at + hw;
        const int last_slot = (to - 1 - first) / width;
        for (int slot = (from - first) / width + lane_of_team; slot <= last_slot; slot += team) {
          sum += first + slot * width >= plane_at ? block.heads[slot] : block.tails[slot];
        }
      }
      for (int apart = team / 2; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
      if (plane < plane_end && lane_of_team == 0) block.sums[plane] += sum;
    }
    __syncthreads();
  }
  for (int plane = threadIdx.x; plane < planes; plane += kMapThreads) {
    p.pooled[n * p.shape.channels + first_plane + plane] = block.sums[plane] / static_cast<float>(hw);
  }
}

// ---- channels_last

inline constexpr int kPoolColumnBlocks = 5;  // as kMapBlocks, with room for a piece's sums

// A block, one of a cluster's, takes a chunk of channels and its share of the pixels; a thread one piece of
// channels, whose sums stay in its registers. They are added up over the warp, over the block, and over the
// cluster, whose first block reads those of the others. Grid: samples * grid.chunks * grid.parts, clusters of
// grid.parts blocks. Shared: a warp's sums, kWarps rows of grid.lanes * V, then the block's.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kPoolColumnBlocks)
    add_relu_pool_columns_kernel(const __grid_constant__ AddReluPool p) {
  constexpr int V = kLanes<T>, kWarps = kMapThreads / kWarp;
  const int part = cluster_rank(), parts = cluster_size();
  const int64_t block = blockIdx.x / parts, n = block / p.grid.chunks;
  const int channels = p.shape.channels, hw = p.shape.pixels, width = p.grid.lanes * V;
  const Column column(p.grid, static_cast<int>(block % p.grid.chunks), 0, channels, V);
  const Pixels pixels(hw, part, parts, column.rows);
  const T* sample_a = sample_of<T>(p.a, n);
  const T* sample_b = p.b.data ? sample_of<T>(p.b, n) : nullptr;
  T* sample_y = sample_of<T>(p.y, n);
  const bool wide = column.is_wide<T>(channels, {sample_a, sample_b, sample_y});
  float totals[V] = {};
  const int rows = column.rows, first_row = pixels.begin + column.row;
  for (int row = first_row; row < pixels.end && wide; row += kMapSteps * rows) {
    Piece<T> as[kMapSteps], bs[kMapSteps];
#pragma unroll
    for (int step = 0; step < kMapSteps; ++step) {
      const int64_t at = static_cast<int64_t>(row + step * rows) * channels + column.channel;
      if (row + step * rows >= pixels.end) continue;
      as[step] = load_piece<V>(sample_a + at);
      if (sample_b) bs[step] = load_piece<V>(sample_b + at);
    }
#pragma unroll
    for (int step = 0; step < kMapSteps; ++step) {
      const int64_t at = static_cast<int64_t>(row + step * rows) * channels + column.channel;
      if (row + step * rows >= pixels.end) continue;
      Piece<T> piece;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        piece.values[i] = ending(p, as[step].values[i], bs[step].values[i]);
        totals[i] += widen(piece.values[i]);
      }
      store_piece(sample_y + at, piece);
    }
  }
  for (int row = first_row; row < pixels.end && !wide; row += rows) {
    const int64_t at = static_cast<int64_t>(row) * channels + column.channel;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i >= column.count) continue;
      const T value = ending(p, sample_a[at + i], sample_b ? sample_b[at + i] : T{});
      sample_y[at + i] = value;
      totals[i] += widen(value);
    }
  }
  float* warp_sums = reinterpret_cast<float*>(shared_memory());
  float* sums = warp_sums + kWarps * width;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    for (int apart = p.grid.lanes; apart < kWarp; apart *= 2) {
      totals[i] += __shfl_xor_sync(0xffffffffu, totals[i], apart);
    }
    if (static_cast<int>(threadIdx.x) % kWarp < p.grid.lanes)
      warp_sums[warp * width + i * p.grid.lanes + column.lane] = totals[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kMapThreads) {
    float sum = warp_sums[i];
    for (int other = 1; other < kWarps; ++other) sum += warp_sums[other * width + i];
    sums[i] = sum;
  }
  cluster_sync();
  if (part == 0) {
    for (int i = threadIdx.x; i < width; i += kMapThreads) {
      float sum = sums[i];
      for (int other = 1; other < parts; ++other) sum += *remote_shared(sums + i, other);
      const int channel = column.chunk_begin + i % p.grid.lanes * V + i / p.grid.lanes;
      if (channel < channels) p.pooled[n * channels + channel] = sum / static_cast<float>(hw);
    }
  }
  cluster_sync();
}

}  // namespace mod_kernels
