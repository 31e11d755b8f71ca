// One step of a narrowed conv block for a sample: out = act(conv(in) + bias), shared out over the threads of
// a team.
//
// Every output is one thread's sum, in one order, however many threads there are.
#pragma once

#include "numeric.h"
#include "parameters.h"

namespace mod_kernels {

inline constexpr float kLayerNormEps = 1e-6f;  // LAYER_NORM_EPS of mod_kernels/spec.py
inline constexpr int kNormLanes = 8;           // threads that share a pixel of a layer norm

// The threads that work on a sample, of one block or of several.
struct Team {
  int thread, threads;
};

// Planes to read: of the selected channels of a map of T (channel is their list), or float ones of the
// workspace, one after the other. Which of them is a run-time value, as code for each would be twice as much.
// A sample has fewer than 2^31 values (plan.h).
template <class T>
struct Source {
  const T* map;  // null: planes
  const float* planes;
  int stride_c, stride_p;
  const int* channel;

  __device__ __forceinline__ int plane(int i) const { return (map == nullptr ? i : channel[i]) * stride_c; }
  __device__ __forceinline__ float at(int place) const {
    if constexpr (std::is_same_v<T, float>) {
      return (map == nullptr ? planes : map)[place];
    } else {
      return map == nullptr ? planes[place] : widen(map[place]);
    }
  }
};

// What becomes of an output: kept as a plane of the workspace, or y = x + score * value at its channel.
template <class T>
struct Sink {
  float* planes;  // null: to the map
  const T* x;
  T* y;
  int stride_c, stride_p, hw;
  const float* scores;
  const int* channel;  // null: from first_channel on
  int first_channel;

  __device__ __forceinline__ void put(int o, int pixel, float value) const {
    if (planes != nullptr) {
      planes[o * hw + pixel] = value;
    } else {
      const int to = channel == nullptr ? first_channel + o : channel[o];
      const int place = to * stride_c + pixel * stride_p;
      y[place] = narrow<T>(widen(x[place]) + scores[o] * value);
    }
  }
};

// What follows a convolution, but for GELU. Comparisons that a NaN fails: it stays.
struct Limits {
  float low, high;

  __device__ __forceinline__ explicit Limits(Then then)
      : low(then == Then::kRelu || then == Then::kRelu6 ? 0.0f : -HUGE_VALF),
        high(then == Then::kRelu6 ? 6.0f : HUGE_VALF) {}
  __device__ __forceinline__ float operator()(float value) const {
    return value < low ? low : value > high ? high : value;
  }
};

// kPointwise (kSide = 1, on h = 1 row of w = hw pixels) and kDense (3). A thread does kTileSide outputs of
// kTileSide pixels in a row: what it loads of weights and planes is used kTileSide times.
template <int kSide, int kTileSide, class T>
__device__ void convolve_dense(const TailStep& step, const float* conv, const Source<T>& in,
                               const Sink<T>& out, int h, int w, bool outputs_first, Team team) {
  constexpr int kReach = kSide / 2, kTaps = kSide * kSide;
  const float *weights = conv + step.weight, *biases = conv + step.bias;
  const Limits limits(step.then);
  const int row_tiles = (w + kTileSide - 1) / kTileSide, tiles = h * row_tiles;
  const int groups = (step.outputs + kTileSide - 1) / kTileSide;
#pragma unroll 1
  for (int item = team.thread; item < tiles * groups; item += team.threads) {
    // Neighbouring threads take neighbouring values of the map that is written.
    const int major = quotient(item, outputs_first ? groups : tiles);
    const int minor = item - major * (outputs_first ? groups : tiles);
    const int tile = outputs_first ? major : minor, first = (outputs_first ? minor : major) * kTileSide;
    const int row = quotient(tile, row_tiles), column = (tile - row * row_tiles) * kTileSide;
    float sums[kTileSide][kTileSide];
    const float* weight[kTileSide];
#pragma unroll
    for (int o = 0; o < kTileSide; ++o) {
      // Past the last output the last one's again, which is not kept.
      const int output = min_of(first + o, step.outputs - 1);
      weight[o] = weights + output * step.inputs * kTaps;
      const float bias = biases[output];
#pragma unroll
      for (int j = 0; j < kTileSide; ++j) sums[o][j] = bias;
    }
#pragma unroll(kSide == 1 ? 4 : 1)
    for (int i = 0; i < step.inputs; ++i) {
      const int plane = in.plane(i);
#pragma unroll(kTileSide == 1 ? kSide : 1)
      for (int dy = 0; dy < kSide; ++dy) {
        const int near_row = row + dy - kReach;
        const bool inside = kSide == 1 || (near_row >= 0 && near_row < h);
        float values[kTileSide + kSide - 1];
#pragma unroll
        for (int j = 0; j < kTileSide + kSide - 1; ++j) {
          const int near = column + j - kReach;
          const int place = plane + (near_row * w + near) * in.stride_p;
          values[j] = inside && near >= 0 && near < w ? in.at(place) : 0.0f;
        }
#pragma unroll
        for (int dx = 0; dx < kSide; ++dx) {
#pragma unroll
          for (int o = 0; o < kTileSide; ++o) {
            const float factor = weight[o][dy * kSide + dx];
#pragma unroll
            for (int j = 0; j < kTileSide; ++j) sums[o][j] += factor * values[j + dx];
          }
        }
      }
#pragma unroll
      for (int o = 0; o < kTileSide; ++o) weight[o] += kTaps;
    }
    const int pixel = row * w + column;
#pragma unroll
    for (int o = 0; o < kTileSide; ++o) {
#pragma unroll
      for (int j = 0; j < kTileSide; ++j) {
        if (first + o < step.outputs && column + j < w) out.put(first + o, pixel + j, limits(sums[o][j]));
      }
    }
    if (step.then == Then::kGelu) {
      // On what this thread has just stored: written out above it would stand there kTileSide * kTileSide
      // times.
#pragma unroll 1
      for (int o = first; o < min_of(first + kTileSide, step.outputs); ++o) {
#pragma unroll 1
        for (int j = 0; j < min_of(kTileSide, w - column); ++j) {
          float& value = out.planes[o * h * w + pixel + j];
          value = gelu(value);
        }
      }
    }
  }
}

// kDepthwise.
template <int kSide, class T>
__device__ void convolve_depthwise(const TailStep& step, const float* conv, const Source<T>& in,
                                   const Sink<T>& out, int h, int w, Team team) {
  constexpr int kReach = kSide / 2;
  const Limits limits(step.then);
  const int hw = h * w;
#pragma unroll 1
  for (int item = team.thread; item < step.outputs * hw; item += team.threads) {
    const int o = quotient(item, hw), pixel = item - o * hw, row = quotient(pixel, w),
              column = pixel - row * w;
    const float* weight = conv + step.weight + o * (kSide * kSide);
    const int plane = in.plane(o);
    float sum = conv[step.bias + o];
#pragma unroll(kSide == 3 ? 3 : 1)
    for (int dy = 0; dy < kSide; ++dy) {
      const int near_row = row + dy - kReach;
      if (near_row < 0 || near_row >= h) continue;
#pragma unroll
      for (int dx = 0; dx < kSide; ++dx) {
        const int near = column + dx - kReach;
        const int place = plane + (near_row * w + near) * in.stride_p;
        const float value = near >= 0 && near < w ? in.at(place) : 0.0f;
        sum += weight[dy * kSide + dx] * value;
      }
    }
    out.put(o, pixel, limits(sum));
  }
}

// kNormalise: planes[i, p] = (planes[i, p] - mean_i) / sqrt(variance_i + eps), in place. kNormLanes threads a
// pixel; of a warp, neighbours have neighbouring pixels.
__device__ __forceinline__ void normalise_pixels(float* planes, int inputs, int hw, Team team) {
  constexpr int kPixels = kWarp / kNormLanes;
  const int lane_of_warp = team.thread % kWarp, part = lane_of_warp / kPixels;
  const int pixels = team.threads / kNormLanes;
  const auto sum_of_pixel = [](float value) {
    for (int apart = kPixels; apart < kWarp; apart *= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
    return value;
  };
#pragma unroll 1
  for (int base = 0; base < hw; base += pixels) {
    const int pixel = base + team.thread / kWarp * kPixels + lane_of_warp % kPixels;
    const int first = pixel < hw ? part : inputs;
    float* column = planes + pixel;
    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int i = first; i < inputs; i += kNormLanes) sum += column[i * hw];
    const float mean = sum_of_pixel(sum) / static_cast<float>(inputs);
#pragma unroll 4
    for (int i = first; i < inputs; i += kNormLanes) {
      const float centred = column[i * hw] - mean;
      squares += centred * centred;
    }
    const float scale = 1.0f / sqrtf(sum_of_pixel(squares) / static_cast<float>(inputs) + kLayerNormEps);
#pragma unroll 4
    for (int i = first; i < inputs; i += kNormLanes) {
      float& value = column[i * hw];
      value = (value - mean) * scale;
    }
  }
}

template <class T>
__device__ void pass_planes(const TailStep& step, const Source<T>& in, const Sink<T>& out, int hw,
                            Team team) {
#pragma unroll 1
  for (int item = team.thread; item < step.outputs * hw; item += team.threads) {
    const int o = quotient(item, hw), pixel = item - o * hw;
    out.put(o, pixel, in.at(in.plane(o) + pixel));
  }
}

}  // namespace mod_kernels
