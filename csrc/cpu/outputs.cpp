#include "outputs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>

#include "../common/tensor_dtype.h"

namespace mod_kernels {
namespace {

Output dispatched(AtenTensorHandle like, std::span<const int64_t> size, int32_t dtype) {
  int32_t layout = aoti_torch_layout_strided(), device = aoti_torch_device_type_cpu();
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like, size.data(), static_cast<int64_t>(size.size()),
                                                   &dtype, &layout, &device, 0, nullptr, &result));
  return Output(result);
}

Output dispatched_channels_last(std::span<const int64_t> size, torch::headeronly::ScalarType dtype) {
  const auto tensor =
      torch::stable::empty({size.data(), size.size()}, dtype, torch::headeronly::Layout::Strided,
                           std::nullopt, std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &result));
  return Output(result);
}

Output undispatched(int32_t dtype, std::span<const int64_t> size, std::span<const int64_t> stride) {
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(),
                                                  stride.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                                  &result));
  return Output(result);
}

template <class E>
bool all_nan(const void* data, int64_t count) {
  const E* values = static_cast<const E*>(data);
  return std::all_of(values, values + count, [](E value) { return widen(value) != widen(value); });
}

// torch's rule: a row without columns is as far from the next as one with a column.
std::array<int64_t, 2> row_major(int64_t columns) { return {std::max<int64_t>(columns, 1), 1}; }

}  // namespace

void* write(const Output& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &data));
  return data;
}

template <class T>
template <class E>
Output Outputs<T>::make(std::span<const int64_t> size, std::span<const int64_t> stride, bool channels_last) {
  int64_t count = 1;
  for (int64_t extent : size) count *= extent;
  if (first_count_ < 0) {
    Output tensor = channels_last ? dispatched_channels_last(size, scalar_type<E>)
                                  : dispatched(like_, size, dtype_code<E>());
    first_ = write(tensor);
    first_count_ = count;
    filled_ = all_nan<E>;
    return tensor;
  }
  Output tensor = undispatched(dtype_code<E>(), size, stride);
  if (filled()) {
    const E nan = narrow<E>(std::numeric_limits<Accumulate<E>>::quiet_NaN());
    std::fill_n(static_cast<E*>(write(tensor)), count, nan);
  }
  return tensor;
}

template <class T>
Output Outputs<T>::matrix(int64_t rows, int64_t columns) {
  return make<Accumulate<T>>(std::array{rows, columns}, row_major(columns), false);
}

template <class T>
Output Outputs<T>::empty() {
  return undispatched(dtype_code<Accumulate<T>>(), std::array<int64_t, 1>{0}, std::array<int64_t, 1>{1});
}

template <class T>
Output Outputs<T>::no_map() {
  return undispatched(dtype_code<T>(), std::array<int64_t, 1>{0}, std::array<int64_t, 1>{1});
}

template <class T>
Output Outputs<T>::vector(int64_t count) {
  return make<Accumulate<T>>(std::array{count}, std::array<int64_t, 1>{1}, false);
}

template <class T>
Output Outputs<T>::indices(int64_t rows, int64_t columns) {
  Output tensor = undispatched(aoti_torch_dtype_int64(), std::array{rows, columns}, row_major(columns));
  if (filled()) {
    std::fill_n(static_cast<int64_t*>(write(tensor)), rows * columns, std::numeric_limits<int64_t>::max());
  }
  return tensor;
}

template <class T>
Output Outputs<T>::map(const FeatureMap<T>& x, int64_t channels) {
  const bool last = x.channels_last();
  const int64_t to_next = last ? 1 : x.hw(), to_right = last ? channels : 1;
  return make<T>(std::array{x.n, channels, x.h, x.w},
                 std::array{channels * x.hw(), to_next, x.w * to_right, to_right}, last);
}

template class Outputs<Half>;
template class Outputs<BFloat16>;
template class Outputs<float>;
template class Outputs<double>;

}  // namespace mod_kernels
