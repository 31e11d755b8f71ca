// The gradient of a block's input: one pass over a whole map that adds all parts of it up.
//
// dx = dy + dpooled / (H W) + dgathered[n, j] at channel index[n, j], then zero where y <= 0 (a NaN is not),
// y being that of `overwritten` at its channels. In float32, rounded once. Blocks look their channels up in
// the sample's row of index: nothing is scattered. What all channels get is worked out in pieces of 16 bytes,
// and the few values that have a part in dgathered or overwritten once more, from the start.
#pragma once

#include "map_pieces.cuh"

namespace mod_kernels {

template <class T>
struct GradientSample {
  const InputGradient& p;
  const T *dy, *y;  // y may be null
  T* dx;
  NarrowSample<T> dgathered, overwritten;
  const float* dpooled;
  const int64_t* index;

  __device__ GradientSample(const InputGradient& p_, int64_t n)
      : p(p_),
        dy(sample_of<T>(p.dy, n)),
        y(p.y.data ? sample_of<T>(p.y, n) : nullptr),
        dx(sample_of<T>(p.dx, n)),
        dgathered(sample_of<T>(p.dgathered, n)),
        overwritten(sample_of<T>(p.overwritten, n)),
        dpooled(p.dpooled ? p.dpooled + n * p.shape.channels : nullptr),
        index(p.index + n * p.k) {}

  __device__ __forceinline__ bool has_overwritten() const { return p.overwritten.data && p.y.data; }
  __device__ __forceinline__ bool reads_index() const {
    return p.dgathered.data || (has_overwritten() && p.original);
  }
  // What dpooled adds to a channel.
  __device__ __forceinline__ float shift(int channel) const {
    return dpooled ? dpooled[channel] / static_cast<float>(p.shape.pixels) : 0.0f;
  }
  // Whether a channel, of this link, has a part in dgathered or overwritten.
  __device__ __forceinline__ bool is_special(int link, int channel) const {
    return link != Links::kNone || (has_overwritten() && !p.original && in_range(channel));
  }
  __device__ __forceinline__ bool in_range(int channel) const {
    return channel >= p.first && channel < p.first + p.overwritten_k;
  }
  // dx of a value that is not special.
  __device__ __forceinline__ T ordinary(T dy_value, T y_value, float shift) const {
    const float total = widen(dy_value) + shift;
    return narrow<T>(y && widen(y_value) <= 0.0f ? 0.0f : total);
  }
  // The value at dx + at, whatever it is.
  __device__ __forceinline__ void write(int64_t at, float shift, int link, int channel, int pixel) const {
    float total = widen(dy[at]) + shift;
    if (p.dgathered.data) {
      for_links(link, index, p.k, channel, [&](int j) { total += widen(dgathered.at(j, pixel)); });
    }
    if (y) {
      float output = widen(y[at]);
      if (has_overwritten()) {
        const int j = p.original ? first_of(link, channel) : in_range(channel) ? channel - p.first : -1;
        if (j >= 0) output = widen(overwritten.at(j, pixel));
      }
      if (output <= 0.0f) total = 0.0f;
    }
    dx[at] = narrow<T>(total);
  }

 private:
  // A link's first j, negative where there is none.
  __device__ __forceinline__ int first_of(int link, int channel) const {
    if (link != Links::kSeveral) return link;
    int j = 0;
    while (index[j] != channel) ++j;
    return j;
  }
};

// NCHW. Grid: samples * grid.parts, a block takes kRunValues of a sample's. Shared, of the run's channels:
// what dpooled adds, and Links.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    input_gradient_run_kernel(const __grid_constant__ InputGradient p) {
  constexpr int V = kLanes<T>;
  const int64_t n = blockIdx.x / p.grid.parts, part = blockIdx.x % p.grid.parts;
  const int hw = p.shape.pixels, channels = p.shape.channels;
  const Run run(part * kRunValues<T>, static_cast<int64_t>(channels) * hw, kRunValues<T>, hw);
  const int rows = run.rows(hw);
  const GradientSample<T> sample(p, n);
  float* shifts = reinterpret_cast<float*>(shared_memory());
  const Links links(shared_memory() + rows * sizeof(float), rows);
  for (int row = threadIdx.x; row < rows; row += kMapThreads) shifts[row] = sample.shift(run.channel + row);
  const bool linked = sample.reads_index();
  if (linked) links.build(sample.index, p.k, run.channel, rows, channels);
  __syncthreads();
  const auto write_special = [&](int begin, int end, bool all) {
    run.for_rows(begin, end, hw, [&](int row, int value, int row_end) {
      const int link = linked ? links.of(row) : Links::kNone, channel = run.channel + row;
      if (!all && !sample.is_special(link, channel)) return;
#pragma unroll 1
      for (int pixel = run.place(value, hw).pixel; value < row_end; ++value, ++pixel) {
        sample.write(run.begin + value, shifts[row], link, channel, pixel);
      }
    });
  };
  if (!run.is_wide<T>({sample.dy, sample.y, sample.dx})) {
#pragma unroll 1
    for (int value = threadIdx.x; value < run.count; value += kMapThreads)
      write_special(value, value + 1, true);
    return;
  }
  Piece<T> pieces[kMapSteps], ys[kMapSteps] = {};
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value >= run.count) continue;
    pieces[step] = load_piece<V>(sample.dy + run.begin + value);
    if (sample.y) ys[step] = load_piece<V>(sample.y + run.begin + value);
  }
#pragma unroll
  for (int step = 0; step < kMapSteps; ++step) {
    const int value = (step * kMapThreads + static_cast<int>(threadIdx.x)) * V;
    if (value >= run.count) continue;
    Place place = run.place(value, hw);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      T& at = pieces[step].values[i];
      at = sample.ordinary(at, ys[step].values[i], shifts[place.row]);
      place.to_next(hw);
    }
    store_piece(sample.dx + run.begin + value, pieces[step]);
  }
#pragma unroll 1
  for (int value = static_cast<int>(threadIdx.x) * V; value < run.count; value += kMapThreads * V) {
    write_special(value, value + V, false);
  }
}

// channels_last: a chunk of channels, a part of the pixels a block. Grid: samples * grid.parts * grid.chunks.
// Shared: Links of the chunk's channels.
template <class T>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks)
    input_gradient_column_kernel(const __grid_constant__ InputGradient p) {
  constexpr int V = kLanes<T>;
  const int channels = p.shape.channels, width = p.grid.lanes * V;
  const ColumnBlock block(p.grid);
  const Column column(p.grid, block.chunk, 0, channels, V);
  const GradientSample<T> sample(p, block.n);
  const Links links(shared_memory(), width);
  const bool linked = sample.reads_index();
  if (linked) links.build(sample.index, p.k, column.chunk_begin, width, channels);
  if (column.count <= 0) return;
  const auto link_of = [&](int i) { return linked ? links.of(column.lane * V + i) : Links::kNone; };
  const bool wide = column.is_wide<T>(channels, {sample.dy, sample.y, sample.dx});
  const unsigned special =
      column.marked<V>([&](int i) { return !wide || sample.is_special(link_of(i), column.channel + i); });
  float shifts[V];
#pragma unroll
  for (int i = 0; i < V; ++i) shifts[i] = i < column.count ? sample.shift(column.channel + i) : 0.0f;
  const Pixels pixels(p.shape.pixels, block.part, p.grid.parts, column.rows);
  for (int pixel = pixels.begin + column.row; pixel < pixels.end; pixel += column.rows) {
    const int64_t at = static_cast<int64_t>(pixel) * channels + column.channel;
    if (wide) {
      Piece<T> piece = load_piece<V>(sample.dy + at), y{};
      if (sample.y) y = load_piece<V>(sample.y + at);
#pragma unroll
      for (int i = 0; i < V; ++i) piece.values[i] = sample.ordinary(piece.values[i], y.values[i], shifts[i]);
      store_piece(sample.dx + at, piece);
    }
    for_marked(special, [&](int i) {
      const int channel = column.channel + i;
      sample.write(at + i, sample.shift(channel), link_of(i), channel, pixel);
    });
  }
}

}  // namespace mod_kernels
