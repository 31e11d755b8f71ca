#include "outputs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

namespace mod_kernels {
namespace {

void* data_of(const Output& tensor) {
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &data));
  return data;
}

Output dispatched(AtenTensorHandle like, std::span<const int64_t> size) {
  int32_t dtype = aoti_torch_dtype_float32(), layout = aoti_torch_layout_strided();
  int32_t device = aoti_torch_device_type_cpu();
  AtenTensorHandle result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like, size.data(), static_cast<int64_t>(size.size()),
                                                   &dtype, &layout, &device, 0, nullptr, &result));
  return Output(result);
}

Output dispatched_channels_last(std::span<const int64_t> size) {
  const auto tensor = torch::stable::empty({size.data(), size.size()}, torch::headeronly::ScalarType::Float,
                                           torch::headeronly::Layout::Strided, std::nullopt, std::nullopt,
                                           torch::headeronly::MemoryFormat::ChannelsLast);
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

// torch's rule: a row without columns is as far from the next as one with a column.
std::array<int64_t, 2> row_major(int64_t columns) { return {std::max<int64_t>(columns, 1), 1}; }

}  // namespace

float* write(const Output& tensor) { return static_cast<float*>(data_of(tensor)); }
int64_t* write_index(const Output& tensor) { return static_cast<int64_t*>(data_of(tensor)); }

bool Outputs::filled() const {
  return std::all_of(first_, first_ + first_count_, [](float value) { return std::isnan(value); });
}

Output Outputs::floats(std::span<const int64_t> size, std::span<const int64_t> stride, bool channels_last) {
  int64_t count = 1;
  for (int64_t extent : size) count *= extent;
  if (first_count_ < 0) {
    Output tensor = channels_last ? dispatched_channels_last(size) : dispatched(like_, size);
    first_ = write(tensor);
    first_count_ = count;
    return tensor;
  }
  Output tensor = undispatched(aoti_torch_dtype_float32(), size, stride);
  if (filled()) std::fill_n(write(tensor), count, std::numeric_limits<float>::quiet_NaN());
  return tensor;
}

Output Outputs::floats(int64_t rows, int64_t columns) {
  return floats(std::array{rows, columns}, row_major(columns), false);
}

Output Outputs::empty() { return floats(std::array<int64_t, 1>{0}, std::array<int64_t, 1>{1}, false); }

Output Outputs::indices(int64_t rows, int64_t columns) {
  Output tensor = undispatched(aoti_torch_dtype_int64(), std::array{rows, columns}, row_major(columns));
  if (filled()) std::fill_n(write_index(tensor), rows * columns, std::numeric_limits<int64_t>::max());
  return tensor;
}

Output Outputs::map(const FeatureMap& x, int64_t channels) {
  const bool last = x.channels_last();
  const int64_t to_next = last ? 1 : x.hw(), to_right = last ? channels : 1;
  return floats(std::array{x.n, channels, x.h, x.w},
                std::array{channels * x.hw(), to_next, x.w * to_right, to_right}, last);
}

}  // namespace mod_kernels
