#include "linear.h"

#include <algorithm>

#include "storage.h"

namespace mod_kernels {
namespace {

constexpr int kRows = 4;  // rows of a tile: their four sums share one transposing reduction

// Samples of a tile: as many as leave registers for one weight and the samples' own vectors.
constexpr int kTileSamples = kRegisters == 32 ? 4 : (kVectorBytes == 32 ? 3 : 2);

// A product shorter than a vector, at the end of a zeroed one: element i in lane kLanes - length + i.
template <class A, class W>
inline Vec<A> load_short(const W* p, int64_t length) {
  W lanes[kLanes<A>] = {};
  std::copy_n(p, length, lanes + kLanes<A> - length);
  return load_as<A>(lanes);
}

// Rows r to r + 4 * kGroups - 1 (those below end) for samples n to n + kSamples - 1.
template <class A, class W, int kSamples, int kGroups>
inline void linear_tile(const Linear<A>& layer, const A* in, int64_t n, int64_t r, int64_t end, A* out) {
  constexpr int kAll = kRows * kGroups;
  const int64_t length = layer.inputs;
  const W* weight = static_cast<const W*>(layer.weight);
  const W* rows[kAll];
  const A* vectors[kSamples];
  // Rows past the end repeat the last: their sums are thrown away.
  for (int j = 0; j < kAll; ++j) rows[j] = weight + std::min<int64_t>(r + j, end - 1) * length;
  for (int s = 0; s < kSamples; ++s) vectors[s] = in + (n + s) * length;

  Vec<A> sum[kSamples][kAll];
#pragma GCC unroll 4
  for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 8
    for (int j = 0; j < kAll; ++j) sum[s][j] = Vec<A>{};
  }
  const auto multiply = [&](const Vec<A>(&v)[kSamples], int j, Vec<A> w) {
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) sum[s][j] += w * v[s];
  };
  Vec<A> v[kSamples];
  int64_t i = 0;
  for (; i + kLanes<A> <= length; i += kLanes<A>) {
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) v[s] = load(vectors[s] + i);
#pragma GCC unroll 8
    for (int j = 0; j < kAll; ++j) multiply(v, j, load_as<A>(rows[j] + i));
  }
  if (const int64_t rest = length - i) {
    if (length > kLanes<A>) {
      // A vector that overlaps the one before, masked on both sides (0 * inf would be NaN).
      const int64_t at = length - kLanes<A>;
      for (int s = 0; s < kSamples; ++s) v[s] = keep_last<A>(load(vectors[s] + at), rest);
      for (int j = 0; j < kAll; ++j) multiply(v, j, keep_last<A>(load_as<A>(rows[j] + at), rest));
    } else {
      for (int s = 0; s < kSamples; ++s) v[s] = load_short<A>(vectors[s], length);
      for (int j = 0; j < kAll; ++j) multiply(v, j, load_short<A>(rows[j], length));
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const int64_t first = r + kRows * g;
      if (first >= end) break;
      const Vec<A>* a = sum[s] + kRows * g;
      const FourSums<A> four = reduce_four<A>(a[0], a[1], a[2], a[3]);
      A* to = out + (n + s) * layer.outputs + first;
      const auto finish = [&](int64_t count) {
        for (int64_t j = 0; j < count; ++j) {
          const A value = layer.bias ? four.at[j] + layer.bias[first + j] : four.at[j];
          to[j] = layer.relu && value < 0 ? A{0} : value;
        }
      };
      if (first + kRows <= end) {
        finish(kRows);  // a constant count: vector code
      } else {
        finish(end - first);
      }
    }
  }
}

template <class A, class W, int kSamples>
inline void linear_rest(const Linear<A>& layer, const A* in, int64_t n, int64_t samples, int64_t r,
                        int64_t end, A* out) {
  if constexpr (kSamples > 0) {
    if (samples - n == kSamples) return linear_tile<A, W, kSamples, 1>(layer, in, n, r, end, out);
    linear_rest<A, W, kSamples - 1>(layer, in, n, samples, r, end, out);
  }
}

template <class A, class W>
void linear_of(const Linear<A>& layer, const A* in, int64_t samples, int64_t begin, int64_t end, A* out) {
  if (samples == 1) {  // one sample has too few independent sums in four rows to fill the pipeline
    for (int64_t r = begin; r < end; r += 2 * kRows) linear_tile<A, W, 1, 2>(layer, in, 0, r, end, out);
    return;
  }
  // Weights outside: each is read from memory once, and the samples' vectors come from the cache.
  for (int64_t r = begin; r < end; r += kRows) {
    int64_t n = 0;
    for (; n + kTileSamples <= samples; n += kTileSamples) {
      linear_tile<A, W, kTileSamples, 1>(layer, in, n, r, end, out);
    }
    linear_rest<A, W, kTileSamples - 1>(layer, in, n, samples, r, end, out);
  }
}

}  // namespace

template <>
void linear(const Linear<float>& layer, const float* in, int64_t samples, int64_t begin, int64_t end,
            float* out) {
  switch (layer.dtype) {
    case DType::kHalf:
      return linear_of<float, Half>(layer, in, samples, begin, end, out);
    case DType::kBFloat16:
      return linear_of<float, BFloat16>(layer, in, samples, begin, end, out);
    default:
      return linear_of<float, float>(layer, in, samples, begin, end, out);
  }
}

template <>
void linear(const Linear<double>& layer, const double* in, int64_t samples, int64_t begin, int64_t end,
            double* out) {
  if (layer.dtype == DType::kDouble) return linear_of<double, double>(layer, in, samples, begin, end, out);
  linear_of<double, float>(layer, in, samples, begin, end, out);
}

}  // namespace mod_kernels
