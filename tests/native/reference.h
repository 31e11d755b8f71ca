// What the kernels must compute, in double and plain loops. Maps are (channel, pixel), one sample each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../../csrc/cpu/tail.h"

namespace mod_kernels::reference {

using Values = std::vector<double>;

inline Values means(const Values& x, int64_t channels) {
  const int64_t hw = std::ssize(x) / channels;
  Values mean(channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < hw; ++p) mean[c] += x[c * hw + p];
    mean[c] /= hw;
  }
  return mean;
}

inline double relu(double v) { return v < 0 ? 0 : v; }

// For each of `samples`; no bias where `bias` is empty.
inline Values linear(const Values& in, const Values& weight, const Values& bias, int64_t samples,
                     bool with_relu) {
  const int64_t inputs = std::ssize(in) / samples, outputs = std::ssize(weight) / inputs;
  Values out(samples * outputs);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t r = 0; r < outputs; ++r) {
      double sum = bias.empty() ? 0 : bias[r];
      for (int64_t i = 0; i < inputs; ++i) sum += in[n * inputs + i] * weight[r * inputs + i];
      out[n * outputs + r] = with_relu ? relu(sum) : sum;
    }
  }
  return out;
}

// All channels, the best first: NaN before numbers, ties to the lower channel.
template <class A>
std::vector<int64_t> ranking(const A* logits, int64_t channels) {
  std::vector<int64_t> order(channels);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (std::isnan(logits[a]) || std::isnan(logits[b])) return std::isnan(logits[a]) > std::isnan(logits[b]);
    return logits[a] > logits[b];
  });
  return order;
}

inline double sigmoid(double logit) { return 1 / (1 + std::exp(-logit)); }

inline Values gather(const Values& x, int64_t hw, const std::vector<int64_t>& index) {
  Values out;
  for (int64_t channel : index) {
    out.insert(out.end(), x.begin() + channel * hw, x.begin() + (channel + 1) * hw);
  }
  return out;
}

// Stride 1, zeros around, `side` x `side`; depthwise where the weights of each output are for one input.
inline Values conv(const Values& in, const Values& weight, const Values& bias, int64_t h, int64_t w,
                   int64_t side) {
  const int64_t outputs = std::ssize(bias), reach = side / 2;
  const int64_t inputs = std::ssize(weight) / (outputs * side * side);  // of each output
  const bool depthwise = inputs < std::ssize(in) / (h * w);
  Values out(outputs * h * w);
  for (int64_t o = 0; o < outputs; ++o) {
    double* to = out.data() + o * h * w;
    std::fill(to, to + h * w, bias[o]);
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t dy = -reach; dy <= reach; ++dy) {
        for (int64_t dx = -reach; dx <= reach; ++dx) {
          const double tap = weight[((o * inputs + i) * side + dy + reach) * side + dx + reach];
          for (int64_t y = std::max<int64_t>(0, -dy); y < std::min(h, h - dy); ++y) {
            const double* from = in.data() + ((depthwise ? o : i) * h + y + dy) * w + dx;
            for (int64_t x = std::max<int64_t>(0, -dx); x < std::min(w, w - dx); ++x) {
              to[y * w + x] += tap * from[x];
            }
          }
        }
      }
    }
  }
  return out;
}

// What follows a convolution.
enum class Then { kNothing, kRelu, kRelu6, kGelu, kLayerNorm };

inline double gelu(double v) { return v * std::erfc(-v / std::sqrt(2.0)) / 2; }

// Mean 0 and variance 1 over the channels of each pixel.
inline void layer_norm(Values& z, int64_t hw) {
  const int64_t channels = std::ssize(z) / hw;
  for (int64_t p = 0; p < hw; ++p) {
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean += z[c * hw + p] / channels;
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(z[c * hw + p] - mean, 2) / channels;
    for (int64_t c = 0; c < channels; ++c)
      z[c * hw + p] = (z[c * hw + p] - mean) / std::sqrt(variance + 1e-6);
  }
}

inline void follow(Then then, Values& z, int64_t hw) {
  if (then == Then::kLayerNorm) return layer_norm(z, hw);
  for (double& v : z) {
    if (then == Then::kRelu || then == Then::kRelu6) v = relu(v);
    if (then == Then::kRelu6 && v > 6) v = 6;
    if (then == Then::kGelu) v = gelu(v);
  }
}

inline std::vector<int64_t> targets(Position position, int64_t channels, const std::vector<int64_t>& index) {
  if (position == Position::kOriginal) return index;
  std::vector<int64_t> target(index.size());
  std::iota(target.begin(), target.end(), position == Position::kFirst ? 0 : channels - std::ssize(index));
  return target;
}

inline void fuse(Values& y, int64_t hw, const Values& z, const Values& scores,
                 const std::vector<int64_t>& target) {
  for (int64_t j = 0; j < std::ssize(target); ++j) {
    for (int64_t p = 0; p < hw; ++p) y[target[j] * hw + p] += scores[j] * z[j * hw + p];
  }
}

}  // namespace mod_kernels::reference
