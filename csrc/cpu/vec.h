// Vectors of float or double as wide as the ISA level the file is compiled for, in the compiler's own vector
// extension: the same source serves AVX-512, AVX2, SSE and NEON, and inf and NaN behave as IEEE 754 says.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace mod_kernels {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// Architectural vector registers: what the register tiles below are cut to.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif

template <class A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
// The signed integer as wide as A, and what comparing two vectors gives: all bits of a lane, or none.
template <class A>
using IntOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A>
using Mask = Vec<IntOf<A>>;

template <class V, class E>
inline V load_vector(const E* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class E>
inline void store_vector(E* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
inline Vec<A> splat(A s) {
  return s - Vec<A>{};  // minus: -0.0 + 0.0 would lose the sign
}

// v in a register. GCC else loads again for each of its uses, as an operand in memory.
template <class A>
inline Vec<A> held(Vec<A> v) {
#if defined(__aarch64__)
  asm("" : "+w"(v));
#elif defined(__SSE__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <class A>
inline Vec<A> relu(Vec<A> v) {
  return v < 0 ? Vec<A>{} : v;  // NaN < 0 is false: NaN stays, as in torch
}

// The mask of the last `count` lanes.
template <class A>
inline Mask<A> last_lanes(int64_t count) {
  static constexpr auto table = [] {
    struct {
      IntOf<A> at[2 * kLanes<A>];
    } m{};
    for (int l = kLanes<A>; l < 2 * kLanes<A>; ++l) m.at[l] = -1;
    return m;
  }();
  return load_vector<Mask<A>>(table.at + count);
}

// Keeps the last `count` lanes and zeroes the others, whatever they hold (a product would keep NaN).
template <class A>
inline Vec<A> keep_last(Vec<A> v, int64_t count) {
  return (Vec<A>)((Mask<A>)v & last_lanes<A>(count));
}

template <class M>
inline bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const auto wide = (Vec<int64_t>)mask;
  return (wide[0] | wide[1]) != 0;
#endif
}

template <class A, int... kIndex>
inline Vec<A> shuffle(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, Mask<A>{kIndex...});
#endif
}

// Lane l of the result is a[l] + a[l ^ S] where bit S of l is clear, and b[l] + b[l ^ S] where it is set: one
// step of a transposing reduction. Each lane sums the same pairs in the same order, whichever vector it is
// of, so a sum does not depend on which others are reduced beside it.
template <class A, int S, std::size_t... L>
inline Vec<A> combine(Vec<A> a, Vec<A> b, std::index_sequence<L...>) {
  return shuffle<A, int((L & S ? kLanes<A> : 0) + L)...>(a, b) +
         shuffle<A, int((L & S ? kLanes<A> : 0) + (L ^ S))...>(a, b);
}
template <class A, int S>
inline Vec<A> combine(Vec<A> a, Vec<A> b) {
  return combine<A, S>(a, b, std::make_index_sequence<kLanes<A>>());
}

// The sums of the lanes of each of kCount vectors (a power of two, at most the number of lanes): that of v[i]
// is in lane i * lanes / kCount of the result. Whatever kCount, pairs are summed in the same order.
template <class A, int S = kLanes<A> / 2, std::size_t kCount>
inline Vec<A> reduce_lanes(Vec<A> (&v)[kCount]) {
  if constexpr (S == 0) {
    return v[0];
  } else if constexpr (kCount == 1) {
    v[0] = combine<A, S>(v[0], v[0]);
    return reduce_lanes<A, S / 2>(v);
  } else {
    Vec<A> half[kCount / 2];
#pragma GCC unroll 8
    for (std::size_t i = 0; i < kCount / 2; ++i) half[i] = combine<A, S>(v[i], v[i + kCount / 2]);
    return reduce_lanes<A, S / 2>(half);
  }
}

}  // namespace mod_kernels
