// From an op's arguments to the kernel that serves them: the same for a GPU's launches and a test's.
//
// Run is called as run(launch, kernel,
// parameters) and gives an error's words, or null.
#pragma once

#include "add_relu_pool.cuh"
#include "fuse.cuh"
#include "gather.cuh"
#include "input_gradient.cuh"
#include "map_plan.h"

namespace mod_kernels {

// Places inside a plane and inside a run are 32-bit numbers.
inline const char* refused(const MapShape& shape) {
  constexpr int kMost = 1 << 30;
  return shape.channels > kMost || shape.pixels > kMost
             ? "a map must have at most 2^30 channels and 2^30 pixels"
             : nullptr;
}
inline bool empty(const MapShape& shape) {
  return shape.samples == 0 || shape.channels == 0 || shape.pixels == 0;
}

// Half stands for both types of 16 bits: values are only moved.
template <class T, class Run>
const char* gather_channels(GatherChannels p, Layout layout, const Run& run) {
  using Bits = std::conditional_t<sizeof(T) == 2, Half, T>;
  if (empty(p.shape) || p.k == 0) return nullptr;
  if (const char* why = refused(p.shape)) return why;
  const MapLaunch launch = gather_launch(p, kLanes<T>);
  if (layout == Layout::kChannelsLast) return run(launch, gather_pixels_kernel<Bits>, p);
  return run(launch, gather_planes_kernel<Bits>, p);
}

template <class T, class Run>
const char* fuse_channels(FuseChannels p, Layout layout, const Run& run) {
  if (empty(p.shape) || p.k == 0) return nullptr;
  if (const char* why = refused(p.shape)) return why;
  if (layout == Layout::kChannelsLast) {
    const MapLaunch launch = fuse_column_launch(p, kLanes<T>);
    return p.index ? run(launch, fuse_column_kernel<T, true>, p)
                   : run(launch, fuse_column_kernel<T, false>, p);
  }
  if (p.index && p.x.data == p.y.data) {
    const MapLaunch launch = fuse_planes_launch(p, kLanes<T>);
    return run(launch, fuse_planes_kernel<T>, p);
  }
  const MapLaunch launch = fuse_run_launch(p, kLanes<T>);
  return p.index ? run(launch, fuse_index_kernel<T>, p) : run(launch, fuse_range_kernel<T>, p);
}

template <class T, class Run>
const char* add_relu_pool(AddReluPool p, Layout layout, int max_cluster, const Run& run) {
  if (empty(p.shape)) return nullptr;
  if (const char* why = refused(p.shape)) return why;
  if (layout == Layout::kChannelsLast) {
    const MapLaunch launch = pool_columns_launch(p, kLanes<T>, max_cluster);
    return run(launch, add_relu_pool_columns_kernel<T>, p);
  }
  const MapLaunch launch = pool_planes_launch(p, p.shape.pixels < kLanes<T> ? 1 : kLanes<T>);
  return run(launch, add_relu_pool_planes_kernel<T>, p);
}

template <class T, class Run>
const char* input_gradient(InputGradient p, Layout layout, const Run& run) {
  if (empty(p.shape)) return nullptr;
  if (const char* why = refused(p.shape)) return why;
  if (layout == Layout::kChannelsLast) {
    const MapLaunch launch = gradient_column_launch(p, kLanes<T>);
    return run(launch, input_gradient_column_kernel<T>, p);
  }
  const MapLaunch launch = gradient_run_launch(p, kLanes<T>);
  return run(launch, input_gradient_run_kernel<T>, p);
}

}  // namespace mod_kernels
