// The dtypes a feature map may have, and what each is computed in.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// CUDA kernels call the conversions too. There the GPU's own instructions do them, written here as assembly:
// the headers that name them would come into every file.
#if defined(__CUDACC__)
#define MOD_KERNELS_HOST_DEVICE __host__ __device__
#else
#define MOD_KERNELS_HOST_DEVICE
#endif

namespace mod_kernels {

// 16-bit storage formats: converted on their way into a register, never computed in.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType { kHalf, kBFloat16, kFloat, kDouble };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// What sums, logits, scores and convolutions are kept in: float32, float64 for float64.
template <class T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

MOD_KERNELS_HOST_DEVICE inline float widen(BFloat16 value) {
  return __builtin_bit_cast(float, uint32_t{value.bits} << 16);
}

#if defined(__CUDA_ARCH__)
MOD_KERNELS_HOST_DEVICE inline float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
#elif defined(__F16C__)
MOD_KERNELS_HOST_DEVICE inline float widen(Half value) { return _cvtsh_ss(value.bits); }
#else
// Subnormals by a multiplication that is exact; infinity and NaN by their exponent.
MOD_KERNELS_HOST_DEVICE inline float widen(Half value) {
  const uint32_t magnitude = uint32_t{value.bits} << 13 & 0x0fffe000u;
  const uint32_t sign = uint32_t{value.bits} << 16 & 0x80000000u;
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  if (magnitude >= 0x0f800000u) bits |= 0x7f800000u;
  return std::bit_cast<float>(bits | sign);
}
#endif
MOD_KERNELS_HOST_DEVICE inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

// Rounded to nearest, ties to even. A NaN becomes the dtype's quiet NaN, as in torch.
template <class T>
MOD_KERNELS_HOST_DEVICE inline T narrow(Accumulate<T> value) {
#if defined(__CUDA_ARCH__)
  T narrowed;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(value));
  } else if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrowed.bits) : "f"(value));
  } else {
    narrowed = value;
  }
  return narrowed;
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (value != value) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(value == value ? _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT) : 0x7e00)};
#else
    const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits & 0x80000000u;
    const uint32_t magnitude = bits ^ sign;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000u) {  // from 65520 on
      half = 0x7c00;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to a multiple of 2^-24
      half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<uint16_t>(half | sign >> 16)};
#endif
  } else {
    return value;
  }
#endif
}

}  // namespace mod_kernels

// Explicit instantiations, one for each dtype.
#define MOD_KERNELS_FOR_EACH_DTYPE(INSTANTIATE) \
  INSTANTIATE(Half)                             \
  INSTANTIATE(BFloat16)                         \
  INSTANTIATE(float)                            \
  INSTANTIATE(double)
