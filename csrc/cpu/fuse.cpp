#include "fuse.h"

#include <algorithm>
#include <cstring>

#include "storage.h"

namespace mod_kernels {
namespace {

template <class T>
inline T fused(T x, Accumulate<T> score, T z) {
  return narrow<T>(widen(x) + score * widen(z));
}

// y[i] = x[i] + score * z[i * stride_z] over one plane; y may be x.
template <class T>
inline void add_plane(const T* x, T* y, const T* z, int64_t stride_z, Accumulate<T> score, int64_t hw) {
  using A = Accumulate<T>;
  if (stride_z != 1) {
    for (int64_t i = 0; i < hw; ++i) y[i] = fused(x[i], score, z[i * stride_z]);
    return;
  }
  int64_t i = 0;
  for (; i + kLanes<A> <= hw; i += kLanes<A>) store(y + i, load(x + i) + splat(score) * load(z + i));
  if (const int64_t rest = hw - i) {
    store_first(y + i, load_first(x + i, rest) + splat(score) * load_first(z + i, rest), rest);
  }
}

// y[j] = x[j] + scores[j] * z[j * stride_z] over the k channels of one pixel; y may be x.
template <class T>
inline void add_pixel(const T* x, T* y, const T* z, int64_t stride_z, const Accumulate<T>* scores,
                      int64_t k) {
  using A = Accumulate<T>;
  if (stride_z != 1) {
    for (int64_t j = 0; j < k; ++j) y[j] = fused(x[j], scores[j], z[j * stride_z]);
    return;
  }
  int64_t j = 0;
  for (; j + kLanes<A> <= k; j += kLanes<A>) store(y + j, load(x + j) + load(scores + j) * load(z + j));
  if (const int64_t rest = k - j) {
    const Vec<A> add = load_first(scores + j, rest) * load_first(z + j, rest);
    store_first(y + j, load_first(x + j, rest) + add, rest);
  }
}

// Whether a sum that is rounded after each of its terms would be rounded more than once.
template <class T>
bool rounds_repeatedly(const int64_t* index, int64_t k) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) return false;
  for (int64_t j = 1; j < k; ++j) {
    if (std::find(index, index + j, index[j]) != index + j) return true;
  }
  return false;
}

// y[index[j]] += scores[j] * z[j] where channels repeat: all of a channel's terms, then the one rounding. No
// selection repeats a channel, so this is for indices of a caller's own, and plain.
template <class T>
void add_repeated(const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample, const Accumulate<T>* scores,
                  const int64_t* index) {
  const int64_t k = z.c, hw = y.hw();
  const T* from = z.sample(sample);
  for (int64_t j = 0; j < k; ++j) {
    if (std::find(index, index + j, index[j]) != index + j) continue;  // added with the first of its channel
    T* to = y.sample(sample) + index[j] * y.stride_c();
    for (int64_t p = 0; p < hw; ++p) {
      Accumulate<T> total = widen(to[p * y.stride_p()]);
      for (int64_t i = j; i < k; ++i) {
        if (index[i] == index[j]) total += scores[i] * widen(from[p * z.stride_p() + i * z.stride_c()]);
      }
      to[p * y.stride_p()] = narrow<T>(total);
    }
  }
}

template <class T>
void fuse_pixels(const T* x, const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample,
                 const Accumulate<T>* scores, const int64_t* index, Position position) {
  T* to = y.sample(sample);
  const T* from = z.sample(sample);
  const int64_t channels = y.c, k = z.c, hw = y.hw();
  const int64_t stride_c = z.stride_c(), stride_p = z.stride_p();
  if (position == Position::kOriginal) {
    if (rounds_repeatedly<T>(index, k)) {
      if (x != to) std::memcpy(to, x, channels * hw * sizeof(T));
      return add_repeated(y, z, sample, scores, index);
    }
    for (int64_t p = 0; p < hw; ++p) {
      if (x != to) std::memcpy(to + p * channels, x + p * channels, channels * sizeof(T));
      for (int64_t j = 0; j < k; ++j) {
        T& y_pj = to[p * channels + index[j]];
        y_pj = fused(y_pj, scores[j], from[p * stride_p + j * stride_c]);
      }
    }
    return;
  }
  const int64_t first = position == Position::kFirst ? 0 : channels - k;
  for (int64_t p = 0; p < hw; ++p) {
    const T* in = x + p * channels;
    T* out = to + p * channels;
    if (in != out) {
      std::memcpy(out, in, first * sizeof(T));
      std::memcpy(out + first + k, in + first + k, (channels - first - k) * sizeof(T));
    }
    add_pixel(in + first, out + first, from + p * stride_p, stride_c, scores, k);
  }
}

}  // namespace

template <class T>
void gather_sample(const FeatureMap<T>& x, int64_t sample, const int64_t* index, const FeatureMap<T>& out) {
  const T* from = x.sample(sample);
  T* to = out.sample(sample);
  const int64_t k = out.c, hw = x.hw();
  if (x.channels_last()) {
    // By the output's layout, which may be either where k = 1 fits both.
    const int64_t stride_c = out.stride_c(), stride_p = out.stride_p();
    for (int64_t p = 0; p < hw; ++p) {
      for (int64_t j = 0; j < k; ++j) to[p * stride_p + j * stride_c] = from[p * x.c + index[j]];
    }
  } else {
    for (int64_t j = 0; j < k; ++j) std::memcpy(to + j * hw, from + index[j] * hw, hw * sizeof(T));
  }
}

template <class T>
void fuse_sample(const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample, const Accumulate<T>* scores,
                 const int64_t* index, Position position) {
  if (y.channels_last()) return fuse_pixels<T>(y.sample(sample), y, z, sample, scores, index, position);
  const int64_t k = z.c, hw = y.hw();
  if (position == Position::kOriginal && rounds_repeatedly<T>(index, k)) {
    return add_repeated(y, z, sample, scores, index);
  }
  for (int64_t j = 0; j < k; ++j) {
    T* plane = y.sample(sample) + target_channel(position, j, k, y.c, index) * hw;
    add_plane<T>(plane, plane, z.sample(sample) + j * z.stride_c(), z.stride_p(), scores[j], hw);
  }
}

template <class T>
void copy_fuse_sample(const FeatureMap<T>& x, const FeatureMap<T>& y, const FeatureMap<T>& z, int64_t sample,
                      const Accumulate<T>* scores, const int64_t* index, Position position) {
  const T* from = x.sample(sample);
  if (y.channels_last()) return fuse_pixels<T>(from, y, z, sample, scores, index, position);
  T* to = y.sample(sample);
  const int64_t k = z.c, hw = y.hw(), channels = y.c;
  if (position == Position::kOriginal) {
    // Indices may repeat: copy, then add while the sample is in the cache.
    std::memcpy(to, from, channels * hw * sizeof(T));
    return fuse_sample(y, z, sample, scores, index, position);
  }
  const int64_t first = position == Position::kFirst ? 0 : channels - k;
  std::memcpy(to, from, first * hw * sizeof(T));
  std::memcpy(to + (first + k) * hw, from + (first + k) * hw, (channels - first - k) * hw * sizeof(T));
  for (int64_t j = 0; j < k; ++j) {
    const int64_t at = (first + j) * hw;
    add_plane<T>(from + at, to + at, z.sample(sample) + j * z.stride_c(), z.stride_p(), scores[j], hw);
  }
}

#define MOD_KERNELS_FUSE(T)                                                                               \
  template void gather_sample<T>(const FeatureMap<T>&, int64_t, const int64_t*, const FeatureMap<T>&);    \
  template void fuse_sample<T>(const FeatureMap<T>&, const FeatureMap<T>&, int64_t, const Accumulate<T>*, \
                               const int64_t*, Position);                                                 \
  template void copy_fuse_sample<T>(const FeatureMap<T>&, const FeatureMap<T>&, const FeatureMap<T>&,     \
                                    int64_t, const Accumulate<T>*, const int64_t*, Position);
MOD_KERNELS_FOR_EACH_DTYPE(MOD_KERNELS_FUSE)

}  // namespace mod_kernels
