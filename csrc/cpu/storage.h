// Between memory and the vectors of vec.h: elements of a storage type T in, a vector of Accumulate<T> out.
#pragma once

#include "../common/dtype.h"
#include "vec.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace mod_kernels {

// As many elements of T as a Vec<A> has lanes, as they lie in memory: what is moved without being computed
// with stays bit for bit what it was, which widening and narrowing a signalling NaN would not leave it.
template <class A>
struct HalfWide {
  typedef uint16_t type __attribute__((vector_size(2 * kLanes<A>)));
};
template <class T>
using Raw = std::conditional_t<sizeof(T) == 2, typename HalfWide<Accumulate<T>>::type, Vec<Accumulate<T>>>;

template <class T>
inline Raw<T> load_raw(const T* p) {
  return load_vector<Raw<T>>(p);
}
template <class T>
inline void store_raw(T* p, Raw<T> v) {
  store_vector(p, v);
}

// The first `count` elements; the others are zero.
template <class T>
inline Raw<T> load_raw_first(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Raw<T>)_mm512_maskz_loadu_epi32((1u << count) - 1, p);
  if constexpr (sizeof(T) == 8) return (Raw<T>)_mm512_maskz_loadu_epi64((1u << count) - 1, p);
  if constexpr (sizeof(T) == 2) return (Raw<T>)_mm256_maskz_loadu_epi16((1u << count) - 1, p);
#elif defined(__AVX2__)
  const auto mask = (__m256i)~last_lanes<Accumulate<T>>(kLanes<Accumulate<T>> - count);
  if constexpr (sizeof(T) == 4) return (Raw<T>)_mm256_maskload_epi32((const int*)p, mask);
  if constexpr (sizeof(T) == 8) return (Raw<T>)_mm256_maskload_epi64((const long long*)p, mask);
#endif
  Raw<T> v{};
  std::memcpy(&v, p, count * sizeof(T));
  return v;
}
template <class T>
inline void store_raw_first(T* p, Raw<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, (1u << count) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, (1u << count) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)v);
#elif defined(__AVX2__)
  const auto mask = (__m256i)~last_lanes<Accumulate<T>>(kLanes<Accumulate<T>> - count);
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_epi32((int*)p, mask, (__m256i)v);
  if constexpr (sizeof(T) == 8) return _mm256_maskstore_epi64((long long*)p, mask, (__m256i)v);
#endif
  std::memcpy(p, &v, count * sizeof(T));
}

// By name where GCC's own conversion takes several instructions. (Masked, with all lanes: GCC 12 warns of its
// own header where the unmasked ones are used; the code is the same.)
template <class T>
inline Vec<Accumulate<T>> widen_raw(Raw<T> raw) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512F__)
    return (Vec<float>)((Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)raw) << 16);
#elif defined(__AVX2__)
    return (Vec<float>)((Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)raw) << 16);
#else
    return (Vec<float>)(__builtin_convertvector(raw, Vec<uint32_t>) << 16);
#endif
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)raw);
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)raw);
#elif defined(__aarch64__)
    return (Vec<float>)vcvt_f32_f16((float16x4_t)raw);
#else
    const Vec<uint32_t> bits = __builtin_convertvector(raw, Vec<uint32_t>);
    const Vec<uint32_t> magnitude = bits << 13 & 0x0fffe000u;
    Vec<uint32_t> wide = (Vec<uint32_t>)((Vec<float>)magnitude * 0x1p112f);
    wide |= magnitude >= 0x0f800000u ? Vec<uint32_t>{} + 0x7f800000u : Vec<uint32_t>{};
    return (Vec<float>)(wide | (bits << 16 & 0x80000000u));
#endif
  } else {
    return raw;
  }
}

template <class T>
inline Raw<T> narrow_raw(Vec<Accumulate<T>> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Vec<uint32_t> bits = (Vec<uint32_t>)v;
    const Vec<uint32_t> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(v != v ? Vec<uint32_t>{} + 0x7fc0u : rounded, Raw<T>);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    return (Raw<T>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Raw<T>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (Raw<T>)vcvt_f16_f32((float32x4_t)v);
#else
    Raw<T> raw;
    for (int l = 0; l < kLanes<float>; ++l) raw[l] = narrow<Half>(v[l]).bits;
    return raw;
#endif
  } else {
    return v;
  }
}

template <class T>
inline Vec<Accumulate<T>> load(const T* p) {
  return widen_raw<T>(load_raw(p));
}
template <class T>
inline Vec<Accumulate<T>> load_first(const T* p, int64_t count) {
  return widen_raw<T>(load_raw_first(p, count));
}
template <class T>
inline void store(T* p, Vec<Accumulate<T>> v) {
  store_raw(p, narrow_raw<T>(v));
}
template <class T>
inline void store_first(T* p, Vec<Accumulate<T>> v, int64_t count) {
  store_raw_first(p, narrow_raw<T>(v), count);
}

// A Vec<A> from weights of another type: float weights beside a double map.
template <class A, class W>
inline Vec<A> load_as(const W* p) {
  if constexpr (std::is_same_v<A, double> && std::is_same_v<W, float>) {
    typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
    return __builtin_convertvector(load_vector<Narrow>(p), Vec<double>);
  } else {
    return load(p);
  }
}

}  // namespace mod_kernels
