#include "selector.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "vec.h"

namespace mod_kernels {
namespace {

constexpr int kRows = 4;  // rows of a tile: their four sums share one transposing reduction

// Samples of a tile: as many as leave registers for one weight and the samples' own vectors.
constexpr int kTileSamples = kRegisters == 32 ? 4 : (kLanes == 8 ? 3 : 2);

// sum[s][g] lanes 0 to 3: the products of sample s with rows 4g to 4g + 3.
template <int kSamples, int kGroups>
inline void dot_tile(const float* const* rows, const float* const* in, int64_t length,
                     VecF (&sum)[kSamples][kGroups]) {
  constexpr int kAll = kRows * kGroups;
  VecF acc[kSamples][kAll] = {};
  const auto step = [&](auto&& fetch) {
    VecF v[kSamples];
    for (int s = 0; s < kSamples; ++s) v[s] = fetch(in[s]);
    for (int r = 0; r < kAll; ++r) {
      const VecF w = fetch(rows[r]);
      for (int s = 0; s < kSamples; ++s) acc[s][r] += w * v[s];
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) step([i](const float* p) { return load(p + i); });
  if (const int64_t rest = length - i) {
    if (length < kLanes) {
      step([rest](const float* p) { return load_first(p, rest); });
    } else {
      step([=](const float* p) { return keep_last(load(p + length - kLanes), rest); });
    }
  }
  for (int s = 0; s < kSamples; ++s) {
    for (int g = 0; g < kGroups; ++g) {
      const VecF* a = acc[s] + kRows * g;
      sum[s][g] = reduce_four(a[0], a[1], a[2], a[3]);
    }
  }
}

// Rows r to r + 4 * kGroups - 1 (those below end) for samples n to n + kSamples - 1.
template <int kSamples, int kGroups>
inline void linear_tile(const Linear& layer, const float* in, int64_t n, int64_t r, int64_t end, float* out) {
  const float* rows[kRows * kGroups];
  const float* vectors[kSamples];
  // Rows past the end repeat the last: their sums are thrown away.
  for (int j = 0; j < kRows * kGroups; ++j) {
    rows[j] = layer.weight + std::min<int64_t>(r + j, end - 1) * layer.inputs;
  }
  for (int s = 0; s < kSamples; ++s) vectors[s] = in + (n + s) * layer.inputs;
  VecF sum[kSamples][kGroups];
  dot_tile<kSamples, kGroups>(rows, vectors, layer.inputs, sum);
  for (int s = 0; s < kSamples; ++s) {
    float* to = out + (n + s) * layer.outputs;
    for (int j = 0; j < kRows * kGroups && r + j < end; ++j) {
      float v = sum[s][j / kRows][j % kRows];
      if (layer.bias) v += layer.bias[r + j];
      to[r + j] = layer.relu ? relu(v) : v;
    }
  }
}

// Order of the logits as signed integers: NaN above everything, -0.0 equal to +0.0.
inline VecI ordered(VecF logits) {
  const VecI bits = (VecI)(logits + 0.0f);
  const VecI key = bits < 0 ? bits ^ 0x7fffffff : bits;
  return logits != logits ? VecI{} + 0x7fffffff : key;
}

// Larger is better; unique, because the channel is in it, the lower channel the better.
inline uint64_t rank_key(int32_t ordered, int64_t channel) {
  return static_cast<uint64_t>(static_cast<uint32_t>(ordered) ^ 0x80000000u) << 32 |
         static_cast<uint32_t>(~static_cast<uint32_t>(channel));
}

// Up to this k the best so far are kept sorted by insertion (about k * ln(C / k) insertions of up to k
// moves).
constexpr int64_t kInsertionLimit = 64;

void insertion_top_k(const float* logits, int64_t channels, int64_t k, uint64_t* best) {
  int64_t held = 0;
  int32_t threshold = 0;  // order of the worst held, once k are held
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, channels - c);
    const VecI keys = ordered(here == kLanes ? load(logits + c) : load_first(logits + c, here));
    // Channels come in ascending order, so a later equal never displaces a held one.
    if (held == k && !any(keys > threshold)) continue;
    for (int64_t l = 0; l < here; ++l) {
      if (held == k && keys[l] <= threshold) continue;
      const uint64_t key = rank_key(keys[l], c + l);
      int64_t at = held < k ? held++ : k - 1;
      for (; at > 0 && best[at - 1] < key; --at) best[at] = best[at - 1];
      best[at] = key;
      threshold = static_cast<int32_t>(static_cast<uint32_t>(best[held - 1] >> 32) ^ 0x80000000u);
    }
  }
}

}  // namespace

void linear(const Linear& layer, const float* in, int64_t samples, int64_t begin, int64_t end, float* out) {
  if (samples == 1) {  // one sample has too few independent sums in four rows to fill the pipeline
    for (int64_t r = begin; r < end; r += 2 * kRows) linear_tile<1, 2>(layer, in, 0, r, end, out);
    return;
  }
  // Weights outside: each is read from memory once, and the samples' vectors come from the cache.
  for (int64_t r = begin; r < end; r += kRows) {
    int64_t n = 0;
    for (; n + kTileSamples <= samples; n += kTileSamples) {
      linear_tile<kTileSamples, 1>(layer, in, n, r, end, out);
    }
    for (; n < samples; ++n) linear_tile<1, 1>(layer, in, n, r, end, out);
  }
}

void top_k(const float* logits, int64_t channels, int64_t k, float* scores, int64_t* index) {
  uint64_t few[kInsertionLimit];
  std::vector<uint64_t> many;
  uint64_t* best = few;
  if (k <= kInsertionLimit) {
    insertion_top_k(logits, channels, k, few);
  } else {
    many.resize(channels);
    for (int64_t c = 0; c < channels; ++c) many[c] = rank_key(ordered(splat(logits[c]))[0], c);
    if (k < channels) std::nth_element(many.begin(), many.begin() + k, many.end(), std::greater<>());
    std::sort(many.begin(), many.begin() + k, std::greater<>());
    best = many.data();
  }
  for (int64_t j = 0; j < k; ++j) {
    const int64_t channel = static_cast<uint32_t>(~static_cast<uint32_t>(best[j]));
    index[j] = channel;
    scores[j] = 1.0f / (1.0f + std::exp(-logits[channel]));
  }
}

}  // namespace mod_kernels
