// The ops on whole maps: gather_channels, fuse_channels, add_relu_pool, input_gradient.
#include "cases.h"
#include "cuda/map_ops.h"

namespace cases {
namespace {

using namespace mod_kernels;

struct OnMachine {
  const Case& one;

  template <class P>
  const char* operator()(const MapLaunch& launch, void (*kernel)(P), const P& parameters) const {
    cuda_host::launch({.grid = static_cast<unsigned>(launch.blocks),
                       .threads = launch.threads,
                       .cluster = launch.cluster,
                       .shared_bytes = static_cast<size_t>(launch.shared_bytes),
                       .order = one.order,
                       .seed = one.seed},
                      kernel, parameters);
    return nullptr;
  }
};

Layout layout_of(const Case& one, const std::string& prefix = "") {
  return one.number(prefix + "channels_last") != 0 ? Layout::kChannelsLast : Layout::kNchw;
}

MapShape shape_of(const Case& one) {
  return {one.number("n"), static_cast<int>(one.number("c")), static_cast<int>(one.number("pixels"))};
}

InputMap input(const Case& one, const std::string& name) {
  if (one.tensor(name) == nullptr) return {};
  return {one.data(name), one.number(name + "_stride_n")};
}
OutputMap output(const Case& one, const std::string& name) {
  return {one.data(name), one.number(name + "_stride_n")};
}
NarrowMap narrow(const Case& one, const std::string& name, int64_t k) {
  if (one.tensor(name) == nullptr) return {};
  return narrow_map(one.data(name), one.number(name + "_stride_n"), k, one.number("pixels"),
                    layout_of(one, name + "_"));
}

std::string gather(const Case& one) {
  const GatherChannels p{input(one, "x"),
                         output(one, "out"),
                         one.data<const int64_t>("index"),
                         shape_of(one),
                         static_cast<int>(one.number("k")),
                         {}};
  return for_dtype(one, [&]<class T>() { return gather_channels<T>(p, layout_of(one), OnMachine{one}); });
}

// y is x where the case has no other.
std::string fuse(const Case& one) {
  const int64_t k = one.number("k");
  const FuseChannels p{input(one, "x"),
                       one.tensor("y") ? output(one, "y") : output(one, "x"),
                       narrow(one, "z", k),
                       one.data<const float>("scores"),
                       one.data<const int64_t>("index"),
                       shape_of(one),
                       static_cast<int>(k),
                       static_cast<int>(one.number("first")),
                       {}};
  return for_dtype(one, [&]<class T>() { return fuse_channels<T>(p, layout_of(one), OnMachine{one}); });
}

std::string pool(const Case& one) {
  const AddReluPool p{input(one, "a"),
                      input(one, "b"),
                      one.tensor("y") ? output(one, "y") : output(one, "a"),
                      one.data<float>("pooled"),
                      shape_of(one),
                      one.number("relu") != 0,
                      {}};
  const int max_cluster = static_cast<int>(one.number("max_cluster"));
  return for_dtype(
      one, [&]<class T>() { return add_relu_pool<T>(p, layout_of(one), max_cluster, OnMachine{one}); });
}

std::string gradient(const Case& one) {
  const int64_t k = one.number("k"), overwritten_k = one.number("overwritten_k");
  const InputGradient p{input(one, "dy"),
                        input(one, "y"),
                        output(one, "dx"),
                        narrow(one, "dgathered", k),
                        narrow(one, "overwritten", overwritten_k),
                        one.data<const float>("dpooled"),
                        one.data<const int64_t>("index"),
                        shape_of(one),
                        static_cast<int>(k),
                        static_cast<int>(overwritten_k),
                        static_cast<int>(one.number("first")),
                        one.number("original") != 0,
                        {}};
  return for_dtype(one, [&]<class T>() { return input_gradient<T>(p, layout_of(one), OnMachine{one}); });
}

const Known kGather("gather_channels", gather), kFuse("fuse_channels", fuse), kPool("add_relu_pool", pool),
    kGradient("input_gradient", gradient);

}  // namespace
}  // namespace cases
