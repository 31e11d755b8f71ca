#include "tail.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "conv.h"
#include "vec.h"

namespace mod_kernels {
namespace {

// Floats a plane is followed by, so that whole vectors can be loaded and stored at its end.
constexpr int64_t kSlack = 2 * kLanes;

// A reusable buffer of the calling thread; grows, never shrinks.
float* scratch(int64_t size) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local int64_t capacity = 0;
  if (size > capacity) {
    buffer = std::make_unique<float[]>(size);  // zeroed: garbage lanes are never denormal at first
    capacity = size;
  }
  return buffer.get();
}

struct Planes {
  float* data;
  int64_t stride;
  float* operator()(int64_t i) const { return data + i * stride; }
};

struct Tail {
  const FeatureMap& x;
  float* sample;
  const ConvBlock& block;
  const float* scores;
  const int64_t* index;
  int64_t h = x.h, w = x.w, hw = x.hw();
  int64_t pitch = w + 2;
  int64_t dense_stride = (hw + kSlack + kLanes - 1) / kLanes * kLanes;
  int64_t padded_stride = ((h + 2) * pitch + kSlack + kLanes - 1) / kLanes * kLanes;

  float* target(int64_t j) const {
    return sample + target_channel(block.position, j, block.k, x.c, index) * x.stride_c();
  }

  // Zero halo around the rows of a padded plane.
  void clear_halo(float* plane) const {
    std::memset(plane, 0, (pitch + 1) * sizeof(float));
    for (int64_t r = 1; r <= h; ++r) plane[r * pitch + w + 1] = plane[(r + 1) * pitch] = 0.0f;
    std::memset(plane + (h + 1) * pitch, 0, pitch * sizeof(float));
  }

  // Dense rows into a padded plane.
  void pad(const float* from, float* plane) const {
    for (int64_t r = 0; r < h; ++r) {
      std::memcpy(plane + (r + 1) * pitch + 1, from + r * w, w * sizeof(float));
    }
    clear_halo(plane);
  }

  // Rows of `pitch` to dense rows, in place.
  void close_up(float* plane) const {
    for (int64_t r = 1; r < h; ++r) std::memmove(plane + r * w, plane + r * pitch, w * sizeof(float));
  }

  // The selected channels, dense.
  void gather(Planes to) const {
    if (x.channels_last()) {
      for (int64_t p = 0; p < hw; ++p) {
        const float* pixel = sample + p * x.c;
        for (int64_t j = 0; j < block.k; ++j) to(j)[p] = pixel[index[j]];
      }
    } else {
      for (int64_t j = 0; j < block.k; ++j) {
        std::memcpy(to(j), sample + index[j] * hw, hw * sizeof(float));
      }
    }
  }

  // x[target(j), p .. p + kLanes - 1] += scores[j] * v, NCHW.
  void add_vector(int64_t j, int64_t p, VecF v) const {
    float* to = target(j) + p;
    if (block.final_relu) v = relu(v);
    const int64_t rest = hw - p;
    if (rest >= kLanes) {
      store(to, load(to) + splat(scores[j]) * v);
    } else {
      store_first(to, load_first(to, rest) + splat(scores[j]) * v, rest);
    }
  }

  // x[target(j)] += scores[j] * z[j] for all of the dense planes z.
  void add_planes(Planes z) const {
    if (!x.channels_last()) {
      for (int64_t j = 0; j < block.k; ++j) {
        for (int64_t p = 0; p < hw; p += kLanes) add_vector(j, p, load(z(j) + p));
      }
      return;
    }
    for (int64_t p = 0; p < hw; ++p) {
      for (int64_t j = 0; j < block.k; ++j) {
        const float v = z(j)[p];
        target(j)[p * x.c] += scores[j] * (block.final_relu ? relu(v) : v);
      }
    }
  }

  void bottleneck() const {
    const int64_t k = block.k, m = block.m;
    float* memory = scratch(k * dense_stride + m * (dense_stride + 2 * padded_stride));
    const Planes dense{memory, dense_stride};                     // gathered channels; at the end the result
    const Planes inner{memory + k * dense_stride, dense_stride};  // after the first 1x1
    const Planes padded{inner(m), padded_stride};                 // the same with its halo
    const Planes after{padded(m), padded_stride};                 // after the 3x3

    const ConvShape narrow{k, m, hw, 0};
    const auto keep_inner = [&](int64_t o, int64_t p, VecF v) { store(inner(o) + p, relu(v)); };
    if (!x.channels_last() && hw % kLanes == 0) {
      // Whole vectors all the way: read the channels where they lie.
      conv<1>(
          narrow, [&](int64_t i) { return sample + index[i] * hw; }, block.weight[0], block.bias[0],
          keep_inner);
    } else {
      gather(dense);
      conv<1>(narrow, dense, block.weight[0], block.bias[0], keep_inner);
    }
    for (int64_t i = 0; i < m; ++i) pad(inner(i), padded(i));
    conv<9>({m, m, h * pitch, pitch}, padded, block.weight[1], block.bias[1],
            [&](int64_t o, int64_t p, VecF v) { store(after(o) + p, relu(v)); });
    for (int64_t i = 0; i < m; ++i) close_up(after(i));
    const ConvShape widen{m, k, hw, 0};
    if (x.channels_last()) {
      conv<1>(widen, after, block.weight[2], block.bias[2],
              [&](int64_t o, int64_t p, VecF v) { store(dense(o) + p, v); });
      add_planes(dense);
    } else {
      conv<1>(widen, after, block.weight[2], block.bias[2],
              [&](int64_t o, int64_t p, VecF v) { add_vector(o, p, v); });
    }
  }

  void basic() const {
    const int64_t k = block.k;
    float* memory = scratch(k * (dense_stride + 3 * padded_stride));
    const Planes dense{memory, dense_stride};
    const Planes first{memory + k * dense_stride, padded_stride};
    const Planes second{first(k), padded_stride};
    const Planes result{second(k), padded_stride};

    if (x.channels_last()) gather(dense);
    for (int64_t i = 0; i < k; ++i) pad(x.channels_last() ? dense(i) : sample + index[i] * hw, first(i));
    const ConvShape shape{k, k, h * pitch, pitch};
    // Written one row down and one column right, the output lies as the next convolution's padded input, and
    // its garbage columns fall on the halo.
    conv<9>(shape, first, block.weight[0], block.bias[0],
            [&](int64_t o, int64_t p, VecF v) { store(second(o) + pitch + 1 + p, relu(v)); });
    for (int64_t i = 0; i < k; ++i) clear_halo(second(i));
    conv<9>(shape, second, block.weight[1], block.bias[1],
            [&](int64_t o, int64_t p, VecF v) { store(result(o) + p, v); });
    for (int64_t i = 0; i < k; ++i) close_up(result(i));
    add_planes(result);
  }
};

}  // namespace

void tail_sample(const FeatureMap& x, int64_t sample, const ConvBlock& block, const float* scores,
                 const int64_t* index) {
  const Tail tail{x, x.sample(sample), block, scores, index};
  if (block.kind == BlockKind::kBottleneck) {
    tail.bottleneck();
  } else {
    tail.basic();
  }
}

}  // namespace mod_kernels
