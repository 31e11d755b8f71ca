#include "top_k.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "storage.h"

namespace mod_kernels {
namespace {

// Order of the logits as signed integers: NaN above everything, -0.0 equal to +0.0.
template <class A>
inline Mask<A> ordered(Vec<A> logits) {
  constexpr auto kLargest = std::numeric_limits<IntOf<A>>::max();
  const Mask<A> bits = (Mask<A>)(logits + A{0});
  const Mask<A> key = bits < 0 ? bits ^ kLargest : bits;
  return logits != logits ? Mask<A>{} + kLargest : key;
}

// Larger is better; unique, because the channel is in it, the lower channel the better.
template <class A>
using RankKey = std::conditional_t<sizeof(A) == 8, unsigned __int128, uint64_t>;
template <class A>
inline RankKey<A> rank_key(IntOf<A> ordered, int64_t channel) {
  using Unsigned = std::make_unsigned_t<IntOf<A>>;
  const Unsigned order = static_cast<Unsigned>(ordered) ^ Unsigned { 1 } << (8 * sizeof(A) - 1);
  return static_cast<RankKey<A>>(order) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(channel));
}
template <class A>
inline IntOf<A> order_of(RankKey<A> key) {
  using Unsigned = std::make_unsigned_t<IntOf<A>>;
  return static_cast<IntOf<A>>(static_cast<Unsigned>(key >> 32) ^ Unsigned{1} << (8 * sizeof(A) - 1));
}
template <class A>
inline int64_t channel_of(RankKey<A> key) {
  return static_cast<uint32_t>(~static_cast<uint32_t>(key));
}

// Up to this k, selection works in buffers on the stack.
constexpr int64_t kSmall = 64;

// Keeps the best so far sorted: about k * ln(C / k) insertions of up to k moves. Fast where most logits are
// equal, or k is a large part of C.
template <class A>
void insertion_top_k(const A* logits, int64_t channels, int64_t k, RankKey<A>* best) {
  int64_t held = 0;
  IntOf<A> threshold = 0;  // order of the worst held, once k are held
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    const int64_t here = std::min<int64_t>(kLanes<A>, channels - c);
    const Mask<A> keys = ordered<A>(here == kLanes<A> ? load(logits + c) : load_first(logits + c, here));
    // Channels come in ascending order, so a later equal never displaces a held one.
    if (held == k && !any(keys > threshold)) continue;
    for (int64_t l = 0; l < here; ++l) {
      if (held == k && keys[l] <= threshold) continue;
      const RankKey<A> key = rank_key<A>(keys[l], c + l);
      int64_t at = held < k ? held++ : k - 1;
      for (; at > 0 && best[at - 1] < key; --at) best[at] = best[at - 1];
      best[at] = key;
      threshold = order_of<A>(best[held - 1]);
    }
  }
}

// First a bound: the k-th largest of the maxima of 2k or more groups of channels is no more than the k-th
// largest logit, and few channels reach it. Then those few are sorted. False where too many reach it.
template <class A>
bool bounded_top_k(const A* logits, int64_t channels, int64_t k, RankKey<A>* best) {
  constexpr int64_t kMostVectors = 2 * kSmall / kLanes<A>;
  const int64_t vectors = channels / kLanes<A>, groups = (2 * k + kLanes<A> - 1) / kLanes<A>;
  if (vectors < 2 * groups) return false;
  Mask<A> maxima[kMostVectors];
  for (int64_t g = 0; g < groups; ++g) maxima[g] = ordered<A>(load(logits + g * kLanes<A>));
  for (int64_t i = groups, g = 0; i < vectors; ++i) {
    const Mask<A> keys = ordered<A>(load(logits + i * kLanes<A>));
    maxima[g] = keys > maxima[g] ? keys : maxima[g];
    if (++g == groups) g = 0;
  }
  IntOf<A> largest[2 * kSmall];
  std::memcpy(largest, maxima, groups * sizeof(Mask<A>));
  std::nth_element(largest, largest + k - 1, largest + groups * kLanes<A>, std::greater<>());
  const IntOf<A> bound = largest[k - 1];

  constexpr int64_t kMostFound = 4 * kSmall;
  RankKey<A> found[kMostFound + kLanes<A>];
  int64_t count = 0;
  for (int64_t c = 0; c < channels; c += kLanes<A>) {
    const int64_t here = std::min<int64_t>(kLanes<A>, channels - c);
    const Mask<A> keys = ordered<A>(here == kLanes<A> ? load(logits + c) : load_first(logits + c, here));
    if (!any(keys >= bound)) continue;
    IntOf<A> key[kLanes<A>];
    std::memcpy(key, &keys, sizeof key);
    for (int64_t l = 0; l < here; ++l) {
      found[count] = rank_key<A>(key[l], c + l);
      count += key[l] >= bound;
    }
    if (count > kMostFound) return false;
  }
  std::sort(found, found + count, std::greater<>());
  std::copy_n(found, k, best);
  return true;
}

}  // namespace

template <class A>
void top_k(const A* logits, int64_t channels, int64_t k, A* scores, int64_t* index) {
  RankKey<A> few[kSmall];
  std::vector<RankKey<A>> many;
  RankKey<A>* best = few;
  if (k <= kSmall) {
    if (!bounded_top_k(logits, channels, k, few)) insertion_top_k(logits, channels, k, few);
  } else {
    many.resize(channels);
    for (int64_t c = 0; c < channels; ++c) many[c] = rank_key<A>(ordered<A>(splat(logits[c]))[0], c);
    if (k < channels) std::nth_element(many.begin(), many.begin() + k, many.end(), std::greater<>());
    std::sort(many.begin(), many.begin() + k, std::greater<>());
    best = many.data();
  }
  for (int64_t j = 0; j < k; ++j) {
    const int64_t channel = channel_of<A>(best[j]);
    index[j] = channel;
    scores[j] = 1 / (1 + std::exp(-logits[channel]));
  }
}

template void top_k<float>(const float*, int64_t, int64_t, float*, int64_t*);
template void top_k<double>(const double*, int64_t, int64_t, double*, int64_t*);

}  // namespace mod_kernels
