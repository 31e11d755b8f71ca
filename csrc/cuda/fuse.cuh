// Fuse: the scaled branch added to its channels, in place or in one pass into a fresh map.
//
// y = x, then y[n, P_j] += scores[n, j] * z[n, j], the sum in float32 and rounded once, of a repeated
// channel's terms as well (j ascending). A value outside of P is moved as it is.
#pragma once

#include "map_pieces.cuh"

namespace mod_kernels {

// One sample. In place x is y; a value is read by the thread that writes it.
template <class T>
struct FuseSample {
  const T* x;
  T* y;
  NarrowSample<T> z;
  const float* scores;
  const int64_t* index;
  int k;

  __device__ FuseSample(const FuseChannels& p, int64_t n)
      : x(sample_of<T>(p.x, n)),
        y(sample_of<T>(p.y, n)),
        z(sample_of<T>(p.z, n)),
        scores(p.scores + n * p.k),
        index(p.index + n * p.k),
        k(p.k) {}

  __device__ __forceinline__ T sum(T x_value, int j, T z_value) const {
    return narrow<T>(widen(x_value) + scores[j] * widen(z_value));
  }
  // The value at y + at, with all terms of its channel's link; a copy where there are none.
  __device__ __forceinline__ void fuse_value(int64_t at, int link, int channel, int pixel) const {
    const T x_value = x[at];
    if (link == Links::kNone) {
      y[at] = x_value;
      return;
    }
    float total = widen(x_value);
    for_links(link, index, k, channel, [&](int j) { total += scores[j] * widen(z.at(j, pixel)); });
    y[at] = narrow<T>(total);
  }
};

// Of V values, the first of them `at` values behind another place: those that are in [begin, end) from there.
template <int V>
struct Within {
  int begin, end;

  __device__ Within(int64_t at, int64_t begin_, int64_t end_)
      : begin(clamped(begin_ - at)), end(clamped(end_ - at)) {}
  __device__ static __forceinline__ int clamped(int64_t i) {
    return i < 0 ? 0 : i > V ? V : static_cast<int>(i);
  }
};

// ---- NCHW

// Where P is a range: all of x where y is a map of its own, P alone in place. If z is NCHW, what is added
// lies in a row as well, and is loaded like x. Grid: samples * grid.parts, a block takes kRunValues.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    fuse_range_kernel(const __grid_constant__ FuseChannels p) {
  constexpr int V = kLanes<T>;
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int hw = p.shape.pixels;
  const int64_t p_begin = static_cast<int64_t>(p.first) * hw,
                p_end = p_begin + static_cast<int64_t>(p.k) * hw;
  const bool in_place = p.x.data == p.y.data;
  const int64_t walk_begin = in_place ? p_begin : 0;
  const int64_t walk_end = in_place ? p_end : static_cast<int64_t>(p.shape.channels) * hw;
  const Run run(walk_begin + part * kRunValues<T>, walk_end, kRunValues<T>, hw);
  const FuseSample<T> sample(p, n);
  if (!run.is_wide<T>({sample.x, sample.y})) {
#pragma unroll 1
    for (int value = threadIdx.x; value < run.count; value += kMapThreads) {
      const auto [row, pixel] = run.place(value, hw);
      const int channel = run.channel + row, j = channel - p.first;
      sample.fuse_value(run.begin + value, j >= 0 && j < p.k ? j : Links::kNone, channel, pixel);
    }
    return;
  }
  const bool z_in_row = sample.z.stride_p == 1 && sample.z.stride_c == hw;
  Piece<T> pieces[kMapSteps], added[kMapSteps];
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value >= run.count) continue;
    const int64_t at = run.begin + value;
    const Within<V> in_p(at, p_begin, p_end);
    pieces[step] = load_piece<V>(sample.x + at);
    if (z_in_row && in_p.begin < in_p.end) {
      added[step] = load_some<V>(sample.z.data + (at - p_begin), in_p.begin, in_p.end);
    }
  }
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value >= run.count) continue;
    const int64_t at = run.begin + value;
    const Within<V> in_p(at, p_begin, p_end);
    if (in_p.begin < in_p.end) {
      Place place = run.place(value, hw);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int j = run.channel + place.row - p.first;
        T& value_i = pieces[step].values[i];
        if (i >= in_p.begin && i < in_p.end) {
          value_i = sample.sum(value_i, j, z_in_row ? added[step].values[i] : sample.z.at(j, place.pixel));
        }
        place.to_next(hw);
      }
    }
    store_piece(sample.y + at, pieces[step]);
  }
}

// Out of place where P is an index: x is copied, then the values of P are written again. Grid as above.
// Shared: Links of the run's channels.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    fuse_index_kernel(const __grid_constant__ FuseChannels p) {
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int hw = p.shape.pixels;
  const Run run(part * kRunValues<T>, static_cast<int64_t>(p.shape.channels) * hw, kRunValues<T>, hw);
  const FuseSample<T> sample(p, n);
  const int rows = run.rows(hw);
  const Links links(shared_memory(), rows);
  links.build(sample.index, p.k, run.channel, rows, p.shape.channels);
  const auto add = [&](int begin, int end) {
    run.for_rows(begin, end, hw, [&](int row, int value, int row_end) {
      const int link = links.of(row);
      if (link == Links::kNone) return;
#pragma unroll 1
      for (int pixel = run.place(value, hw).pixel; value < row_end; ++value, ++pixel) {
        sample.fuse_value(run.begin + value, link, run.channel + row, pixel);
      }
    });
  };
  if (!run.is_wide<T>({sample.x, sample.y})) {
#pragma unroll 1
    for (int value = threadIdx.x; value < run.count; value += kMapThreads) {
      sample.y[run.begin + value] = sample.x[run.begin + value];
      add(value, value + 1);
    }
    return;
  }
  constexpr int V = kLanes<T>;
  Piece<T> pieces[kMapSteps];
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value < run.count) pieces[step] = load_piece<V>(sample.x + run.begin + value);
  }
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value < run.count) store_piece(sample.y + run.begin + value, pieces[step]);
  }
#pragma unroll 1
  for (int value = static_cast<int>(threadIdx.x) * V; value < run.count; value += kMapThreads * V)
    add(value, value + V);
}

// In place at the channels of an index. Where several j name one channel the first of them adds all, and the
// others nothing. In pieces where planes are of whole ones that begin at multiples of 16 bytes in x and z,
// else value by value. Grid: samples * grid.parts, a block takes kMapThreads * kLanes of the k * hw values
// that are named. Shared: two integers for each j of the block.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    fuse_planes_kernel(const __grid_constant__ FuseChannels p) {
  constexpr int V = kLanes<T>;
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int hw = p.shape.pixels;
  const Run run(part * kMapThreads * V, static_cast<int64_t>(p.k) * hw, kMapThreads * V, hw);
  const int rows = run.rows(hw);
  const FuseSample<T> sample(p, n);
  int* earlier = reinterpret_cast<int*>(shared_memory());
  int* later = earlier + rows;
  for (int i = threadIdx.x; i < 2 * rows; i += kMapThreads) earlier[i] = 0;
  __syncthreads();
  for (int row = 0; row < rows; ++row) {
    const int j = run.channel + row;
    for (int other = threadIdx.x; other < p.k; other += kMapThreads) {
      if (other != j && sample.index[other] == sample.index[j])
        atomicAdd((other < j ? earlier : later) + row, 1);
    }
  }
  __syncthreads();
  const bool wide = hw % V == 0 && sample.z.stride_p == 1 && sample.z.stride_c == hw &&
                    begins_at_16_bytes(sample.x) && begins_at_16_bytes(sample.z.data);
  const int step = wide ? V : 1;
#pragma unroll 1
  for (int value = static_cast<int>(threadIdx.x) * step; value < run.count; value += kMapThreads * step) {
    const auto [row, pixel] = run.place(value, hw);
    const int j = run.channel + row;
    const int64_t channel = sample.index[j];
    const bool inside = channel >= 0 && channel < p.shape.channels;
    device_assert_index(inside);
    if (!inside || earlier[row] > 0) continue;
    const int64_t at = channel * hw + pixel;
    if (wide && later[row] == 0) {
      Piece<T> piece = load_piece<V>(sample.x + at);
      const Piece<T> added = load_piece<V>(sample.z.data + static_cast<int64_t>(j) * hw + pixel);
#pragma unroll
      for (int i = 0; i < V; ++i) piece.values[i] = sample.sum(piece.values[i], j, added.values[i]);
      store_piece(sample.y + at, piece);
    } else {
      const int link = later[row] > 0 ? Links::kSeveral : j;
#pragma unroll 1
      for (int i = 0; i < step; ++i) sample.fuse_value(at + i, link, static_cast<int>(channel), pixel + i);
    }
  }
}

// ---- channels_last

// A chunk of channels, a part of the pixels a block; a piece that has channels of P is copied, and its values
// of P written again. In place the others are passed over. Grid: samples * grid.parts * grid.chunks. In place
// with a range, the chunks are of P alone. Shared: Links of the chunk's channels, where P is an index.
template <class T, bool kIndexed>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    fuse_column_kernel(const __grid_constant__ FuseChannels p) {
  constexpr int V = kLanes<T>;
  const bool in_place = p.x.data == p.y.data, of_p = in_place && !kIndexed;
  const int channels = p.shape.channels, width = p.grid.lanes * V;
  const ColumnBlock block(p.grid);
  const Column column(p.grid, block.chunk, of_p ? p.first : 0, of_p ? p.first + p.k : channels, V);
  const FuseSample<T> sample(p, block.n);
  const Links links(shared_memory(), width);
  if constexpr (kIndexed) links.build(sample.index, p.k, column.chunk_begin, width, channels);
  const int j_begin = column.channel - p.first;  // of a range: the j of the piece's first value
  const Within<V> in_p(j_begin, 0, p.k < column.count + j_begin ? p.k : column.count + j_begin);
  const auto link_of = [&](int i) {
    if constexpr (kIndexed) return links.of(column.lane * V + i);
    return i >= in_p.begin && i < in_p.end ? j_begin + i : Links::kNone;
  };
  const unsigned touched = column.marked<V>([&](int i) { return link_of(i) != Links::kNone; });
  if (column.count <= 0 || (in_place && touched == 0)) return;
  const bool z_in_row = !kIndexed && sample.z.stride_c == 1;
  const Pixels pixels(p.shape.pixels, block.part, p.grid.parts, column.rows);
  const bool wide = column.is_wide<T>(channels, {sample.x, sample.y});
  for (int pixel = pixels.begin + column.row; pixel < pixels.end; pixel += column.rows) {
    const int64_t at = static_cast<int64_t>(pixel) * channels + column.channel;
    if (wide) {
      Piece<T> piece = load_piece<V>(sample.x + at);
      if (z_in_row && touched != 0) {
        const auto added =
            load_some<V>(sample.z.data + pixel * sample.z.stride_p + j_begin, in_p.begin, in_p.end);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          T& value = piece.values[i];
          if (touched >> i & 1) value = sample.sum(value, j_begin + i, added.values[i]);
        }
      }
      store_piece(sample.y + at, piece);
      if (z_in_row) continue;
    } else {
#pragma unroll 1
      for (int i = 0; i < column.count; ++i) sample.y[at + i] = sample.x[at + i];
    }
    for_marked(touched, [&](int i) { sample.fuse_value(at + i, link_of(i), column.channel + i, pixel); });
  }
}

}  // namespace mod_kernels
