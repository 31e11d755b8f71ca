// torch's names for the dtypes of dtype.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "dtype.h"

namespace mod_kernels {

using torch::headeronly::ScalarType;

template <class T>
inline constexpr ScalarType scalar_type = std::is_same_v<T, Half>       ? ScalarType::Half
                                          : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                                          : std::is_same_v<T, float>    ? ScalarType::Float
                                                                        : ScalarType::Double;

template <class T>
inline int32_t dtype_code() {
  if constexpr (std::is_same_v<T, Half>) return aoti_torch_dtype_float16();
  if constexpr (std::is_same_v<T, BFloat16>) return aoti_torch_dtype_bfloat16();
  if constexpr (std::is_same_v<T, float>) return aoti_torch_dtype_float32();
  return aoti_torch_dtype_float64();
}

}  // namespace mod_kernels
