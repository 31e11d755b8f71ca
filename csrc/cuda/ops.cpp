// The raw ops on whole maps of mod_kernels_cuda (schemas: mod_kernels/_library.py): arguments unpacked,
// outputs allocated, one kernel launched. Shapes, dtypes and k have been checked in Python, gradients' are
// checked here.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../common/position.h"
#include "launch_block.h"
#include "launch_maps.h"
#include "torch_cuda.h"

namespace mod_kernels {
namespace {

template <class T>
InputMap in(const FeatureMap<T>& map) {
  return {map.data, map.stride_n};
}
template <class T>
OutputMap out(const FeatureMap<T>& map) {
  return {map.data, map.stride_n};
}
// Of k channels, in a layout of its own.
template <class T>
NarrowMap narrow(const FeatureMap<T>& map) {
  return narrow_map(map.data, map.stride_n, map.c, map.hw(), map.layout);
}
template <class T>
MapShape shape_of(const FeatureMap<T>& map) {
  return {map.n, as_int32(map.c, "channels"), as_int32(map.hw(), "pixels")};
}

// The first of the k channels P that neighbour each other.
int32_t first_of(Position position, int64_t k, int64_t channels) {
  return static_cast<int32_t>(position == Position::kLast ? channels - k : 0);
}

Tensor gather_channels(const Tensor& x, const Tensor& index) {
  return for_dtype(x, [&]<class T>() {
    const OnDeviceOf device(x);
    const FeatureMap<T> map = input_map<T>(x);
    GatherChannels p;
    p.k = as_int32(index.size(1), "gathered channels");
    Tensor gathered = fresh_map(x, map, p.k);
    p.x = in(map);
    p.out = out(output_map<T>(gathered));
    p.index = index_of(index);
    p.shape = shape_of(map);
    check_launch(launch_gather_channels(p, dtype_of(x), map.layout, device.stream()));
    return gathered;
  });
}

// Into y, which is x itself in place.
template <class T>
void fuse_into(const FeatureMap<T>& y, const Tensor& x, const Tensor& z, const Tensor& scores,
               const OptionalTensor& index, const std::string& position, const OnDeviceOf& device) {
  const FeatureMap<T> from = input_map<T>(x), added = input_map<T>(z);
  const Position where = position_of(position);
  require(scores.scalar_type() == ScalarType::Float && scores.is_contiguous(),
          "scores must be float32 and contiguous");
  FuseChannels p;
  p.x = in(from);
  p.y = out(y);
  p.z = narrow(added);
  p.scores = read<float>(scores);
  p.shape = shape_of(from);
  p.k = static_cast<int32_t>(added.c);
  p.first = first_of(where, added.c, from.c);
  if (where == Position::kOriginal) {
    require(index.has_value(), "position 'original' needs index");
    p.index = index_of(*index);
  }
  check_launch(launch_fuse_channels(p, dtype_of(x), from.layout, device.stream()));
}

Tensor fuse_channels(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                     const std::string& position) {
  return for_dtype(x, [&]<class T>() {
    const OnDeviceOf device(x);
    const FeatureMap<T> map = input_map<T>(x);
    Tensor y = fresh_map(x, map, map.c);
    fuse_into(output_map<T>(y), x, z, scores, index, position, device);
    return y;
  });
}

void fuse_channels_(const Tensor& x, const Tensor& z, const Tensor& scores, const OptionalTensor& index,
                    const std::string& position) {
  for_dtype(x, [&]<class T>() {
    const OnDeviceOf device(x);
    fuse_into(output_map<T>(x), x, z, scores, index, position, device);
  });
}

// y = relu(a + b), which may be a; returns its means.
template <class T>
Tensor pool_into(const FeatureMap<T>& y, const Tensor& a, const OptionalTensor& b, bool relu,
                 const OnDeviceOf& device) {
  const FeatureMap<T> first = input_map<T>(a);
  Tensor pooled = fresh<2>(a, {first.n, first.c}, ScalarType::Float);
  AddReluPool p;
  p.a = in(first);
  if (b) {
    const FeatureMap<T> second = input_map<T>(*b);
    require(second.layout == first.layout, "b must have a's layout");
    p.b = in(second);
  }
  p.y = out(y);
  p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  p.shape = shape_of(first);
  p.relu = relu;
  const int max_cluster = current_architecture().max_cluster;
  check_launch(launch_add_relu_pool(p, dtype_of(a), first.layout, max_cluster, device.stream()));
  return pooled;
}

std::tuple<Tensor, Tensor> add_relu_pool(const Tensor& a, const OptionalTensor& b, bool relu) {
  return for_dtype(a, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    const OnDeviceOf device(a);
    const FeatureMap<T> map = input_map<T>(a);
    Tensor y = fresh_map(a, map, map.c);
    Tensor pooled = pool_into(output_map<T>(y), a, b, relu, device);
    return {y, pooled};
  });
}

Tensor add_relu_pool_(const Tensor& a, const OptionalTensor& b, bool relu) {
  return for_dtype(a, [&]<class T>() {
    const OnDeviceOf device(a);
    return pool_into(output_map<T>(a), a, b, relu, device);
  });
}

Tensor input_gradient(const Tensor& dy, const OptionalTensor& dpooled, const OptionalTensor& dgathered,
                      const OptionalTensor& index, const OptionalTensor& y, const OptionalTensor& overwritten,
                      const std::string& position) {
  return for_dtype(dy, [&]<class T>() {
    const OnDeviceOf device(dy);
    const FeatureMap<T> map = gradient_map<T>(dy);
    const Position where = position_of(position);
    InputGradient p;
    p.dy = in(map);
    p.shape = shape_of(map);
    if (dpooled) p.dpooled = matrix<float>(*dpooled, "dpooled", map.n, map.c);
    if (dgathered) {
      const FeatureMap<T> gathered = narrow_map(*dgathered, "dgathered", map);
      p.dgathered = narrow(gathered);
      p.k = static_cast<int32_t>(gathered.c);
    }
    if (y) {
      const FeatureMap<T> output = map_beside(*y, "y", map);
      require(output.c == map.c, "y must have dy's channels");
      p.y = in(output);
    }
    if (overwritten) {
      require(y.has_value(), "overwritten needs y");
      const FeatureMap<T> before = narrow_map(*overwritten, "overwritten", map);
      p.overwritten = narrow(before);
      p.overwritten_k = static_cast<int32_t>(before.c);
      p.first = first_of(where, before.c, map.c);
      p.original = where == Position::kOriginal;
    }
    if (dgathered || p.original) {
      require(index.has_value(), dgathered ? "dgathered needs index" : "position 'original' needs index");
      require(!dgathered || !p.original || p.overwritten_k == p.k,
              "overwritten must have as many channels as dgathered");
      if (!dgathered) p.k = p.overwritten_k;
      check_matrix(*index, "index", map.n, p.k);
      p.index = index_of(*index);
    }
    Tensor dx = fresh_map(dy, map, map.c);
    p.dx = out(output_map<T>(dx));
    check_launch(launch_input_gradient(p, dtype_of(dy), map.layout, device.stream()));
    return dx;
  });
}

}  // namespace
}  // namespace mod_kernels

STABLE_TORCH_LIBRARY_IMPL(mod_kernels_cuda, CUDA, m) {
  m.impl("gather_channels", TORCH_BOX(&mod_kernels::gather_channels));
  m.impl("fuse_channels", TORCH_BOX(&mod_kernels::fuse_channels));
  m.impl("fuse_channels_", TORCH_BOX(&mod_kernels::fuse_channels_));
  m.impl("add_relu_pool", TORCH_BOX(&mod_kernels::add_relu_pool));
  m.impl("add_relu_pool_", TORCH_BOX(&mod_kernels::add_relu_pool_));
  m.impl("input_gradient", TORCH_BOX(&mod_kernels::input_gradient));
}

// What the library was built for: for mod_kernels/backends/cuda.py, which says so where a GPU is none of
// these.
extern "C" __attribute__((visibility("default"))) const char* mod_kernels_cuda_architectures() {
  return MOD_KERNELS_CUDA_ARCHITECTURES;
}
