#include "pool.h"

#include <algorithm>

#include "vec.h"

namespace mod_kernels {
namespace {

// One element or one vector of the pass: computed from the inputs, then put into the output. Separate,
// because an in-place pass must not compute a lane from what it has put there.
template <PassKind kKind>
struct Element {
  const float *a, *b;
  float* y;

  static constexpr bool kHasB = kKind == PassKind::kAdd || kKind == PassKind::kAddRelu;
  static constexpr bool kHasRelu = kKind == PassKind::kRelu || kKind == PassKind::kAddRelu;

  template <class V>
  static V apply(V v, V w) {
    if constexpr (kHasB) v += w;
    if constexpr (kHasRelu) v = relu(v);
    return v;
  }
  VecF compute(int64_t i) const { return apply(load(a + i), kHasB ? load(b + i) : VecF{}); }
  VecF compute_first(int64_t i, int64_t count) const {
    return apply(load_first(a + i, count), kHasB ? load_first(b + i, count) : VecF{});
  }
  float compute_one(int64_t i) const { return apply(a[i], kHasB ? b[i] : 0.0f); }
  void put(int64_t i, VecF v) const {
    if constexpr (kKind != PassKind::kRead) store(y + i, v);
  }
  void put_first(int64_t i, VecF v, int64_t count) const {
    if constexpr (kKind != PassKind::kRead) store_first(y + i, v, count);
  }
  void put_one(int64_t i, float v) const {
    if constexpr (kKind != PassKind::kRead) y[i] = v;
  }
};

// Lanes whose sum is the sum of elements at, ..., at + length - 1. A length that is no multiple of kLanes
// ends in a vector that overlaps the one before: computed first, masked in the sum, put last.
template <int kAccumulators, class E>
inline VecF row_lanes(const E& element, int64_t at, int64_t length) {
  if (length < kLanes) {
    const VecF v = element.compute_first(at, length);
    element.put_first(at, v, length);
    return v;
  }
  const int64_t rest = length % kLanes;
  const VecF last = rest ? element.compute(at + length - kLanes) : VecF{};
  VecF sum[kAccumulators] = {};
  int64_t i = 0;
  for (; i + kAccumulators * kLanes <= length; i += kAccumulators * kLanes) {
    for (int j = 0; j < kAccumulators; ++j) {
      const VecF v = element.compute(at + i + j * kLanes);
      element.put(at + i + j * kLanes, v);
      sum[j] += v;
    }
  }
  VecF total{};
  for (; i + kLanes <= length; i += kLanes) {
    const VecF v = element.compute(at + i);
    element.put(at + i, v);
    total += v;
  }
  if (rest) {
    element.put(at + length - kLanes, last);
    total += keep_last(last, rest);
  }
  for (int step = kAccumulators / 2; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) sum[j] += sum[j + step];
  }
  return total + sum[0];
}

template <int kAccumulators, class E>
void pool_rows(const E& element, int64_t hw, int64_t begin, int64_t end, float* pooled) {
  const VecF count = splat(static_cast<float>(hw));
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, end - c);
    VecF sums[kLanes] = {};
    for (int64_t j = 0; j < here; ++j) sums[j] = row_lanes<kAccumulators>(element, (c + j) * hw, hw);
    store_first(pooled + c, reduce_lanes(sums) / count, here);
  }
}

// Pixels summed among themselves before their sum meets the running one in memory: as many streams as the
// hardware follows, and one access to the running sum per so many loads.
constexpr int kPixels = 8;

template <int kCount, class E>
inline void add_pixels(const E& element, int64_t channels, int64_t pixel, int64_t begin, int64_t end,
                       bool first, float* sums) {
  const int64_t at = pixel * channels;
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    VecF v[kCount];
    for (int p = 0; p < kCount; ++p) {
      v[p] = element.compute(at + p * channels + c);
      element.put(at + p * channels + c, v[p]);
    }
    for (int step = kCount / 2; step > 0; step /= 2) {
      for (int p = 0; p < step; ++p) v[p] += v[p + step];
    }
    store(sums + c, first ? v[0] : load(sums + c) + v[0]);
  }
  for (; c < end; ++c) {
    float v[kCount];
    for (int p = 0; p < kCount; ++p) {
      v[p] = element.compute_one(at + p * channels + c);
      element.put_one(at + p * channels + c, v[p]);
    }
    for (int step = kCount / 2; step > 0; step /= 2) {
      for (int p = 0; p < step; ++p) v[p] += v[p + step];
    }
    sums[c] = first ? v[0] : sums[c] + v[0];
  }
}

template <class E>
void pool_pixels(const E& element, int64_t channels, int64_t hw, int64_t begin, int64_t end, float* pooled) {
  int64_t p = 0;
  for (; p + kPixels <= hw; p += kPixels) {
    add_pixels<kPixels>(element, channels, p, begin, end, p == 0, pooled);
  }
  for (; p < hw; ++p) add_pixels<1>(element, channels, p, begin, end, p == 0, pooled);
  const float count = static_cast<float>(hw);
  for (int64_t c = begin; c < end; ++c) pooled[c] /= count;
}

template <PassKind kKind>
void pool_sample(const PoolPass& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                 int64_t end, float* pooled) {
  const Element<kKind> element{pass.a, pass.b, pass.y};
  if (channels_last || hw == 1) {
    pool_pixels(element, channels, hw, begin, end, pooled);
  } else if (hw >= 16 * kLanes) {
    pool_rows<8>(element, hw, begin, end, pooled);
  } else {
    // Short rows: neighbouring channels already are independent sums, and folding accumulators costs.
    pool_rows<2>(element, hw, begin, end, pooled);
  }
}

}  // namespace

void pool_sample(const PoolPass& pass, int64_t channels, int64_t hw, bool channels_last, int64_t begin,
                 int64_t end, float* pooled) {
  switch (pass.kind) {
    case PassKind::kRead:
      return pool_sample<PassKind::kRead>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kCopy:
      return pool_sample<PassKind::kCopy>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kRelu:
      return pool_sample<PassKind::kRelu>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kAdd:
      return pool_sample<PassKind::kAdd>(pass, channels, hw, channels_last, begin, end, pooled);
    case PassKind::kAddRelu:
      return pool_sample<PassKind::kAddRelu>(pass, channels, hw, channels_last, begin, end, pooled);
  }
}

}  // namespace mod_kernels
