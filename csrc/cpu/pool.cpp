#include "pool.h"

#include <algorithm>
#include <cstdint>

#include "storage.h"

namespace mod_kernels {
namespace {

// One vector of the pass: computed from the inputs, then put into the output. Separate, because an in-place
// pass must not compute a lane from what it has put there.
template <class T, PassKind kKind>
struct Element {
  using A = Accumulate<T>;
  const T *a, *b;
  T* y;

  static constexpr bool kHasB = kKind == PassKind::kAdd || kKind == PassKind::kAddRelu;
  static constexpr bool kHasRelu = kKind == PassKind::kRelu || kKind == PassKind::kAddRelu;
  static constexpr bool kComputes = kHasB || kHasRelu;

  static Raw<T> apply(Raw<T> raw, Raw<T> other) {
    if constexpr (!kComputes) return raw;
    Vec<A> v = widen_raw<T>(raw);
    if constexpr (kHasB) v += widen_raw<T>(other);
    if constexpr (kHasRelu) v = relu<A>(v);
    return narrow_raw<T>(v);
  }
  Raw<T> compute(int64_t i) const { return apply(load_raw(a + i), kHasB ? load_raw(b + i) : Raw<T>{}); }
  Raw<T> compute_first(int64_t i, int64_t count) const {
    return apply(load_raw_first(a + i, count), kHasB ? load_raw_first(b + i, count) : Raw<T>{});
  }
  void put(int64_t i, Raw<T> v) const {
    if constexpr (kKind != PassKind::kRead) store_raw(y + i, v);
  }
  void put_first(int64_t i, Raw<T> v, int64_t count) const {
    if constexpr (kKind != PassKind::kRead) store_raw_first(y + i, v, count);
  }
};

// Lanes whose sum is the sum of elements at, ..., at + length - 1. A length that is no multiple of the lanes
// ends in a vector that overlaps the one before: computed first, masked in the sum, put last.
template <class T, class E>
inline Vec<Accumulate<T>> row_lanes(const E& element, int64_t at, int64_t length) {
  using A = Accumulate<T>;
  if (length < kLanes<A>) {
    const Raw<T> v = element.compute_first(at, length);
    element.put_first(at, v, length);
    return widen_raw<T>(v);
  }
  const int64_t rest = length % kLanes<A>;
  const Raw<T> last = rest ? element.compute(at + length - kLanes<A>) : Raw<T>{};
  // Two sums suffice where vectors are wide: the next row's additions do not wait for this one's, and folding
  // more would cost.
  constexpr int kSums = kVectorBytes == 16 ? 4 : 2;
  Vec<A> sum[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes<A> <= length; i += kSums * kLanes<A>) {
    for (int j = 0; j < kSums; ++j) {
      const Raw<T> v = element.compute(at + i + j * kLanes<A>);
      element.put(at + i + j * kLanes<A>, v);
      sum[j] += widen_raw<T>(v);
    }
  }
  for (; i + kLanes<A> <= length; i += kLanes<A>) {
    const Raw<T> v = element.compute(at + i);
    element.put(at + i, v);
    sum[0] += widen_raw<T>(v);
  }
  if (rest) {
    element.put(at + length - kLanes<A>, last);
    sum[1] += keep_last<A>(widen_raw<T>(last), rest);
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}

template <class T, class E>
void sum_rows(const E& element, int64_t hw, int64_t begin, int64_t end, Accumulate<T>* pooled) {
  using A = Accumulate<T>;
  const Vec<A> count = splat(static_cast<A>(hw));
  for (int64_t c = begin; c < end; c += kLanes<A>) {
    const int64_t here = std::min<int64_t>(kLanes<A>, end - c);
    Vec<A> sums[kLanes<A>] = {};
    for (int64_t j = 0; j < here; ++j) sums[j] = row_lanes<T>(element, (c + j) * hw, hw);
    store_first(pooled + c, reduce_lanes<A>(sums) / count, here);
  }
}

// Writes elements at to end - 1, in vectors that lie whole in a line of y.
template <class T, class E>
inline void write_flat(const E& element, int64_t at, int64_t end) {
  constexpr int64_t kStep = kLanes<Accumulate<T>>, kBytes = kStep * sizeof(T);
  const int64_t past = reinterpret_cast<uintptr_t>(element.y + at) % kBytes / sizeof(T);
  if (past) {
    const int64_t head = std::min(kStep - past, end - at);
    element.put_first(at, element.compute_first(at, head), head);
    at += head;
  }
  for (; at + kStep <= end; at += kStep) element.put(at, element.compute(at));
  if (at < end) element.put_first(at, element.compute_first(at, end - at), end - at);
}

template <class T, PassKind kKind>
void pool_rows(const Element<T, kKind>& element, int64_t hw, int64_t begin, int64_t end,
               Accumulate<T>* pooled) {
  // Rows that begin anywhere in a line of the cache cost two accesses a vector, and a store in two lines
  // several. So a group of rows is written as one run first, and summed while a cache still holds it.
  constexpr int64_t kRun = 16 << 10;
  const int64_t row = hw * sizeof(T);
  if (kKind == PassKind::kRead || row % kVectorBytes == 0 || row > kRun) {
    return sum_rows<T>(element, hw, begin, end, pooled);
  }
  const int64_t group = std::max<int64_t>(1, kRun / (row * kLanes<Accumulate<T>>)) * kLanes<Accumulate<T>>;
  const Element<T, PassKind::kRead> written{element.y, nullptr, nullptr};
  for (int64_t c = begin; c < end; c += group) {
    const int64_t last = std::min(c + group, end);
    write_flat<T>(element, c * hw, last * hw);
    sum_rows<T>(written, hw, c, last, pooled);
  }
}

// ---- channels_last. A pixel's channels lie side by side, and memory is fast only where it is read in long
// sequential streams, each in pages of its own: many short ones, a page shared by several, halve the rate.

// A pixel of up to this many vectors is summed in registers: one stream.
constexpr int kPixelVectors = kRegisters / 2;
// Pixels whose sum is taken by itself before it joins the total, so that rounding grows with their number and
// that of the blocks instead of with H * W.
constexpr int64_t kBlockPixels = 64;
// More channels: this many pixels a page apart at once, so that the running sums, which lie in memory then,
// are touched once for so many.
constexpr int kStreams = 8;
constexpr int64_t kPageBytes = 4096;

// kCount vectors of channels from c on, summed over `pixels` pixels from `pixel` on, into sums.
template <class T, int kCount, class E>
inline void add_block(const E& element, int64_t channels, int64_t pixel, int64_t pixels, int64_t c,
                      bool first, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  Vec<A> sum[kCount] = {};
  int64_t at = pixel * channels + c;
  for (int64_t p = 0; p < pixels; ++p, at += channels) {
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) {
      const Raw<T> v = element.compute(at + j * kLanes<A>);
      element.put(at + j * kLanes<A>, v);
      sum[j] += widen_raw<T>(v);
    }
  }
  for (int j = 0; j < kCount; ++j) {
    A* to = sums + c + j * kLanes<A>;
    store(to, first ? sum[j] : load(to) + sum[j]);
  }
}

// The channels of a block from c to end, in chunks of at most kCount vectors.
template <class T, int kCount, class E>
inline void add_blocks(const E& element, int64_t channels, int64_t pixel, int64_t pixels, int64_t c,
                       int64_t end, bool first, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  for (; c + kCount * kLanes<A> <= end; c += kCount * kLanes<A>) {
    add_block<T, kCount>(element, channels, pixel, pixels, c, first, sums);
  }
  if constexpr (kCount > 1) {
    add_blocks<T, kCount / 2>(element, channels, pixel, pixels, c, end, first, sums);
  } else if (c < end) {
    Vec<A> sum{};
    for (int64_t p = pixel; p < pixel + pixels; ++p) {
      const Raw<T> v = element.compute_first(p * channels + c, end - c);
      element.put_first(p * channels + c, v, end - c);
      sum += widen_raw<T>(v);
    }
    store_first(sums + c, first ? sum : load_first(sums + c, end - c) + sum, end - c);
  }
}

// kCount pixels, `apart` pixels from each other, summed pairwise and then into sums.
template <class T, int kCount, class E>
inline void add_pixels(const E& element, int64_t channels, int64_t pixel, int64_t apart, int64_t begin,
                       int64_t end, bool first, Accumulate<T>* sums) {
  using A = Accumulate<T>;
  const int64_t at = pixel * channels, step = apart * channels;
  const auto total = [](Vec<A>(&v)[kCount]) {
    for (int half = kCount / 2; half > 0; half /= 2) {
      for (int p = 0; p < half; ++p) v[p] += v[p + half];
    }
    return v[0];
  };
  Vec<A> v[kCount];
  int64_t c = begin;
  for (; c + kLanes<A> <= end; c += kLanes<A>) {
    for (int p = 0; p < kCount; ++p) {
      const Raw<T> raw = element.compute(at + p * step + c);
      element.put(at + p * step + c, raw);
      v[p] = widen_raw<T>(raw);
    }
    const Vec<A> sum = total(v);
    store(sums + c, first ? sum : load(sums + c) + sum);
  }
  if (c < end) {
    for (int p = 0; p < kCount; ++p) {
      const Raw<T> raw = element.compute_first(at + p * step + c, end - c);
      element.put_first(at + p * step + c, raw, end - c);
      v[p] = widen_raw<T>(raw);
    }
    const Vec<A> sum = total(v);
    store_first(sums + c, first ? sum : load_first(sums + c, end - c) + sum, end - c);
  }
}

template <class T, class E>
void pool_pixels(const E& element, int64_t channels, int64_t hw, int64_t begin, int64_t end,
                 Accumulate<T>* pooled) {
  using A = Accumulate<T>;
  if (channels <= kPixelVectors * kLanes<A>) {
    for (int64_t p = 0; p < hw; p += kBlockPixels) {
      const int64_t pixels = std::min(kBlockPixels, hw - p);
      add_blocks<T, kPixelVectors>(element, channels, p, pixels, begin, end, p == 0, pooled);
    }
  } else {
    const int64_t apart = std::max<int64_t>(1, kPageBytes / (channels * static_cast<int64_t>(sizeof(T))));
    int64_t p = 0;
    for (; p + kStreams * apart <= hw; p += kStreams * apart) {
      for (int64_t i = p; i < p + apart; ++i) {
        add_pixels<T, kStreams>(element, channels, i, apart, begin, end, i == 0, pooled);
      }
    }
    for (; p < hw; ++p) add_pixels<T, 1>(element, channels, p, 1, begin, end, p == 0, pooled);
  }
  const A count = static_cast<A>(hw);
  for (int64_t c = begin; c < end; ++c) pooled[c] /= count;
}

template <class T, PassKind kKind>
void pool_of_kind(const PoolPass<T>& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                  int64_t end, Accumulate<T>* pooled) {
  const Element<T, kKind> element{pass.a, pass.b, pass.y};
  if (channels_last || hw == 1) {
    pool_pixels<T>(element, channels, hw, begin, end, pooled);
  } else {
    pool_rows(element, hw, begin, end, pooled);
  }
}

}  // namespace

template <class T>
void pool_sample(const PoolPass<T>& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                 int64_t end, Accumulate<T>* pooled) {
  switch (pass.kind) {
    case PassKind::kRead:
      return pool_of_kind<T, PassKind::kRead>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kCopy:
      return pool_of_kind<T, PassKind::kCopy>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kRelu:
      return pool_of_kind<T, PassKind::kRelu>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kAdd:
      return pool_of_kind<T, PassKind::kAdd>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kAddRelu:
      return pool_of_kind<T, PassKind::kAddRelu>(pass, channels, hw, channels_last, begin, end, pooled);
  }
}

#define MOD_KERNELS_POOL(T) \
  template void pool_sample<T>(const PoolPass<T>&, int64_t, int64_t, bool, int64_t, int64_t, Accumulate<T>*);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_POOL)

}  // namespace mod_kernels
