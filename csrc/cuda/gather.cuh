// Gather: selected channels into a dense map.
#pragma once

#include "map_pieces.cuh"

namespace mod_kernels {

// V values of one plane at a time, which begin at multiples of their size in x and out.
template <int V, class T>
__device__ __forceinline__ void gather_run(const GatherChannels& p, const Run& run, const int64_t* index,
                                           const T* x, T* out) {
  const int hw = p.shape.pixels;
#pragma unroll 1
  for (int value = static_cast<int>(threadIdx.x) * V; value < run.count; value += kMapThreads * V) {
    const auto [row, pixel] = run.place(value, hw);
    const int64_t source = index[run.channel + row];
    const bool inside = source >= 0 && source < p.shape.channels;
    device_assert_index(inside);
    Piece<T, V> piece{};
    if (inside) piece = load_piece<V>(x + source * hw + pixel);
    store_piece(out + run.begin + value, piece);
  }
}

// out[n, j, p] = x[n, index[n, j], p]. Grid: samples * grid.parts, a block takes kMapThreads * kLanes of the
// k * hw values of a sample of out.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    gather_planes_kernel(const __grid_constant__ GatherChannels p) {
  constexpr int V = kLanes<T>;
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int hw = p.shape.pixels;
  const Run run(part * kMapThreads * V, static_cast<int64_t>(p.k) * hw, kMapThreads * V, hw);
  const int64_t* index = p.index + n * p.k;
  const T* x = sample_of<T>(p.x, n);
  T* out = sample_of<T>(p.out, n);
  // Of a plane's bytes and of both addresses at once.
  const uint64_t together = static_cast<uint64_t>(hw) * sizeof(T) | reinterpret_cast<uintptr_t>(x) |
                            reinterpret_cast<uintptr_t>(out);
  if (together % 16 == 0) {
    gather_run<V>(p, run, index, x, out);
  } else if (together % 8 == 0) {
    gather_run<V / 2>(p, run, index, x, out);
  } else {
    gather_run<1>(p, run, index, x, out);
  }
}

// The same in channels_last, out[n, p, j] = x[n, p, index[n, j]]: a thread puts together kLanes neighbours of
// out.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    gather_pixels_kernel(const __grid_constant__ GatherChannels p) {
  constexpr int V = kLanes<T>;
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int64_t begin = part * kMapThreads * V + static_cast<int>(threadIdx.x) * V;
  const int64_t values = static_cast<int64_t>(p.k) * p.shape.pixels;
  if (begin >= values) return;
  const int count = static_cast<int>(values - begin < V ? values - begin : V);
  const T* x = sample_of<T>(p.x, n);
  const int64_t* index = p.index + n * p.k;
  int64_t pixel = begin / p.k;
  int j = static_cast<int>(begin - pixel * p.k);
  Piece<T> piece{};
  bool all_inside = true;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    if (i < count) {
      const int64_t source = index[j];
      const bool inside = source >= 0 && source < p.shape.channels;
      all_inside = all_inside && inside;
      if (inside) piece.values[i] = x[pixel * p.shape.channels + source];
    }
    const bool last = ++j == p.k;
    pixel += last;
    j = last ? 0 : j;
  }
  device_assert_index(all_inside);
  T* out = sample_of<T>(p.out, n) + begin;
  if (count == V && begins_at_16_bytes(out)) {
    store_piece(out, piece);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < count) out[i] = piece.values[i];
    }
  }
}

}  // namespace mod_kernels
