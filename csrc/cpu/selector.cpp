#include "selector.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "vec.h"

namespace mod_kernels {
namespace {

constexpr int kRows = 4;  // rows of a tile: their four sums share one transposing reduction

// Samples of a tile: as many as leave registers for one weight and the samples' own vectors.
constexpr int kTileSamples = kRegisters == 32 ? 4 : (kLanes == 8 ? 3 : 2);

// A product shorter than a vector, at the end of a zeroed one: element i in lane kLanes - length + i.
inline VecF load_short(const float* p, int64_t length, bool readable_before) {
  if (readable_before) return keep_last(load(p + length - kLanes), length);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < length; ++i) lanes[kLanes - length + i] = p[i];
  return load(lanes);
}

// Rows r to r + 4 * kGroups - 1 (those below end) for samples n to n + kSamples - 1.
template <int kSamples, int kGroups>
inline void linear_tile(const Linear& layer, const float* in, int64_t n, int64_t r, int64_t end, float* out) {
  constexpr int kAll = kRows * kGroups;
  const int64_t length = layer.inputs;
  const float* rows[kAll];
  const float* vectors[kSamples];
  // Rows past the end repeat the last: their sums are thrown away.
  for (int j = 0; j < kAll; ++j) rows[j] = layer.weight + std::min<int64_t>(r + j, end - 1) * length;
  for (int s = 0; s < kSamples; ++s) vectors[s] = in + (n + s) * length;

  VecF sum[kSamples][kAll];
#pragma GCC unroll 4
  for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 8
    for (int j = 0; j < kAll; ++j) sum[s][j] = VecF{};
  }
  const auto multiply = [&](const VecF(&v)[kSamples], int j, VecF w) {
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) sum[s][j] += w * v[s];
  };
  VecF v[kSamples];
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) v[s] = load(vectors[s] + i);
#pragma GCC unroll 8
    for (int j = 0; j < kAll; ++j) multiply(v, j, load(rows[j] + i));
  }
  if (const int64_t rest = length - i) {
    if (length > kLanes) {
      // A vector that overlaps the one before, masked on both sides (0 * inf would be NaN).
      for (int s = 0; s < kSamples; ++s) v[s] = keep_last(load(vectors[s] + length - kLanes), rest);
      for (int j = 0; j < kAll; ++j) multiply(v, j, keep_last(load(rows[j] + length - kLanes), rest));
    } else {
      for (int s = 0; s < kSamples; ++s) v[s] = load_short(vectors[s], length, false);
      for (int j = 0; j < kAll; ++j) {
        multiply(v, j, load_short(rows[j], length, rows[j] + length - kLanes >= layer.weight));
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
      const int64_t first = r + kRows * g;
      if (first >= end) break;
      const VecF* a = sum[s] + kRows * g;
      VecF four = reduce_four(a[0], a[1], a[2], a[3]);
      float* to = out + (n + s) * layer.outputs + first;
      if (first + kRows <= end) {  // a constant count: one store
        if (layer.bias) four += load_first(layer.bias + first, kRows);
        store_first(to, layer.relu ? relu(four) : four, kRows);
      } else {
        if (layer.bias) four += load_first(layer.bias + first, end - first);
        store_first(to, layer.relu ? relu(four) : four, end - first);
      }
    }
  }
}

template <int kSamples>
inline void linear_rest(const Linear& layer, const float* in, int64_t n, int64_t samples, int64_t r,
                        int64_t end, float* out) {
  if constexpr (kSamples > 0) {
    if (samples - n == kSamples) return linear_tile<kSamples, 1>(layer, in, n, r, end, out);
    linear_rest<kSamples - 1>(layer, in, n, samples, r, end, out);
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

// Up to this k, selection works in buffers on the stack.
constexpr int64_t kSmall = 64;

// Keeps the best so far sorted: about k * ln(C / k) insertions of up to k moves. Fast where most logits are
// equal, or k is a large part of C.
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

// First a bound: the k-th largest of the maxima of 2k or more groups of channels is no more than the k-th
// largest logit, and few channels reach it. Then those few are sorted. False where too many reach it.
bool bounded_top_k(const float* logits, int64_t channels, int64_t k, uint64_t* best) {
  constexpr int64_t kMostVectors = 2 * kSmall / kLanes;
  const int64_t vectors = channels / kLanes, groups = (2 * k + kLanes - 1) / kLanes;
  if (vectors < 2 * groups) return false;
  VecI maxima[kMostVectors];
  for (int64_t g = 0; g < groups; ++g) maxima[g] = ordered(load(logits + g * kLanes));
  for (int64_t i = groups, g = 0; i < vectors; ++i) {
    const VecI keys = ordered(load(logits + i * kLanes));
    maxima[g] = keys > maxima[g] ? keys : maxima[g];
    if (++g == groups) g = 0;
  }
  int32_t largest[2 * kSmall];
  std::memcpy(largest, maxima, groups * sizeof(VecI));
  std::nth_element(largest, largest + k - 1, largest + groups * kLanes, std::greater<>());
  const int32_t bound = largest[k - 1];

  constexpr int64_t kMostFound = 4 * kSmall;
  uint64_t found[kMostFound + kLanes];
  int64_t count = 0;
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, channels - c);
    const VecI keys = ordered(here == kLanes ? load(logits + c) : load_first(logits + c, here));
    if (!any(keys >= bound)) continue;
    int32_t key[kLanes];
    std::memcpy(key, &keys, sizeof key);
    for (int64_t l = 0; l < here; ++l) {
      found[count] = rank_key(key[l], c + l);
      count += key[l] >= bound;
    }
    if (count > kMostFound) return false;
  }
  std::sort(found, found + count, std::greater<>());
  std::copy_n(found, k, best);
  return true;
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
    linear_rest<kTileSamples - 1>(layer, in, n, samples, r, end, out);
  }
}

void top_k(const float* logits, int64_t channels, int64_t k, float* scores, int64_t* index) {
  uint64_t few[kSmall];
  std::vector<uint64_t> many;
  uint64_t* best = few;
  if (k <= kSmall) {
    if (!bounded_top_k(logits, channels, k, few)) insertion_top_k(logits, channels, k, few);
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
