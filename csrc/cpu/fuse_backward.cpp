#include "fuse_backward.h"

#include <algorithm>

#include "runtime.h"
#include "storage.h"

namespace mod_kernels {
namespace {

// One plane: dz = score * dy, and the sum of z * dy.
template <class T, bool kDz, bool kSum>
Accumulate<T> plane(const T* dy, const T* z, T* dz, Accumulate<T> score, int64_t hw) {
  using A = Accumulate<T>;
  // As many sums as hide the addition's latency; where vectors are wide there are few of them in a plane.
  constexpr int kSums = kVectorBytes == 16 ? 4 : 2;
  Vec<A> sum[kSums] = {};
  int64_t i = 0;
  const auto step = [&](int j) {
    const Vec<A> d = load(dy + i);
    if constexpr (kDz) store(dz + i, splat(score) * d);
    if constexpr (kSum) sum[j] += load(z + i) * d;
    i += kLanes<A>;
  };
  while (i + kSums * kLanes<A> <= hw) {
    for (int j = 0; j < kSums; ++j) step(j);
  }
  while (i + kLanes<A> <= hw) step(0);
  if (const int64_t rest = hw - i) {
    const Vec<A> d = load_first(dy + i, rest);
    if constexpr (kDz) store_first(dz + i, splat(score) * d, rest);
    if constexpr (kSum) sum[1] += load_first(z + i, rest) * d;
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  Vec<A> one[1] = {sum[0]};
  return reduce_lanes<A>(one)[0];
}

// Gathered channels j to j + count - 1, at most a vector of them, side by side in a pixel.
template <class T, bool kDz, bool kSum>
void pixels(const FuseGradient<T>& g, int64_t n, int64_t j, int64_t count) {
  using A = Accumulate<T>;
  // A sum of so many joins the total as one, so that rounding grows with their number and that of the blocks.
  constexpr int64_t kBlockPixels = 64;
  const int64_t channels = g.dy.c, k = g.z.c, hw = g.dy.hw(), at = n * k + j;
  const bool original = g.position == Position::kOriginal;
  const int64_t* index = original ? g.index + at : nullptr;
  const T* dy = g.dy.sample(n) + (original ? 0 : target_channel(g.position, j, k, channels, nullptr));
  const T* z = kSum ? g.z.sample(n) + j : nullptr;
  T* dz = kDz ? g.dz.sample(n) + j : nullptr;
  const Vec<A> score = kDz ? load_first(g.scores + at, count) : Vec<A>{};
  Vec<A> total{};
  for (int64_t begin = 0; begin < hw; begin += kBlockPixels) {
    Vec<A> sum{};
    for (int64_t p = begin; p < std::min(begin + kBlockPixels, hw); ++p) {
      Vec<A> d;
      if (original) {
        T lanes[kLanes<A>] = {};
        for (int64_t l = 0; l < count; ++l) lanes[l] = dy[p * channels + index[l]];
        d = load(lanes);
      } else {
        d = load_first(dy + p * channels, count);
      }
      if constexpr (kDz) store_first(dz + p * k, score * d, count);
      if constexpr (kSum) sum += load_first(z + p * k, count) * d;
    }
    total += sum;
  }
  if constexpr (kSum) store_first(g.dscores + at, total, count);
}

template <class T, bool kDz, bool kSum>
void run(const FuseGradient<T>& g) {
  constexpr int64_t kGroup = kLanes<Accumulate<T>>;
  const int64_t k = g.z.c, hw = g.dy.hw();
  const int64_t threads = threads_for(g.z.n * g.z.sample_size());
  if (g.dy.channels_last() || hw == 1) {
    const int64_t groups = (k + kGroup - 1) / kGroup;
    parallel(threads, g.z.n * groups, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t j = i % groups * kGroup;
        pixels<T, kDz, kSum>(g, i / groups, j, std::min(kGroup, k - j));
      }
    });
    return;
  }
  parallel(threads, g.z.n * k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / k, j = i % k;
      const int64_t* index = g.position == Position::kOriginal ? g.index + n * k : nullptr;
      const int64_t channel = target_channel(g.position, j, k, g.dy.c, index);
      const auto sum =
          plane<T, kDz, kSum>(g.dy.sample(n) + channel * hw, kSum ? g.z.sample(n) + j * hw : nullptr,
                              kDz ? g.dz.sample(n) + j * hw : nullptr, g.scores[i], hw);
      if constexpr (kSum) g.dscores[i] = sum;
    }
  });
}

}  // namespace

template <class T>
void fuse_backward(const FuseGradient<T>& gradient) {
  const bool dz = gradient.dz.data != nullptr, sum = gradient.dscores != nullptr;
  if (dz && sum) return run<T, true, true>(gradient);
  if (dz) return run<T, true, false>(gradient);
  if (sum) return run<T, false, true>(gradient);
}

#define MOD_KERNELS_FUSE_BACKWARD(T) template void fuse_backward<T>(const FuseGradient<T>&);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_FUSE_BACKWARD)

}  // namespace mod_kernels
