// A float vector as wide as the ISA level the file is compiled for, in the compiler's own vector extension:
// the same source serves AVX-512, AVX2, SSE and NEON, and inf and NaN behave as IEEE 754 says.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace mod_kernels {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

// Architectural vector registers: what the register tiles below are cut to.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline VecI load(const int32_t* p) {
  VecI v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof v); }

// The first `count` lanes; the others are zero.
inline VecF load_first(const float* p, int64_t count) {
  VecF v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store_first(float* p, VecF v, int64_t count) { std::memcpy(p, &v, count * sizeof(float)); }

inline VecF splat(float s) { return s - VecF{}; }  // minus: -0.0 + 0.0 would lose the sign

inline VecF relu(VecF v) { return v < 0.0f ? VecF{} : v; }  // NaN < 0 is false: NaN stays, as in torch
inline float relu(float v) { return v < 0.0f ? 0.0f : v; }

// Keeps the last `count` lanes and zeroes the others, whatever they hold (a product would keep NaN).
inline VecF keep_last(VecF v, int64_t count) {
  static constexpr auto mask = [] {
    struct {
      int32_t at[2 * kLanes];
    } m{};
    for (int l = kLanes; l < 2 * kLanes; ++l) m.at[l] = -1;
    return m;
  }();
  return (VecF)((VecI)v & load(mask.at + count));
}

inline bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  typedef int64_t Wide __attribute__((vector_size(kLanes * 4)));
  const Wide wide = (Wide)mask;
  return (wide[0] | wide[1]) != 0;
#endif
}

template <int... kIndex>
inline VecF shuffle(VecF a, VecF b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, VecI{kIndex...});
#endif
}

// Lane l of the result is a[l] + a[l ^ S] where bit S of l is clear, and b[l] + b[l ^ S] where it is set: one
// step of a transposing reduction. Each lane sums the same pairs in the same order, whichever vector it is
// of, so a sum does not depend on which others are reduced beside it.
template <int S, std::size_t... L>
inline VecF combine(VecF a, VecF b, std::index_sequence<L...>) {
  return shuffle<int((L & S ? kLanes : 0) + L)...>(a, b) +
         shuffle<int((L & S ? kLanes : 0) + (L ^ S))...>(a, b);
}
template <int S>
inline VecF combine(VecF a, VecF b) {
  return combine<S>(a, b, std::make_index_sequence<kLanes>());
}

// v[i] becomes the vectors of one step less, until v[0]'s lane l is the sum of the lanes of v[l].
template <int S = kLanes / 2>
inline VecF reduce_lanes(VecF (&v)[kLanes]) {
  if constexpr (S == 0) {
    return v[0];
  } else {
    for (int i = 0; i < S; ++i) v[i] = combine<S>(v[i], v[i + S]);
    return reduce_lanes<S / 2>(v);
  }
}

// Lanes 0 to 3 of the result are the sums of the lanes of a, b, c, d.
template <int S = 4>
inline VecF fold_above(VecF v) {
  if constexpr (S < kLanes) {
    return fold_above<S * 2>(combine<S>(v, v));
  } else {
    return v;
  }
}
inline VecF reduce_four(VecF a, VecF b, VecF c, VecF d) {
  return fold_above(combine<2>(combine<1>(a, b), combine<1>(c, d)));
}

}  // namespace mod_kernels
