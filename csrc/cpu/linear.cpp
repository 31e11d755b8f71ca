#include "linear.h"

#include <algorithm>
#include <cstring>

#include "storage.h"

namespace mod_kernels {
namespace {

constexpr int kRows = 4;  // rows of a tile: their four sums are stored together

// Samples of a tile: as many as leave registers for one weight and the samples' own vectors.
constexpr int kTileSamples = kRegisters == 32 ? 4 : (kVectorBytes == 32 ? 3 : 2);

// A product shorter than a vector, at the end of a zeroed one: element i in lane kLanes - length + i.
template <class A, class W>
inline Vec<A> load_short(const W* p, int64_t length) {
  W lanes[kLanes<A>] = {};
  std::copy_n(p, length, lanes + kLanes<A> - length);
  return load_as<A>(lanes);
}

// Four neighbouring outputs; by reference alone, because on two lanes it is wider than a register.
template <class A>
struct FourOf {
  typedef A type __attribute__((vector_size(4 * sizeof(A))));
};
template <class A>
using Four = typename FourOf<A>::type;

// Adds the bias, applies the ReLU, and stores the `count` of the four that exist.
template <class A>
inline void finish(const Linear<A>& layer, Four<A>& four, int64_t row, int64_t count, A* to) {
  if (count >= kRows) {
    Four<A> bias{};
    if (layer.bias) {
      std::memcpy(&bias, layer.bias + row, sizeof bias);
      four += bias;
    }
    if (layer.relu) four = four < 0 ? Four<A>{} : four;
    std::memcpy(to, &four, sizeof four);
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    const A value = layer.bias ? four[j] + layer.bias[row + j] : four[j];
    to[j] = layer.relu && value < 0 ? A{0} : value;
  }
}

// Sums the lanes of kFours times four vectors, kTogether fours at a time; use(i, four) takes each four sums.
template <class A, int kTogether = kLanes<A> / kRows, int kFrom = 0, int kFours, class Use>
inline void reduce_fours(const Vec<A> (&sum)[kFours][kRows], const Use& use) {
  if constexpr (kFrom == kFours) {
    return;
  } else if constexpr (kTogether == 0) {  // two lanes
    Vec<A> low[2] = {sum[kFrom][0], sum[kFrom][1]}, high[2] = {sum[kFrom][2], sum[kFrom][3]};
    const Vec<A> a = reduce_lanes<A>(low), b = reduce_lanes<A>(high);
    Four<A> four{a[0], a[1], b[0], b[1]};
    use(kFrom, four);
    reduce_fours<A, 0, kFrom + 1>(sum, use);
  } else if constexpr (kFrom + kTogether > kFours) {
    reduce_fours<A, kTogether / 2, kFrom>(sum, use);
  } else {
    constexpr int kStep = kLanes<A> / (kRows * kTogether);  // lanes from one sum to the next
    Vec<A> v[kRows * kTogether];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kTogether; ++i) v[i] = sum[kFrom + i / kRows][i % kRows];
    const Vec<A> all = reduce_lanes<A>(v);
#pragma GCC unroll 4
    for (int i = 0; i < kTogether; ++i) {
      const int at = i * kRows * kStep;
      Four<A> four;
      if constexpr (kStep == 1) {
        std::memcpy(&four, reinterpret_cast<const char*>(&all) + at * sizeof(A), sizeof four);
      } else {
        four = Four<A>{all[at], all[at + kStep], all[at + 2 * kStep], all[at + 3 * kStep]};
      }
      use(kFrom + i, four);
    }
    reduce_fours<A, kTogether, kFrom + kTogether>(sum, use);
  }
}

// Rows r to r + 4 * kGroups - 1 (those below end) for samples n to n + kSamples - 1.
template <class A, class W, int kSamples, int kGroups>
inline void linear_tile(const Linear<A>& layer, const A* in, int64_t n, int64_t r, int64_t end, A* out) {
  const int64_t length = layer.inputs;
  const W* weight = static_cast<const W*>(layer.weight);
  const W* rows[kGroups][kRows];
  const A* vectors[kSamples];
  // Rows past the end repeat the last: their sums are thrown away.
  for (int j = 0; j < kGroups * kRows; ++j) {
    rows[j / kRows][j % kRows] = weight + std::min<int64_t>(r + j, end - 1) * length;
  }
  for (int s = 0; s < kSamples; ++s) vectors[s] = in + (n + s) * length;

  Vec<A> sum[kSamples * kGroups][kRows] = {};
  const auto multiply = [&](const auto& sample_vector, const auto& row_vector) {
    Vec<A> v[kSamples];
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) v[s] = sample_vector(vectors[s]);
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int j = 0; j < kRows; ++j) {
        const Vec<A> w = row_vector(rows[g][j]);
#pragma GCC unroll 4
        for (int s = 0; s < kSamples; ++s) sum[s * kGroups + g][j] += w * v[s];
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes<A> <= length; i += kLanes<A>) {
    multiply([&](const A* p) { return load(p + i); }, [&](const W* p) { return load_as<A>(p + i); });
  }
  if (const int64_t rest = length - i) {
    if (length > kLanes<A>) {
      // A vector that overlaps the one before, masked on both sides (0 * inf would be NaN).
      const int64_t at = length - kLanes<A>;
      multiply([&](const A* p) { return keep_last<A>(load(p + at), rest); },
               [&](const W* p) { return keep_last<A>(load_as<A>(p + at), rest); });
    } else {
      multiply([&](const A* p) { return load_short<A>(p, length); },
               [&](const W* p) { return load_short<A>(p, length); });
    }
  }
  reduce_fours<A>(sum, [&](int q, Four<A>& four) {
    const int64_t row = r + q % kGroups * kRows;
    if (row < end) finish(layer, four, row, end - row, out + (n + q / kGroups) * layer.outputs + row);
  });
}

template <class A, class W, int kSamples>
inline void linear_rest(const Linear<A>& layer, const A* in, int64_t n, int64_t samples, int64_t r,
                        int64_t end, A* out) {
  if constexpr (kSamples > 0) {
    if (samples - n == kSamples) return linear_tile<A, W, kSamples, 1>(layer, in, n, r, end, out);
    linear_rest<A, W, kSamples - 1>(layer, in, n, samples, r, end, out);
  }
}

template <class W>
inline void prefetch(const W* begin, const W* end) {
  constexpr int64_t kLine = 64 / sizeof(W);
  for (; begin < end; begin += kLine) __builtin_prefetch(begin);
}

template <class A, class W>
void linear_of(const Linear<A>& layer, const A* in, int64_t samples, int64_t begin, int64_t end, A* out) {
  if (samples == 1) {  // one sample has too few independent sums in four rows to fill the pipeline
    // Long rows go by the memory's rate, which more than eight streams lower; short ones by that of the
    // reduction, which is the better the more it has to do at once.
    constexpr int64_t kLongRow = 512;
    if (layer.inputs >= kLongRow) {
      for (int64_t r = begin; r < end; r += 2 * kRows) linear_tile<A, W, 1, 2>(layer, in, 0, r, end, out);
      return;
    }
    constexpr int kGroups = kLanes<A> >= 16 ? 4 : 2;
    const W* weight = static_cast<const W*>(layer.weight);
    for (int64_t r = begin, next; r < end; r = next) {
      next = r + kGroups * kRows;
      // Many short rows at once are no stream that the hardware follows: the next ones are asked for in
      // order.
      prefetch(weight + std::min(next, end) * layer.inputs,
               weight + std::min(next + kGroups * kRows, end) * layer.inputs);
      linear_tile<A, W, 1, kGroups>(layer, in, 0, r, end, out);
    }
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
