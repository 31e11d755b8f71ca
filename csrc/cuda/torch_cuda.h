// Between an op's tensors and a launch: the device and stream it runs on, fresh tensors, what went wrong.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>

#include "../common/arguments.h"

namespace mod_kernels {

// The device of an op's tensors is the current one for as long as this lives.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }  // torch's current one there

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(const char* error) {
  if (error != nullptr) require(false, error);
}

// Outputs and scratch come from torch's allocator, through the dispatcher: fill_uninitialized_memory of
// torch.utils.deterministic has its say there, and what is allocated while a graph is captured stays the
// graph's.
template <std::size_t Dimensions>
Tensor fresh(const Tensor& like, const std::array<int64_t, Dimensions>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}
inline Tensor nothing(const Tensor& like) { return fresh<1>(like, {0}, ScalarType::Float); }

// A map of T, dense in x's layout.
template <class T>
Tensor fresh_map(const Tensor& like, const FeatureMap<T>& x, int64_t channels) {
  const std::array<int64_t, 4> size{x.n, channels, x.h, x.w};
  if (!x.channels_last()) return fresh(like, size, scalar_type<T>);
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, like.get_device_index());
  return torch::stable::empty({size.data(), size.size()}, scalar_type<T>, std::nullopt, device, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

// An index is data, which nobody may wait for: kernels leave out what is no channel.
inline const int64_t* index_of(const Tensor& index) {
  require(index.scalar_type() == ScalarType::Long, "index must be int64");
  require(index.is_contiguous(), "index must be contiguous");
  return static_cast<const int64_t*>(index.const_data_ptr());
}

inline int32_t as_int32(int64_t size, const char* name) {
  require(size <= INT32_MAX, "the CUDA kernels take fewer than 2^31 ", name, ", got ", size);
  return static_cast<int32_t>(size);
}

}  // namespace mod_kernels
