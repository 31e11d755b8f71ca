#include "fuse.h"

#include <cstring>

namespace mod_kernels {
namespace {

// y[i] = x[i] + score * z[i * stride_z] over one plane; y may be x.
inline void add_plane(const float* x, float* y, const float* z, int64_t stride_z, float score, int64_t hw) {
  if (stride_z == 1) {
    for (int64_t i = 0; i < hw; ++i) y[i] = x[i] + score * z[i];
  } else {
    for (int64_t i = 0; i < hw; ++i) y[i] = x[i] + score * z[i * stride_z];
  }
}

void fuse_pixels(const float* x, const FeatureMap& y, const FeatureMap& z, int64_t sample,
                 const float* scores, const int64_t* index, Position position) {
  float* to = y.sample(sample);
  const float* from = z.sample(sample);
  const int64_t channels = y.c, k = z.c, hw = y.hw();
  const int64_t stride_c = z.stride_c(), stride_p = z.stride_p();
  if (position == Position::kOriginal) {
    for (int64_t p = 0; p < hw; ++p) {
      if (x != to) std::memcpy(to + p * channels, x + p * channels, channels * sizeof(float));
      for (int64_t j = 0; j < k; ++j) {
        to[p * channels + index[j]] += scores[j] * from[p * stride_p + j * stride_c];
      }
    }
    return;
  }
  const int64_t first = position == Position::kFirst ? 0 : channels - k;
  for (int64_t p = 0; p < hw; ++p) {
    const float* in = x + p * channels;
    float* out = to + p * channels;
    if (in != out) {
      std::memcpy(out, in, first * sizeof(float));
      std::memcpy(out + first + k, in + first + k, (channels - first - k) * sizeof(float));
    }
    const float* add = from + p * stride_p;
    if (stride_c == 1) {
      for (int64_t j = 0; j < k; ++j) out[first + j] = in[first + j] + scores[j] * add[j];
    } else {
      for (int64_t j = 0; j < k; ++j) out[first + j] = in[first + j] + scores[j] * add[j * stride_c];
    }
  }
}

}  // namespace

void gather_sample(const FeatureMap& x, int64_t sample, const int64_t* index, const FeatureMap& out) {
  const float* from = x.sample(sample);
  float* to = out.sample(sample);
  const int64_t k = out.c, hw = x.hw();
  if (x.channels_last()) {
    // By the output's layout, which may be either where k = 1 fits both.
    const int64_t stride_c = out.stride_c(), stride_p = out.stride_p();
    for (int64_t p = 0; p < hw; ++p) {
      for (int64_t j = 0; j < k; ++j) to[p * stride_p + j * stride_c] = from[p * x.c + index[j]];
    }
  } else {
    for (int64_t j = 0; j < k; ++j) std::memcpy(to + j * hw, from + index[j] * hw, hw * sizeof(float));
  }
}

void fuse_sample(const FeatureMap& y, const FeatureMap& z, int64_t sample, const float* scores,
                 const int64_t* index, Position position) {
  if (y.channels_last()) return fuse_pixels(y.sample(sample), y, z, sample, scores, index, position);
  const int64_t k = z.c, hw = y.hw();
  for (int64_t j = 0; j < k; ++j) {
    float* plane = y.sample(sample) + target_channel(position, j, k, y.c, index) * hw;
    add_plane(plane, plane, z.sample(sample) + j * z.stride_c(), z.stride_p(), scores[j], hw);
  }
}

void copy_fuse_sample(const FeatureMap& x, const FeatureMap& y, const FeatureMap& z, int64_t sample,
                      const float* scores, const int64_t* index, Position position) {
  const float* from = x.sample(sample);
  if (y.channels_last()) return fuse_pixels(from, y, z, sample, scores, index, position);
  float* to = y.sample(sample);
  const int64_t k = z.c, hw = y.hw(), channels = y.c;
  if (position == Position::kOriginal) {
    // Indices may repeat: copy, then add while the sample is in the cache.
    std::memcpy(to, from, channels * hw * sizeof(float));
    return fuse_sample(y, z, sample, scores, index, position);
  }
  const int64_t first = position == Position::kFirst ? 0 : channels - k;
  std::memcpy(to, from, first * hw * sizeof(float));
  std::memcpy(to + (first + k) * hw, from + (first + k) * hw, (channels - first - k) * hw * sizeof(float));
  for (int64_t j = 0; j < k; ++j) {
    const int64_t at = (first + j) * hw;
    add_plane(from + at, to + at, z.sample(sample) + j * z.stride_c(), z.stride_p(), scores[j], hw);
  }
}

}  // namespace mod_kernels
