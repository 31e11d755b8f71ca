// How the kernels on whole maps are launched: from sizes alone, so that a test sees what a GPU does.
//
// None of it depends on the number of samples but the grid: neither do a sample's bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "map_parameters.h"

namespace mod_kernels {

struct MapLaunch {
  int64_t blocks = 0;
  int threads = 0, cluster = 1;
  int64_t shared_bytes = 0;
};

// Blocks are small: the ops move bytes, and 128 threads with two pieces of 16 bytes each keep 4 KB of every
// map in flight, so that ten blocks on a multiprocessor are more than its share of any card's memory needs. A
// sample of 2048x7x7 is 49 of them; and the tables of a run fit whatever H*W is.
inline constexpr int kMapThreads = 128, kMapSteps = 2;

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// In channels_last a thread walks this many pixels at least, where there are as many: what a block looks up
// of its channels, and a cluster's barriers, are paid once for them.
inline constexpr int kPixelsAThread = 8;

// The largest power of two that is no larger, at least 1.
constexpr int power_of_two_below(int64_t value) {
  int power = 1;
  while (2 * power <= value) power *= 2;
  return power;
}
constexpr int power_of_two_above(int64_t value, int most) {
  int power = 1;
  while (power < value && power < most) power *= 2;
  return power;
}

// Channels that a run of `values` can have values of.
constexpr int64_t rows_of_run(int64_t values, int channels, int pixels) {
  return std::min<int64_t>(channels, (values + pixels - 2) / pixels + 1);
}

// ---- a run of a sample's values a block

inline MapLaunch run_launch(MapGrid& grid, const MapShape& shape, int64_t values, int64_t run,
                            int64_t bytes_a_row, int rows_of) {
  grid = {static_cast<int>(divided_up(values, run)), 1, 1};
  return {shape.samples * grid.parts, kMapThreads, 1, bytes_a_row * rows_of_run(run, rows_of, shape.pixels)};
}

// ---- a chunk of the channels and a part of the pixels a block (channels_last)

// Chunks as wide as there are channels, to 32 pieces (512 bytes): a warp then reads neighbours.
inline MapLaunch column_launch(MapGrid& grid, const MapShape& shape, int channels, int width,
                               int64_t bytes_a_row) {
  grid.lanes = power_of_two_above(divided_up(channels, width), 32);
  grid.chunks = static_cast<int>(divided_up(channels, int64_t{grid.lanes} * width));
  grid.parts = static_cast<int>(divided_up(shape.pixels, int64_t{kMapThreads} / grid.lanes * kPixelsAThread));
  const int64_t blocks = shape.samples * grid.parts * grid.chunks;
  return {blocks, kMapThreads, 1, bytes_a_row * grid.lanes * width};
}

// ---- the ops; width: values in 16 bytes

inline MapLaunch gather_launch(GatherChannels& p, int width) {
  const int64_t values = int64_t{p.k} * p.shape.pixels, run = int64_t{kMapThreads} * width;
  return run_launch(p.grid, p.shape, values, run, 0, p.k);
}

inline constexpr int64_t kLinkBytes = 8;  // of a row of Links

inline MapLaunch fuse_planes_launch(FuseChannels& p, int width) {
  const int64_t values = int64_t{p.k} * p.shape.pixels;
  return run_launch(p.grid, p.shape, values, int64_t{kMapThreads} * width, kLinkBytes, p.k);
}
inline MapLaunch fuse_run_launch(FuseChannels& p, int width) {
  const bool of_p = p.x.data == p.y.data;
  const int64_t values = int64_t{of_p ? p.k : p.shape.channels} * p.shape.pixels;
  const int64_t bytes_a_row = p.index ? kLinkBytes : 0;
  return run_launch(p.grid, p.shape, values, int64_t{kMapThreads} * kMapSteps * width, bytes_a_row,
                    p.shape.channels);
}
inline MapLaunch fuse_column_launch(FuseChannels& p, int width) {
  const bool of_p = p.x.data == p.y.data && !p.index;
  return column_launch(p.grid, p.shape, of_p ? p.k : p.shape.channels, width, p.index ? kLinkBytes : 0);
}

inline MapLaunch gradient_run_launch(InputGradient& p, int width) {
  const int64_t values = int64_t{p.shape.channels} * p.shape.pixels;
  const int64_t bytes_a_row = sizeof(float) + kLinkBytes;
  return run_launch(p.grid, p.shape, values, int64_t{kMapThreads} * kMapSteps * width, bytes_a_row,
                    p.shape.channels);
}
inline MapLaunch gradient_column_launch(InputGradient& p, int width) {
  return column_launch(p.grid, p.shape, p.shape.channels, width, kLinkBytes);
}

// Planes a block: one round of pieces, or as near to it as a multiple of as many planes as begin at 16 bytes
// comes.
inline MapLaunch pool_planes_launch(AddReluPool& p, int width) {
  const int64_t hw = p.shape.pixels, round = int64_t{kMapThreads} * kMapSteps * width;
  int64_t step = 1;
  while (step * hw % width != 0) step *= 2;
  const int64_t planes = std::min<int64_t>(std::max<int64_t>(round / hw / step, 1) * step, p.shape.channels);
  p.grid.lanes = static_cast<int>(planes);
  p.grid.chunks = static_cast<int>(divided_up(p.shape.channels, planes));
  p.grid.parts = power_of_two_above(divided_up(hw, width), 32);  // threads to a plane's sum
  const int64_t floats = 2 * kMapThreads * kMapSteps + planes;
  return {p.shape.samples * p.grid.chunks, kMapThreads, 1, floats * int64_t{sizeof(float)}};
}

// A sample's pixels all meet in one sum, so blocks are made by narrow chunks of channels and, where there are
// clusters, by sharing the pixels out in one: 64 bytes, and as many blocks as give a thread kPixelsAThread,
// to 8 (where the device has so many beside each other). Without clusters chunks of 32 bytes, the smallest
// that memory moves.
inline MapLaunch pool_columns_launch(AddReluPool& p, int width, int max_cluster) {
  const bool has_clusters = max_cluster > 1;
  p.grid.lanes = power_of_two_above(divided_up(p.shape.channels, width), has_clusters ? 4 : 2);
  const int rows = kMapThreads / p.grid.lanes;
  p.grid.parts =
      std::min({8, max_cluster, power_of_two_below(p.shape.pixels / (int64_t{rows} * kPixelsAThread))});
  p.grid.chunks = static_cast<int>(divided_up(p.shape.channels, int64_t{p.grid.lanes} * width));
  const int64_t rows_of_sums = kMapThreads / 32 + 1, floats = rows_of_sums * p.grid.lanes * width;
  const int64_t blocks = p.shape.samples * p.grid.chunks * p.grid.parts;
  return {blocks, kMapThreads, p.grid.parts, floats * int64_t{sizeof(float)}};
}

}  // namespace mod_kernels
