// Numbers on the device: the conversions of common/dtype.h, 16 bytes of values at a time, sums over a warp,
// and the functions between layers.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../common/dtype.h"
#include "device.h"

namespace mod_kernels {

inline constexpr int kWarp = 32;

// Values of T in the widest load.
template <class T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ uint32_t word(const uint4& bits, int i) {
  return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

// The bits of a float, and back.
__device__ __forceinline__ uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

// Value i of 16 bytes of T. i is known to the compiler wherever this is used: loops over it are unrolled.
template <class T>
__device__ __forceinline__ float lane(const uint4& bits, int i) {
  if constexpr (std::is_same_v<T, float>) {
    return from_bits(word(bits, i));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t pair = word(bits, i / 2);
    return from_bits(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
  } else {
    return widen(T{static_cast<uint16_t>(word(bits, i / 2) >> (i % 2 * 16))});
  }
}

// 16 bytes of T from as many values as they hold.
template <class T>
__device__ __forceinline__ uint4 packed(const float (&values)[kLanes<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = bits_of(values[i]);
    } else {
      words[i] = narrow<T>(values[2 * i]).bits | uint32_t{narrow<T>(values[2 * i + 1]).bits} << 16;
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }

// Of numbers that are not negative, which the compiler can't know: half of a signed division is for signs.
__device__ __forceinline__ int quotient(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}
__device__ __forceinline__ int remainder_of(int a, int b) { return a - quotient(a, b) * b; }

// The sum over a warp, in every lane, always added in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

// fmaxf would drop a NaN.
__device__ __forceinline__ float relu(float value) { return value < 0.0f ? 0.0f : value; }
__device__ __forceinline__ float relu6(float value) { return value > 6.0f ? 6.0f : relu(value); }
// The exact one, value * Phi(value).
__device__ __forceinline__ float gelu(float value) {
  return value * (0.5f + 0.5f * erff(value * 0.70710678f));
}
__device__ __forceinline__ float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }

}  // namespace mod_kernels
